"""Survey and sweep with nothing set by hand: what they choose, and how it scores on test pairs.

    python -m studies.found                              writes studies/results/found.json

For each seed of the embedded default and each method: tools.survey; collect.py with the layers
that it recommends; tools.sweep with its strengths and rank, which scores on validation pairs by
the world's judge. The best adapter is chosen a second time as if there were no judge, by the
implicit reward alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import collect
import dual
import scit
from common.config import run, setting
from common.score import choose_best
from studies.shared import World, quietly, write_result
from tools import survey, sweep

# The shares of |v|² that this many directions hold are kept.
KEPT_SHARES = 32


@dataclass
class Config:
    seeds: list[int] | None = setting(
        None, "seeds of world, base and stages; empty takes 0 1 2", group="run"
    )
    work: str = setting(
        "/tmp/rahf-found", "folder of the stages, one folder a seed; bases are reused", group="run"
    )


def rounded(report):
    return {name: round(value, 4) for name, value in report.items()}


def choose_without_judge(reports):
    """(name of the best adapter, why) by what is known without the judge."""
    blind = {}
    for name, report in reports.items():
        blind[name] = {key: value for key, value in report.items() if not key.startswith("judge")}
    return choose_best(blind, sweep.Config.max_kl)


def measure_method(world, method, seconds):
    """What survey and sweep choose for one method, and its test figures; adds to seconds."""
    run_settings = {"out": str(world.out), "method": method}
    seconds[f"survey {method}"] = quietly(survey, **run_settings)
    surveyed = json.loads((world.out / method / "survey.json").read_text())
    advice = surveyed["recommended"]
    layers = [str(layer) for layer in advice["layers"]]
    seconds[f"collect {method}"] = quietly(collect, layers=layers, **run_settings)
    seconds[f"sweep {method}"] = quietly(
        sweep, strength=advice["strengths"], rank=advice["rank"], **run_settings
    )
    swept = json.loads((world.out / method / "sweep" / "sweep.json").read_text())
    best_without_judge, why_without_judge = choose_without_judge(swept["models"])

    test = rounded(world.score(f"{method}/align"))
    test_without_judge = rounded(world.score(f"{method}/sweep/{best_without_judge}"))
    print(f"seed {world.seed} {method}: {advice}")
    for name, row in ((swept["best"], test), (best_without_judge, test_without_judge)):
        greedy, sampled = row["judge_greedy"], row["judge_sampled"]
        print(f"    {name}: greedy {greedy:.2f}, T = 1 {sampled:.2f}", flush=True)
    blocks = []
    for block in surveyed["blocks"]:
        blocks.append({**block, "shares": block["shares"][:KEPT_SHARES]})
    return {
        "advice": advice,
        "blocks": blocks,
        "base_nll": surveyed["base_nll"],
        "sweep": swept["models"],
        "best": swept["best"],
        "why": swept["why"],
        "best_without_judge": best_without_judge,
        "why_without_judge": why_without_judge,
        "test": test,
        "test_without_judge": test_without_judge,
    }


def measure_seed(out, seed):
    """All figures of one seed."""
    world = World(out, seed)
    seconds = {
        "scit": quietly(scit, out=str(out), seed=seed),
        "dual": quietly(dual, out=str(out), seed=seed),
    }
    figures = {method: measure_method(world, method, seconds) for method in ("scit", "dual")}
    figures |= {"base": rounded(world.score()), "pairs": len(world.pairs)}
    return {**figures, "seconds": {name: round(value, 1) for name, value in seconds.items()}}


def markdown(seeds):
    """The table of the results, {seed: figures}."""
    lines = [
        "| method, seed | layers | strengths | rank | best ρ: greedy, T = 1 "
        "| best ρ without the judge: greedy, T = 1 |",
        "|---|---|---|---|---|---|",
    ]
    for method in ("scit", "dual"):
        for seed, figures in seeds.items():
            row = figures[method]
            advice = row["advice"]
            cells = [
                f"{method.upper()}, {seed}",
                " ".join(str(layer) for layer in advice["layers"]),
                " ".join(str(strength) for strength in advice["strengths"]),
                str(advice["rank"]),
                best_cell(row["best"], row["test"]),
                best_cell(row["best_without_judge"], row["test_without_judge"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_cell(name, test):
    strength = name.removeprefix("strength_")
    return f"{strength}: {test['judge_greedy']:.2f}, {test['judge_sampled']:.2f}"


def main(config):
    seeds = {}
    for seed in config.seeds or (0, 1, 2):
        seeds[seed] = measure_seed(Path(config.work) / f"seed{seed}", seed)
    print(markdown(seeds))
    write_result("found", {"seeds": seeds})


if __name__ == "__main__":
    run(main, Config)
