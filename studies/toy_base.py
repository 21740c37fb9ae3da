"""Would Muon train the toy's base in less time than AdamW, to the same quality?

    python -m studies.toy_base --steps 900
    python -m studies.toy_base --steps 1800 --optimizers AdamW
    python -m studies.toy_base --steps 450 --optimizers "Muon, lr 0.01" "Muon, lr 0.02"

Trains the base of common.toy with both optimizers for some numbers of steps and writes, run by run,
the mean NLL of a reply token on fresh documents and the seconds to studies/results/toy_base.json; a
later call goes on with what is missing.

torch.optim.Muon orthogonalizes its updates in bfloat16, which a CPU without such instructions
multiplies tens of times slower. So Muon's runs do the same in float32, and what an update of either
costs is measured apart.
"""

import json
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from tqdm import tqdm

from common import toy
from common.config import UserError, run, setting
from common.data import collate, shuffled_batches
from studies.shared import RESULTS, write_result

# peak learning rate of the matrices; None is that of all weights in common.toy
OPTIMIZERS = {"AdamW": None, "Muon, lr 0.01": 0.01, "Muon, lr 0.02": 0.02, "Muon, lr 0.05": 0.05}


@dataclass
class Config:
    steps: list[int] = setting(None, "numbers of steps; empty takes 900")
    optimizers: list[str] = setting(None, f"of {', '.join(OPTIMIZERS)}; empty takes all")
    seeds: list[int] = setting(None, "seeds of the world; empty takes 0")
    documents: int = setting(2000, "fresh documents to measure on", minimum=1)


def in_float32():
    """Within the context torch.optim.Muon's cast to bfloat16 is one to float32."""
    return mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float)


def make_optimizers(model, adamw_lr, muon_lr):
    """AdamW alone, or Muon for the matrices of the blocks and AdamW for all else."""
    adamw = {"lr": adamw_lr, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    if muon_lr is None:
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if ".layers." not in name or p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=muon_lr), torch.optim.AdamW(rest, **adamw)]


class World:
    """Documents to train on, and fresh ones to measure on, of one seed."""

    def __init__(self, seed, n_fresh):
        self.config = toy.Config(seed=seed)
        rng = random.Random(seed)
        requests = toy.split_requests(self.config.kinds.split(","), seed)
        docs = list(toy.documents(requests, self.config.documents, rng))
        fresh = list(toy.documents(requests, n_fresh, random.Random(f"fresh {seed}")))
        texts = [prompt + reply for prompt, reply in docs]
        self.tokenizer = toy.train_tokenizer([*texts, toy.POSITIVE, toy.NEGATIVE])
        self.train = toy.tokenize_documents(self.tokenizer, docs)
        self.fresh = toy.tokenize_documents(self.tokenizer, fresh)

    def batch(self, examples):
        return collate(examples, self.tokenizer.pad_token_id, torch.device("cpu"))

    @torch.no_grad()
    def nll(self, model):
        """Mean NLL of a reply token of the fresh documents, in nats."""
        total = tokens = 0
        for start in range(0, len(self.fresh), 100):
            batch = self.batch(self.fresh[start : start + 100])
            n = batch.response.sum().item()
            total += toy.document_loss(model, batch, prompt_weight=0.0).item() * n
            tokens += n
        return total / tokens


def train(world, steps, muon_lr):
    """Train a base. Returns it and the seconds."""
    config = world.config
    torch.manual_seed(config.seed)
    model = toy.make_base(config, world.tokenizer)
    optimizers = make_optimizers(model, config.lr, muon_lr)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            optimizer.param_groups[0]["lr"],
            total_steps=steps,
            pct_start=0.1,
            # as in common.toy; a group of Muon's has no betas to cycle
            cycle_momentum=muon_lr is None,
        )
        for optimizer in optimizers
    ]
    batches = shuffled_batches([len(ids) for ids, _ in world.train], 32, config.seed)
    start = time.perf_counter()
    for _ in tqdm(range(steps), unit="step"):
        batch = world.batch([world.train[i] for i in next(batches)])
        toy.document_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
    return model, time.perf_counter() - start


def time_updates(world, n=5):
    """Milliseconds of the optimizers' part of a step: AdamW, Muon, Muon in float32."""
    times = {}
    for name, muon_lr, context in (
        ("AdamW", None, nullcontext()),
        ("Muon", 0.01, nullcontext()),
        ("Muon in float32", 0.01, in_float32()),
    ):
        model = toy.make_base(world.config, world.tokenizer)
        optimizers = make_optimizers(model, world.config.lr, muon_lr)
        toy.document_loss(model, world.batch(world.train[:32])).backward()
        with context:
            for i in range(n + 1):
                if i == 1:
                    # the first call allocates
                    start = time.perf_counter()
                for optimizer in optimizers:
                    optimizer.step()
        times[name] = round(1000 * (time.perf_counter() - start) / n, 1)
    return times


def markdown(runs):
    """A table of the runs, with their seconds as shares of the slowest AdamW's."""
    whole = max(line["seconds"] for line in runs if line["optimizer"] == "AdamW")
    table = ["| optimizer | steps | NLL of a reply token | seconds |", "|---|---|---|---|"]
    for line in sorted(runs, key=lambda line: (line["optimizer"], line["steps"])):
        share = line["seconds"] / whole
        table.append(
            f"| {line['optimizer']} | {line['steps']:,} | {line['nll']:.3f} | "
            f"{line['seconds']} ({share:.2f}) |"
        )
    return "\n".join(table)


def main(config):
    if unknown := set(config.optimizers or []) - set(OPTIMIZERS):
        raise UserError(f"--optimizers {min(unknown)}: choose from {', '.join(OPTIMIZERS)}")
    path = RESULTS / "toy_base.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs = found.get("runs", [])
    times = found.get("ms of an update")
    for seed in config.seeds or [0]:
        world = World(seed, config.documents)
        times = times or time_updates(world)
        for name in config.optimizers or OPTIMIZERS:
            for steps in config.steps or [900]:
                key = {
                    "optimizer": name,
                    "steps": steps,
                    "seed": seed,
                    "documents": config.documents,
                }
                if any(key.items() <= line.items() for line in runs):
                    continue
                with in_float32():
                    model, seconds = train(world, steps, OPTIMIZERS[name])
                runs.append({**key, "nll": round(world.nll(model), 4), "seconds": round(seconds)})
                print(runs[-1], flush=True)
                write_result("toy_base", {"ms of an update": times, "runs": runs})


if __name__ == "__main__":
    run(main, Config)
