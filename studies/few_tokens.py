"""How few recorded tokens are enough? The aligned model's score against the pairs collected from.

    python -m studies.few_tokens                         writes studies/results/few_tokens.json

Stage 1 has all 600 training pairs of the embedded default. collect.py --limit draws some of them
at random; align.py has its defaults.
"""

from dataclasses import dataclass
from pathlib import Path

import align
import collect
import dual
import scit
from common.config import run, setting
from common.stages import read_stage
from studies.shared import World, quietly, write_result

# of 600: 1% to 100%
PAIRS = (6, 18, 60, 180, 600)


@dataclass
class Config:
    seeds: list[int] | None = setting(
        None, "seeds of world, base and stages; empty takes 0 1 2", group="run"
    )
    work: str = setting(
        "/tmp/rahf-few", "folder of the stages, one folder a seed, reused", group="run"
    )


def measure(world, method, count):
    """Tokens recorded from this many pairs, the judge's scores, and the share of the validation
    distance to the target that is left."""
    folder = world.out / method
    quietly(collect, out=str(world.out), method=method, limit=count)
    quietly(align, out=str(world.out), method=method)
    collected = read_stage(folder / "collect", "collect", "python collect.py")
    aligned = read_stage(folder / "align", "align", "python align.py")
    report = world.score(f"{method}/align")
    return {
        "tokens": collected["tokens_train"],
        "greedy": report["judge_greedy"],
        "sampled": report["judge_sampled"],
        "distance": sum(aligned["distance_end"]) / sum(aligned["distance_start"]),
    }


def measure_seed(out, seed):
    """{method: {number of pairs, as text: figures}} of one seed."""
    world = World(out, seed)
    figures = {}
    for method, stage, folder in (("scit", scit, "adapter"), ("dual", dual, "good")):
        if not (out / method / folder).is_dir():
            quietly(stage, out=str(out), seed=seed)
        figures[method] = {}
        for count in PAIRS:
            row = measure(world, method, count)
            figures[method][str(count)] = row
            print(f"seed {seed} {method} {count} pairs: {row}", flush=True)
    return figures


def markdown(seeds):
    """The table of the results, {seed: figures}: means over the seeds."""
    lines = [
        "| pairs of 600 | tokens | SCIT greedy, T = 1 | distance left "
        "| DUAL greedy, T = 1 | distance left |",
        "|---|---|---|---|---|---|",
    ]
    for count in map(str, PAIRS):
        cells = [count]
        for method in ("scit", "dual"):
            means = mean_figures([seed[method][count] for seed in seeds.values()])
            if method == "scit":
                # the tokens are the same for both
                cells.append(f"{means['tokens']:,.0f}")
            cells.append(f"{means['greedy']:.2f}, {means['sampled']:.2f}")
            cells.append(f"{means['distance']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_figures(rows):
    means = {}
    for key in rows[0]:
        means[key] = sum(row[key] for row in rows) / len(rows)
    return means


def main(config):
    seeds = {}
    for seed in config.seeds or (0, 1, 2):
        seeds[seed] = measure_seed(Path(config.work) / f"seed{seed}", seed)
    print(markdown(seeds))
    write_result("few_tokens", {"seeds": seeds})


if __name__ == "__main__":
    run(main, Config)
