"""The embedded default measured: both methods, preferred-SFT, the paper's form with its α sweep, and the controls, over seeds.

    python tests/results.py --split valid --seeds 0 1 2                                          to choose settings
    python tests/results.py --name embedded --collect '{"layers": ["middle"]}'                   the paper's form: sweep and controls

A control changes the collected states and nothing else: h+ and h- swapped; v permuted across tokens (each
layer's v keep their lengths and directions but sit at other tokens), as they are or less their mean; α = -0.5.
"""
import contextlib
import io
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file

import align
import collect
import data
import dual
import scit
import toy
from files import new_stage, read_stage, run, setting, versions, write_json
from lora import LoRA, load_adapter
from model import load_model, load_tokenizer
from score import load_judge, score_model

ALPHAS = [0.0, 0.25, 0.5, 1.0, 2.0, 5.0]
FIGURES = ("judge_greedy", "judge_sampled", "preference_accuracy", "own_nll_under_base", "repeated_ngrams", "mean_length")


@dataclass
class Config:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of world, base and stages"})
    split: Literal["valid", "test"] = setting("test", "pairs that the figures are from")
    work: str = setting("/tmp/rahf-results", "folder of the stages, one folder a seed, reused")
    name: str | None = setting(None, "write tests/results/NAME.json")
    alphas: list[float] = field(default_factory=lambda: list(ALPHAS), metadata={"help": "α of the sweep"})
    sweep: bool = setting(True, "run the α sweep and the controls too")
    methods: str = setting("scit,dual", "methods to measure")
    align: str = setting("{}", "other settings of align.py, as JSON")
    collect: str = setting("{}", "other settings of collect.py, as JSON")


def quietly(stage, **settings):
    """Run a stage with its words hidden; seconds."""
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stage.main(stage.Config(**settings))
    return time.time() - start


def changed(source, target, change):
    """A copy of a collect folder with its plus and minus states passed through `change`."""
    record = read_stage(source, "collect", "")
    with new_stage(target, "collect", {k: v for k, v in record.items() if k not in ("kind", "version", "made_by", "digests")}) as new:
        for name in [*record["shards"], *record["held_out"]]:
            tensors, generator = load_file(source / name), torch.Generator().manual_seed(0)
            for layer in record["settings"]["layers"]:
                plus, minus = tensors[f"plus.{layer}"], tensors[f"minus.{layer}"]
                tensors[f"plus.{layer}"], tensors[f"minus.{layer}"] = (x.contiguous() for x in change(plus, minus, generator))
            save_file(tensors, new / name)
        for path in source.glob("base_adapter/*"):
            (new / "base_adapter").mkdir(exist_ok=True)
            (new / "base_adapter" / path.name).write_bytes(path.read_bytes())


def swapped(plus, minus, generator):
    return minus, plus


def permuted(plus, minus, generator):
    return minus + (plus - minus)[torch.randperm(len(plus), generator=generator)], minus


def permuted_centred(plus, minus, generator):
    v = plus - minus                          # what all tokens share, the mean of v, survives a permutation: take it out
    return minus + (v - v.mean(0))[torch.randperm(len(v), generator=generator)], minus


def measure(config, seed):
    """Every figure of one seed."""
    out, seconds = Path(config.work) / f"seed{seed}", {}
    if not (out / "scit" / "adapter").is_dir():
        start = time.time()
        toy.ensure(toy.Config(out=str(out), seed=seed))
        seconds["toy"] = time.time() - start
        seconds["scit"] = quietly(scit, out=str(out), seed=seed)
        seconds["dual"] = quietly(dual, out=str(out), seed=seed)
    world = toy.ensure(toy.Config(out=str(out), seed=seed))
    tokenizer, model = load_tokenizer(world["model"]), load_model(world["model"], torch.float32, "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        pairs = data.prepare(world["data"], (config.split,), tokenizer, 256, seed)[config.split]

    def figures(folder, prompt="plain"):
        adapter = LoRA(model.base_model, factors=load_adapter(folder, model.base_model)).eval() if folder else None
        report, _ = score_model(model, adapter, tokenizer, pairs, prompt, {"judge": load_judge("toy:judge")}, 64, 64, seed)
        if adapter:
            adapter.remove()
        return {name: round(report[name], 4) for name in FIGURES}
    found = {"base": figures(None)}
    for method in config.methods.split(","):
        if method == "scit":
            found |= {f"scit_{prompt}": figures(out / "scit" / "adapter", kind)
                      for prompt, kind in (("plus", "positive"), ("minus", "negative"), ("plain", "plain"))}
        else:
            found |= {"preferred_sft": figures(out / "dual" / "good"), "bad": figures(out / "dual" / "bad")}
        seconds[f"collect {method}"] = quietly(collect, out=str(out), method=method, **json.loads(config.collect))
        folder = out / method / "collect"

        def aligned(name, at=out, **settings):
            seconds[f"align {method}"] = quietly(align, out=str(at), method=method, **{**json.loads(config.align), **settings})
            found[f"{method}_{name}"] = figures(at / method / "align")
            found[f"{method}_{name}"]["distance"] = [read_stage(at / method / "align", "align", "")[f"distance_{when}"] for when in ("start", "end")]
            print(f"seed {seed} {method} {name}: {found[f'{method}_{name}']}", flush=True)
        for alpha in config.alphas if config.sweep else ():
            aligned(f"alpha_{alpha:g}", alpha=[alpha])
        if config.sweep:
            aligned("alpha_-0.5", alpha=[-0.5])
            for change in (swapped, permuted, permuted_centred):
                changed(folder, out / change.__name__ / method / "collect", change)
                aligned(change.__name__, at=out / change.__name__)
        aligned("aligned")                                        # last: this adapter stays
        record = read_stage(folder, "collect", "")
        found[f"{method}_collect"] = {"|v|/|h|": [round(v / h, 4) for v, h in zip(record["norm_v"], record["norm_h"])], "layers": record["settings"]["layers"]}
    return {"figures": found, "pairs": len(pairs), "seconds": {k: round(v, 1) for k, v in seconds.items()}}


def main(config):
    seeds = {seed: measure(config, seed) for seed in config.seeds}
    for name in seeds[config.seeds[0]]["figures"]:
        rows = [seeds[seed]["figures"][name] for seed in seeds]
        if "judge_greedy" in rows[0]:
            print(f"{name:>16}  greedy " + " ".join(f"{r['judge_greedy']:.2f}" for r in rows) + "   T=1 " + " ".join(f"{r['judge_sampled']:.2f}" for r in rows)
                  + "   accuracy " + " ".join(f"{r['preference_accuracy']:.2f}" for r in rows))
    if config.name:
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown") if os.path.exists("/proc/cpuinfo") else "unknown"
        write_json(Path(__file__).parent / "results" / f"{config.name}.json", {
            "command": "python " + " ".join(sys.argv), "machine": f"{torch.get_num_threads()} threads, {cpu}", "versions": versions(),
            "settings": {"split": config.split, "align": config.align, "collect": config.collect}, "seeds": seeds})


if __name__ == "__main__":
    run(main, Config)
