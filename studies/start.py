"""What does align.py's training add to arithmetic with stage 1's weights?

    python dual.py --model out/smollm2 --data studies/pairs/sentiment-0.jsonl.gz --out out/real
    python collect.py --out out/real
    python -m studies.start --out out/real

To first order base + α (good - bad) has the hidden states that align.py trains for. Distances of
validation states to the target b + α (h+ - h-), in all target layers: of the base, of this sum, of
the sum cut to the rank of align's LoRA, and of the adapter trained from nothing and from the cut
sum. Before them, what rounding has to do with it: the distance of the base to the b that was
recorded. Run `collect.py --compute-dtype bfloat16` and this again, and the same distances to a
target that is computed in bfloat16 become a second column. Writes studies/results/start.json.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import align
from common.config import run, setting
from common.hf import (
    choose_device,
    choose_tokens_per_pass,
    load_tokenizer,
    load_trunk,
    model_digest,
)
from lora import AdapterWeights, LoRA, load_adapter
from studies.shared import measured_before, weight_difference, write_result


@dataclass
class Config:
    out: str = setting("out/real", "folder of dual.py and collect.py")
    strength: float = setting(align.STRENGTH, "ρ of the target")
    steps: int = setting(align.DEFAULTS["steps"], "steps of both trainings", minimum=1)


def cut_to_rank(weights, rank):
    """The AdapterWeights of the best approximation of each s B A of a given rank: its largest
    singular values. They are shared out evenly between A and B."""
    tensors = {}
    for name, (A, B) in weights.tensors.items():
        # B A = Q_B (R_B R_A^T) Q_A^T: the singular values are those of a small matrix
        Q_A, R_A = torch.linalg.qr(A.T)
        Q_B, R_B = torch.linalg.qr(B * (weights.alpha / weights.rank))
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        root = S[:rank].sqrt()
        tensors[name] = (root[:, None] * (Vh[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * root)
    # scale 1
    return AdapterWeights(tensors, rank, alpha=rank)


class Study:
    """The collection of a run, its trunk, and the target."""

    def __init__(self, config):
        device = choose_device("cpu")
        settings = align.Config(out=config.out, method="dual", strength=config.strength)
        settings.steps = config.steps
        self.manifest = manifest = align.complete_settings(settings)
        settings.tokens_per_pass = choose_tokens_per_pass(None, device)
        settings.backend = "torch"
        self.settings, self.folder = settings, Path(config.out) / "dual"
        self.alpha = align.choose_alpha(settings, manifest["ratio"])
        pad_id = load_tokenizer(settings.model).pad_token_id
        self.collection, self.validation = (
            align.open_collection(self.folder / "collect", manifest, key, settings.layers, pad_id)
            for key in ("shards", "validation_shards")
        )
        n_blocks, dtype = settings.layers[-1] + 1, manifest["settings"]["dtype"]
        self.trunk = load_trunk(settings.model, n_blocks, dtype, device)

    def distance(self, adapter, alpha):
        """Mean distance of the validation states to the target at an α."""
        distances = align.validation_distances(
            self.trunk, adapter, self.validation, alpha, self.settings
        )
        return sum(distances) / len(distances)

    def measure(self, weights, alpha=None):
        """The distance with some AdapterWeights, None: of the base. At α 0 the target is the b that
        was recorded: the base's distance is a rounding error."""
        alpha = self.alpha if alpha is None else alpha
        adapter = LoRA(self.trunk, weights=weights).eval()
        distance = self.distance(adapter, alpha)
        adapter.remove()
        return {"distance": distance, "alpha": alpha}

    def train(self, weights=None):
        """Train an adapter, from weights or from nothing. Returns the distance at the end, α, and
        the losses {step: loss}."""
        torch.manual_seed(self.settings.seed)
        adapter = LoRA(self.trunk, weights=weights)
        losses = {}

        def write_line(line):
            losses[line["step"]] = line["loss"]

        path = self.folder / ".checkpoint-start"
        path.unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            target = (self.trunk, adapter, self.collection, self.alpha)
            align.train(*target, self.settings, path, {}, write_line)
        path.unlink(missing_ok=True)
        distance = self.distance(adapter, self.alpha)
        adapter.remove()
        return {"distance": distance, "alpha": self.alpha, "losses": losses}


def table(runs):
    """The distances of all runs as a table in markdown. runs: {what collect computed in: {what is
    measured: figures}}."""
    columns = " | ".join(f"collected in {dtype}" for dtype in runs)
    lines = [f"| | {columns} |", "|---" * (len(runs) + 1) + "|"]
    for name in next(iter(runs.values())):
        distances = [f"{figures[name]['distance']:.2f}" for figures in runs.values()]
        lines.append(f"| {name} | {' | '.join(distances)} |")
    return "\n".join(lines)


def main(config):
    study = Study(config)
    good, bad = (load_adapter(study.folder / name, study.trunk) for name in ("good", "bad"))
    total = weight_difference(good, bad, study.alpha)
    cut = cut_to_rank(total, study.settings.lora_rank)
    policies = {"base": None, "base + α (good - bad)": total, "the same, cut": cut}
    measures = {"rounding of b": partial(study.measure, None, alpha=0.0)}
    for name, weights in policies.items():
        measures[name] = partial(study.measure, weights)
    measures["trained from nothing"] = study.train
    measures["trained from the cut sum"] = partial(study.train, cut)
    collected = study.manifest["settings"]
    settings = {"strength": config.strength, "steps": config.steps, "layers": study.settings.layers}
    settings |= {"model": model_digest(collected["model"])[:12], "dtype": collected["dtype"]}
    settings["adapters"] = study.manifest["adapters"]
    figures = {}
    for name, measure in measures.items():
        figures[name] = measure()
        print(f"{name}: distance {figures[name]['distance']:.3f}", flush=True)
    runs = measured_before("start", settings, "collected in")
    runs[collected["compute_dtype"]] = figures
    write_result("start", {"settings": settings, "collected in": runs})
    print(table(runs))


if __name__ == "__main__":
    run(main, Config)
