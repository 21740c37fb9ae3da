"""Survey and sweep alone: settings of the embedded default with nothing set by hand, and what they give on test pairs.

    python tests/found.py                          seeds 0, 1, 2; writes tests/results/found.json

For each seed and method: collect.py --survey, collect.py with the layers that it recommends, align.py with its strengths and
rank, scored on validation pairs by the world's oracle; and, as if there were no oracle, by the NLL of chosen replies alone.
"""
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import align
import collect
import data
import dual
import scit
import toy
from files import run, setting, versions, write_json
from lora import LoRA, load_adapter
from model import load_model, load_tokenizer
from results import quietly
from score import choose, load_judge, score_model


@dataclass
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of world, base and stages"})
    work: str = setting("/tmp/rahf-found", "folder of the stages, one folder a seed; bases are reused")


def measure(out, seed):
    """Every figure of one seed."""
    world = toy.ensure(toy.Config(out=str(out), seed=seed))
    seconds, found = {stage.__name__: quietly(stage, out=str(out), seed=seed) for stage in (scit, dual)}, {}
    tokenizer, model = load_tokenizer(world["model"]), load_model(world["model"], torch.float32, "cpu")
    pairs = data.prepare(world["data"], ("test",), tokenizer, 256, seed)["test"]

    def figures(folder=None):
        adapter = LoRA(model.base_model, factors=load_adapter(folder, model.base_model)).eval() if folder else None
        report, _ = score_model(model, adapter, tokenizer, pairs, "plain", {"judge": load_judge("toy:judge")}, 64, 64, seed)
        if adapter:
            adapter.remove()
        return {name: round(value, 4) for name, value in report.items()}
    for method in ("scit", "dual"):
        seconds[f"survey {method}"] = quietly(collect, out=str(out), method=method, survey=True)
        survey = json.loads((out / method / "survey.json").read_text())
        advice = survey["recommended"]
        seconds[f"collect {method}"] = quietly(collect, out=str(out), method=method, layers=[str(layer) for layer in advice["layers"]])
        seconds[f"sweep {method}"] = quietly(align, out=str(out), method=method, strength=advice["strengths"], rank=advice["rank"])
        sweep = json.loads((out / method / "sweep" / "sweep.json").read_text())
        blind, why = choose({name: {k: v for k, v in row.items() if not k.startswith("judge")} for name, row in sweep["models"].items()})
        found[method] = {"advice": advice, "blocks": [{**block, "shares": block["shares"][:32]} for block in survey["blocks"]], "base_nll": survey["base_nll"],
                         "sweep": sweep["models"], "best": sweep["best"], "why": sweep["why"], "best_without_judge": blind, "why_without_judge": why,
                         "test": figures(out / method / "align"), "test_without_judge": figures(out / method / "sweep" / blind)}
        print(f"seed {seed} {method}: {advice}, {sweep['best']} ({blind} without the judge): greedy {found[method]['test']['judge_greedy']:.2f}, "
              f"T=1 {found[method]['test']['judge_sampled']:.2f} (without {found[method]['test_without_judge']['judge_greedy']:.2f}, "
              f"{found[method]['test_without_judge']['judge_sampled']:.2f})", flush=True)
    return {**found, "base": figures(), "pairs": len(pairs), "seconds": {name: round(s, 1) for name, s in seconds.items()}}


def markdown(seeds):
    """The README's table."""
    lines = ["| method, seed | layers | strengths | rank | best ρ: greedy, T = 1 | best ρ without the judge: greedy, T = 1 |", "|---|---|---|---|---|---|"]
    for method in ("scit", "dual"):
        for seed, found in seeds.items():
            row, cells = found[method], []
            for best, test in ((row["best"], row["test"]), (row["best_without_judge"], row["test_without_judge"])):
                cells.append(f"{best.removeprefix('strength_')}: {test['judge_greedy']:.2f}, {test['judge_sampled']:.2f}")
            lines.append(f"| {method.upper()}, {seed} | {' '.join(map(str, row['advice']['layers']))} | {' '.join(map(str, row['advice']['strengths']))} | "
                         f"{row['advice']['rank']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(config):
    seeds = {seed: measure(Path(config.work) / f"seed{seed}", seed) for seed in config.seeds}
    write_json(Path(__file__).parent / "results" / "found.json", {
        "command": "python " + " ".join(sys.argv), "machine": f"{torch.get_num_threads()} threads, {os.uname().machine}", "versions": versions(), "seeds": seeds})


if __name__ == "__main__":
    run(main, Config)
