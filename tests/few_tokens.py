"""How few collected tokens are enough? Score of the aligned model against the share of pairs whose states are collected.

    python tests/few_tokens.py                     seeds 0, 1, 2; writes tests/results/few_tokens.json

Stage 1 has all training pairs of the embedded default; collect.py --limit draws some of them at random; align.py has its defaults.
"""
import json
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
from files import read_stage, run, setting, versions, write_json
from lora import LoRA, load_adapter
from model import load_model, load_tokenizer
from results import quietly
from score import load_judge, score_model

PAIRS = (6, 18, 60, 180, 600)                 # of 600: 1% to 100%


@dataclass
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of world, base and stages"})
    work: str = setting("/tmp/rahf-few", "folder of the stages, one folder a seed, reused")


def measure(out, seed):
    """{method: {pairs: tokens, judge greedy and at T = 1, held-out distance}} of one seed."""
    world, found = toy.ensure(toy.Config(out=str(out), seed=seed)), {}
    tokenizer, model = load_tokenizer(world["model"]), load_model(world["model"], torch.float32, "cpu")
    pairs = data.prepare(world["data"], ("test",), tokenizer, 256, seed)["test"]
    for method, stage, folder in (("scit", scit, "adapter"), ("dual", dual, "good")):
        if not (out / method / folder).is_dir():
            quietly(stage, out=str(out), seed=seed)
        found[method] = {}
        for count in PAIRS:
            quietly(collect, out=str(out), method=method, limit=count)
            quietly(align, out=str(out), method=method)
            collected, aligned = read_stage(out / method / "collect", "collect", ""), read_stage(out / method / "align", "align", "")
            adapter = LoRA(model.base_model, factors=load_adapter(out / method / "align", model.base_model)).eval()
            report, _ = score_model(model, adapter, tokenizer, pairs, "plain", {"judge": load_judge("toy:judge")}, 64, 64, seed)
            adapter.remove()
            end, start = (sum(aligned[f"distance_{when}"]) for when in ("end", "start"))
            found[method][count] = {"tokens": collected["tokens_train"], "greedy": report["judge_greedy"], "sampled": report["judge_sampled"], "distance": end / start}
            print(f"seed {seed} {method} {count} pairs: {found[method][count]}", flush=True)
    return found


def markdown(seeds):
    """The README's table: means over the seeds."""
    lines = ["| pairs of 600 | tokens | SCIT greedy, T = 1 | distance left | DUAL greedy, T = 1 | distance left |", "|---|---|---|---|---|---|"]
    for count in map(str, PAIRS):
        def mean(method, key):
            return sum(seed[method][count][key] for seed in seeds.values()) / len(seeds)
        lines.append(f"| {count} | {mean('scit', 'tokens'):,.0f} | " + " | ".join(
            f"{mean(m, 'greedy'):.2f}, {mean(m, 'sampled'):.2f} | {mean(m, 'distance'):.2f}" for m in ("scit", "dual")) + " |")
    return "\n".join(lines)


def main(config):
    seeds = json.loads(json.dumps({seed: measure(Path(config.work) / f"seed{seed}", seed) for seed in config.seeds}))
    print(markdown(seeds))
    write_json(Path(__file__).parent / "results" / "few_tokens.json", {
        "command": "python " + " ".join(sys.argv), "machine": f"{torch.get_num_threads()} threads", "versions": versions(), "seeds": seeds})


if __name__ == "__main__":
    run(main, Config)
