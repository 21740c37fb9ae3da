"""The embedded default over seeds: both methods, preferred-SFT, an α sweep, and controls.

    python -m studies.embedded --sweep False --name embedded_default
                       the defaults of all stages
    python -m studies.embedded --name embedded --collect '{"layers": ["middle"]}'
                       the paper's form: some middle layers, one α; sweep and controls
    python -m studies.embedded --split valid
                       validation pairs, to choose settings; writes nothing without --name

A control changes the recorded states and nothing else: h+ and h- swapped; v permuted across tokens
(the v of a layer keep their lengths and directions, but stand at other tokens), with or without
their mean; and α = -0.5. Writes studies/results/NAME.json.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

import align
import collect
import dual
import scit
from common import toy
from common.config import run, setting
from common.stages import read_stage, write_stage
from studies.shared import World, quietly, write_result

ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0)
FIGURES = (
    "judge_greedy",
    "judge_sampled",
    "preference_accuracy",
    "own_nll_under_base",
    "repeated_ngrams",
    "mean_length",
)

# The models of stage 1: {method: {name: (folder, prompt)}}.
STAGE1 = {
    "scit": {
        "scit_plus": ("scit/adapter", "positive"),
        "scit_minus": ("scit/adapter", "negative"),
        "scit_plain": ("scit/adapter", "plain"),
    },
    "dual": {"preferred_sft": ("dual/good", "plain"), "bad": ("dual/bad", "plain")},
}


@dataclass
class Config:
    split: Literal["valid", "test"] = setting("test", "pairs that the figures are from")
    methods: str = setting("scit,dual", "methods to measure")
    sweep: bool = setting(True, "also run the α sweep and the controls")
    alphas: list[float] | None = setting(
        None, f"α of the sweep; empty takes {' '.join(f'{alpha:g}' for alpha in ALPHAS)}"
    )
    collect: str = setting("{}", "other settings of collect.py, as JSON")
    align: str = setting("{}", "other settings of align.py, as JSON")
    seeds: list[int] | None = setting(
        None, "seeds of world, base and stages; empty takes 0 1 2", group="run"
    )
    work: str = setting(
        "/tmp/rahf-results", "folder of the stages, one folder a seed, reused", group="run"
    )
    name: str | None = setting(None, "write studies/results/NAME.json", group="run")


# ---------------------------------------------------------------- controls


def swapped(plus, minus, generator):
    return minus, plus


def permuted(plus, minus, generator):
    v = plus - minus
    return minus + v[torch.randperm(len(v), generator=generator)], minus


def permuted_centred(plus, minus, generator):
    # the mean of v, which all tokens share, would survive the permutation
    v = plus - minus
    v = v - v.mean(0)
    return minus + v[torch.randperm(len(v), generator=generator)], minus


def change_collection(source, target, change):
    """Copy a collect folder with its plus and minus states passed through `change`."""
    manifest = read_stage(source, "collect", "python collect.py")
    with write_stage(target, "collect", manifest) as new:
        for name in [*manifest["shards"], *manifest["validation_shards"]]:
            tensors = load_file(source / name)
            generator = torch.Generator().manual_seed(0)
            for layer in manifest["settings"]["layers"]:
                states = (tensors[f"plus.{layer}"], tensors[f"minus.{layer}"])
                plus, minus = change(*states, generator)
                tensors[f"plus.{layer}"] = plus.contiguous()
                tensors[f"minus.{layer}"] = minus.contiguous()
            save_file(tensors, new / name)
        if (source / "base_adapter").exists():
            shutil.copytree(source / "base_adapter", new / "base_adapter")


# ---------------------------------------------------------------- measuring


def selected_figures(report):
    return {name: round(report[name], 4) for name in FIGURES}


def measure_method(config, world, method, seconds):
    """Collect, then align in all ways. Returns {name: figures}; adds to seconds."""
    collect_settings, align_settings = json.loads(config.collect), json.loads(config.align)
    out = world.out
    collection = out / method / "collect"
    figures = {}

    def measure(name, folder=out, **settings):
        settings = {**align_settings, **settings}
        seconds[f"align {method}"] = quietly(align, out=str(folder), method=method, **settings)
        adapter = folder / method / "align"
        manifest = read_stage(adapter, "align", "python align.py")
        row = selected_figures(world.score(adapter.relative_to(out)))
        row["distance"] = [manifest["distance_start"], manifest["distance_end"]]
        figures[f"{method}_{name}"] = row
        print(f"seed {world.seed} {method} {name}: {row}", flush=True)

    seconds[f"collect {method}"] = quietly(collect, out=str(out), method=method, **collect_settings)
    if config.sweep:
        for alpha in [*(config.alphas or ALPHAS), -0.5]:
            measure(f"alpha_{alpha:g}", alpha=alpha)
        for change in (swapped, permuted, permuted_centred):
            folder = out / change.__name__
            change_collection(collection, folder / method / "collect", change)
            measure(change.__name__, folder)
    # last: this adapter stays
    measure("aligned")
    manifest = read_stage(collection, "collect", "python collect.py")
    ratios = [v / h for v, h in zip(manifest["norm_v"], manifest["norm_b"])]
    figures[f"{method}_collect"] = {
        "|v|/|h|": [round(ratio, 4) for ratio in ratios],
        "layers": manifest["settings"]["layers"],
    }
    return figures


def measure_seed(config, seed):
    """All figures of one seed."""
    out = Path(config.work) / f"seed{seed}"
    seconds = {}
    if not (out / "scit" / "adapter").is_dir():
        toy.ensure_world(toy.Config(out=str(out), seed=seed))
        seconds["scit"] = quietly(scit, out=str(out), seed=seed)
        seconds["dual"] = quietly(dual, out=str(out), seed=seed)
    world = World(out, seed, config.split)
    figures = {"base": selected_figures(world.score())}
    for method in config.methods.split(","):
        for name, (folder, prompt) in STAGE1[method].items():
            figures[name] = selected_figures(world.score(folder, prompt))
        figures |= measure_method(config, world, method, seconds)
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    return {"figures": figures, "pairs": len(world.pairs), "seconds": rounded}


def print_figures(seeds):
    """Print the judge's scores and the preference accuracy of each model, a column a seed."""
    rows = [seed["figures"] for seed in seeds.values()]
    for name in rows[0]:
        if name.endswith("_collect"):
            continue
        line = f"{name:>22}"
        for key in ("judge_greedy", "judge_sampled", "preference_accuracy"):
            line += f"   {key} " + " ".join(f"{row[name][key]:.2f}" for row in rows)
        print(line)


def main(config):
    seeds = {seed: measure_seed(config, seed) for seed in config.seeds or (0, 1, 2)}
    print_figures(seeds)
    if config.name:
        settings = {name: getattr(config, name) for name in ("split", "align", "collect")}
        write_result(config.name, {"settings": settings, "seeds": seeds})


if __name__ == "__main__":
    run(main, Config)
