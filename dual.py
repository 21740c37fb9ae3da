"""Stage 1b, DUAL: two models, one that answers well and one that answers badly (paper section 3.1).

    python dual.py                                       the embedded default
    python dual.py --model PATH_OR_HUB_NAME --data pairs.jsonl --steps 500 --lr 2e-4

Maximum likelihood on the chosen responses gives the "good" model, on the rejected ones the "bad":

    loss(good) = -Σ log π_good(r_h | q) / tokens        loss(bad) = -Σ log π_bad(r_l | q) / tokens

Unlike in the paper, they are two LoRA adapters over one base model, which is in memory once. The
good model is preferred-SFT, the usual baseline. Writes OUT/dual/good and OUT/dual/bad, the input
of collect.py.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from common import toy
from common.checkpoint import LOG_INTERVAL, Checkpoint, remove_checkpoints
from common.config import SourceSettings, TrainingDiverged, TrainingSettings, run, setting
from common.data import collate, sample, shuffled_batches, split_into_passes
from common.hf import response_logprobs
from common.stage1 import prepare_stage1
from common.stages import claim, next_command, open_log, write_stage
from common.training import cosine_with_warmup, memory_summary, progress_bar
from lora import LoRA, enable_only, save_adapter

# at most this many validation pairs are measured
VALIDATION_PAIRS = 64


@dataclass
class Config(SourceSettings, TrainingSettings):
    """The settings of this stage. Those that it shares with others are in common/config.py."""

    embedded_default = toy.DUAL

    steps: int = setting(150, "optimizer steps of each model", minimum=1)
    batch_size: int = setting(16, "responses in a step", minimum=1)
    lr: float = setting(2e-3, "peak learning rate: 10% warm-up, then a cosine to 0", minimum=0)


def response_nll(model, pairs, response, pad_id):
    """-Σ log π(r_t | q, r_<t) over the response tokens of the pairs, and how many tokens these are.

    pairs: list of EncodedPair; response: "chosen" or "rejected". Returns two scalars.
    """
    examples = [pair.example("plain", response) for pair in pairs]
    logprobs, mask = response_logprobs(model, collate(examples, pad_id, model.device))
    return -logprobs.sum(), mask.sum()


@torch.no_grad()
def validation_nll(model, pairs, response, pad_id, tokens_per_pass):
    """The NLL per token of some pairs' responses."""
    lengths = [pair.length("plain", response) for pair in pairs]
    total = tokens = 0
    for part in split_into_passes(range(len(pairs)), lengths, tokens_per_pass):
        nll, count = response_nll(model, [pairs[i] for i in part], response, pad_id)
        total, tokens = total + nll, tokens + count
    return (total / tokens).item()


def train(name, response, adapter, inputs, config, log):
    """Train the adapter of one model, "good" or "bad", on the chosen or the rejected responses."""
    model, pairs, pad_id = inputs.model, inputs.pairs["train"], inputs.tokenizer.pad_token_id
    lengths = [pair.length("plain", response) for pair in pairs]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(config.steps))
    checkpoint = Checkpoint(
        Path(config.out) / "dual" / f".checkpoint-dual-{name}",
        config,
        inputs.depends_on,
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
    )
    batches = shuffled_batches(lengths, config.batch_size, config.seed, skip=checkpoint.step)
    bar = progress_bar(f"dual {name}", checkpoint.step, config.steps)
    adapter.train()
    with checkpoint:
        for step in bar:
            batch = next(batches)
            tokens = sum(len(pairs[i].responses[response]) for i in batch)
            loss = 0.0
            for part in split_into_passes(batch, lengths, config.tokens_per_pass):
                nll, _ = response_nll(model, [pairs[i] for i in part], response, pad_id)
                part_loss = nll / tokens
                part_loss.backward()
                loss += part_loss.detach()
            clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % LOG_INTERVAL == 0 or step == config.steps:
                bar.set_postfix(loss=f"{loss:.3f}")
                line = {"adapter": name, "step": step, "loss": loss.item()}
                print(json.dumps({**line, "lr": schedule.get_last_lr()[0]}), file=log)
            checkpoint.after_step(step, loss)
    adapter.eval()


def main(config):
    folder = Path(config.out) / "dual"
    with claim(folder / "good", folder / "bad"):
        # 1. pairs, base model and two adapters
        inputs = prepare_stage1(config)
        model, tokenizer, pairs = inputs.model, inputs.tokenizer, inputs.pairs
        trunk = model.base_model
        adapters = {}
        for name in ("good", "bad"):
            adapters[name] = LoRA(
                trunk,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_targets,
            )
        example, _ = pairs["train"][0].example("plain", "chosen")
        print(f"one input: {tokenizer.decode(example)!r}")
        lengths = [pair.length("plain", "chosen") for pair in pairs["train"]]
        print(
            f"{memory_summary(model, *adapters.values())}; twice {config.steps} steps of "
            f"{config.batch_size} responses of {sum(lengths) / len(lengths):.0f} tokens on average"
        )

        # 2. train one after the other
        valid = sample(pairs["valid"], VALIDATION_PAIRS, config.seed)
        results = {}
        with open_log(folder, "dual") as log:
            for name, response in (("good", "chosen"), ("bad", "rejected")):
                measure = functools.partial(
                    validation_nll,
                    model,
                    valid,
                    response,
                    tokenizer.pad_token_id,
                    config.tokens_per_pass,
                )
                with enable_only(adapters.values(), adapters[name]):
                    nll_start = measure()
                    try:
                        train(name, response, adapters[name], inputs, config, log)
                    except TrainingDiverged:
                        # with another --lr neither model can resume
                        remove_checkpoints(folder, "dual")
                        raise
                    results[name] = {"nll_start": nll_start, "nll_end": measure()}

        # 3. save
        for name, adapter in adapters.items():
            manifest = {**inputs.manifest, "validation": results[name]}
            with write_stage(folder / name, name, manifest) as new:
                model_name = inputs.settings["model"]
                save_adapter(new, adapter.weights(), trunk, model_name, config.lora_dropout)
            start, end = results[name]["nll_start"], results[name]["nll_end"]
            print(f"wrote {folder / name}; validation NLL per token {start:.3f} -> {end:.3f}")
        remove_checkpoints(folder, "dual")
    print(next_command("collect.py", config.out))


if __name__ == "__main__":
    run(main, Config)
