"""Stage 1, DUAL: two models, one that answers well and one that answers badly (paper section 3.1).

    python dual.py                                       the embedded default (there γ = 0)
    python dual.py --model PATH_OR_HUB_NAME --data pairs.jsonl
    python dual.py --model PATH_OR_HUB_NAME --data pairs.jsonl --contrast 0     as in the paper

Maximum likelihood on the chosen responses gives the "good" model, on the rejected ones the "bad".
The contrast adds what likelihood alone does not say, the difference within a pair: the log-ratio x
of the two models should rank its two responses:

    loss = -Σ log π_good(r_h | q) / tokens - Σ log π_bad(r_l | q) / tokens
           + γ · mean over pairs of softplus(-β (x(r_h) - x(r_l)))
    x(r) = log π_good(r | q) - log π_bad(r | q)

The contrast is ours (γ = --contrast, 0 is the paper); it is DPO's loss with the bad model in the
place of the reference. Unlike in the paper, the two models are LoRA adapters over one base model,
which is in memory once. With γ = 0 the good model is preferred-SFT, the usual baseline. Writes
OUT/dual/good and OUT/dual/bad, the input of collect.py.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from common import toy
from common.checkpoint import Checkpoint, remove_checkpoints
from common.config import SourceSettings, TrainingSettings, run, setting
from common.data import RESPONSES, collate, sample, shuffled_batches, split_into_passes
from common.distributed import is_first, leave, share_of, sum_gradients
from common.hf import response_logprobs
from common.log import TrainingLog, open_log
from common.score import reward_metrics
from common.stage1 import prepare_stage1
from common.stages import claim, next_command, write_stage
from common.training import (
    cosine_with_warmup,
    memory_summary,
    parameters_run,
    progress_bar,
)
from lora import LoRA, enable_only, save_adapter

# at most this many validation pairs are measured
VALIDATION_PAIRS = 64


@dataclass
class Config(SourceSettings, TrainingSettings):
    """The settings of this stage. Those that it shares with others are in common/config.py."""

    embedded_default = toy.DUAL
    embedded_later = toy.LATER

    steps: int = setting(60, "optimizer steps", minimum=1)
    batch_size: int = setting(8, "pairs in a step", minimum=1)
    lr: float = setting(5e-4, "peak learning rate: 10% warm-up, then a cosine to 0", minimum=0)
    contrast: float = setting(1.0, "γ, the weight of the contrast; 0 is the paper", minimum=0)
    beta: float = setting(0.1, "β of the contrast, as in DPO", minimum=0)


def sum_logprobs(model, pairs, responses, pad_id):
    """Σ_t log π(r_t | q, r_<t) of the n pairs' responses: [len(responses), n]. responses: some of
    RESPONSES."""
    inputs = [pair.input("plain", r) for r, pair in itertools.product(responses, pairs)]
    logprobs, _ = response_logprobs(model, collate(inputs, pad_id, model.device))
    return logprobs.sum(1).view(len(responses), len(pairs))


def contrast_loss(good, bad, beta):
    """Σ softplus(-β (x(r_h) - x(r_l))) over n pairs, where x = log π_good - log π_bad.

    good, bad: [2, n], log π of the chosen and the rejected responses.
    """
    x_chosen, x_rejected = good - bad
    return F.softplus(-beta * (x_chosen - x_rejected)).sum()


def dual_loss(model, name, pairs, other_logprobs, pad_id, config):
    """The parts of DUAL's loss that one of the models has a gradient of, for n pairs.

    name: "good" or "bad", whose adapter is enabled. other_logprobs: [2, n], the other model's log π
    of the chosen and the rejected responses, a constant; None without contrast. Returns two
    scalars, the NLL summed over the model's own responses and the contrast summed over the pairs,
    and the model's log π [2, n], detached (None without contrast).
    """
    own = {"good": "chosen", "bad": "rejected"}[name]
    if other_logprobs is None:
        logprobs = sum_logprobs(model, pairs, [own], pad_id)
        return -logprobs.sum(), logprobs.new_zeros(()), None
    logprobs = sum_logprobs(model, pairs, RESPONSES, pad_id)
    good, bad = logprobs, other_logprobs
    if name == "bad":
        good, bad = bad, good
    contrast = contrast_loss(good, bad, config.beta)
    return -logprobs[RESPONSES.index(own)].sum(), contrast, logprobs.detach()


@torch.no_grad()
def validate(model, adapters, pairs, pad_id, tokens_per_pass):
    """The NLL per token of the chosen responses under the good model, of the rejected ones under
    the bad model, and how often their log-ratio ranks a pair right: ({"good": NLL, "bad": NLL},
    accuracy)."""
    lengths = [pair.max_length() for pair in pairs]
    right = 0
    nll = {"good": 0.0, "bad": 0.0}
    # two inputs a pair
    for part in split_into_passes(range(len(pairs)), lengths, tokens_per_pass // 2):
        some = [pairs[i] for i in part]
        logprobs = {}
        for name, adapter in adapters.items():
            with enable_only([adapter], among=adapters.values()):
                logprobs[name] = sum_logprobs(model, some, RESPONSES, pad_id)
        good, bad = logprobs["good"], logprobs["bad"]
        nll["good"] -= good[0].sum().item()
        nll["bad"] -= bad[1].sum().item()
        x_chosen, x_rejected = good - bad
        right += (x_chosen > x_rejected).sum().item()
    nll["good"] /= sum(len(pair.responses["chosen"]) for pair in pairs)
    nll["bad"] /= sum(len(pair.responses["rejected"]) for pair in pairs)
    return nll, right / len(pairs)


def train(adapters, inputs, config, write_line):
    """Train both adapters by DUAL's loss."""
    model, pairs, pad_id = inputs.model, inputs.pairs["train"], inputs.tokenizer.pad_token_id
    chosen_lengths = [pair.length("plain", "chosen") for pair in pairs]
    rejected_lengths = [pair.length("plain", "rejected") for pair in pairs]
    max_lengths = list(map(max, chosen_lengths, rejected_lengths))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(config.steps))
    checkpoint = Checkpoint(
        Path(config.out) / "dual" / ".checkpoint-dual",
        config,
        inputs.depends_on,
        adapter=adapters,
        optimizer=optimizer,
        schedule=schedule,
    )
    batches = shuffled_batches(chosen_lengths, config.batch_size, config.seed, skip=checkpoint.step)
    bar = progress_bar("dual", checkpoint.step, config.steps)
    # FLOPs per parameter and token: a forward and backward pass (4) in the good and in the bad
    # model, and one without gradient (2) in the bad one. Without contrast each response runs in
    # its own model only.
    flops_per_token = (10 if config.contrast else 4) * parameters_run(model)
    log = TrainingLog(write_line, bar, flops_per_token)
    adapters.train()
    with checkpoint:
        for step in bar:
            batch = next(batches)
            tokens = {
                "good": sum(len(pairs[i].responses["chosen"]) for i in batch),
                "bad": sum(len(pairs[i].responses["rejected"]) for i in batch),
            }
            loss, contrast = torch.zeros(2, device=model.device)
            # this process's share; the losses are divided by the counts of the whole batch
            share = share_of(batch)
            # two inputs a pair
            for part in split_into_passes(share, max_lengths, config.tokens_per_pass // 2):
                some = [pairs[i] for i in part]
                # One model after the other, so that only one has activations in memory; for each
                # the other's log π is a constant. No optimizer step lies between: the two gradients
                # are those of the whole loss (with dropout, up to its noise).
                logprobs = {"good": None, "bad": None}  # log π [2, n]; None without contrast
                if config.contrast:
                    with torch.no_grad(), enable_only([adapters["bad"]], among=adapters.values()):
                        logprobs["bad"] = sum_logprobs(model, some, RESPONSES, pad_id)
                for name, other in (("good", "bad"), ("bad", "good")):
                    with enable_only([adapters[name]], among=adapters.values()):
                        nll, part_contrast, logprobs[name] = dual_loss(
                            model, name, some, logprobs[other], pad_id, config
                        )
                        nll, part_contrast = nll / tokens[name], part_contrast / len(batch)
                        (nll + config.contrast * part_contrast).backward()
                    loss += nll.detach()
                # the contrast is the same from both sides: it counts once
                loss += config.contrast * part_contrast.detach()
                contrast += part_contrast.detach()
            sum_gradients(adapters.parameters(), loss, contrast)
            norms = {}
            for name, adapter in adapters.items():
                norms[f"grad_norm/{name}"] = clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = schedule.get_last_lr()[0]
            schedule.step()
            input_tokens = sum(chosen_lengths[i] + rejected_lengths[i] for i in batch)
            log.after_step(step, input_tokens, loss, contrast=contrast, lr=lr, **norms)
            checkpoint.after_step(step, loss)
    adapters.eval()
    print(log.summary(model.device))


def main(config):
    folder = Path(config.out) / "dual"
    with claim(folder / "good", folder / "bad"):
        # 1. pairs, base model and two adapters
        inputs = prepare_stage1(config)
        model, tokenizer, pairs = inputs.model, inputs.tokenizer, inputs.pairs
        # the model without its head; not "the base model" of the method
        trunk = model.base_model
        adapters = nn.ModuleDict()
        for name in ("good", "bad"):
            adapters[name] = LoRA(
                trunk,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_targets,
            )
        ids, _ = pairs["train"][0].input("plain", "chosen")
        print(f"one input: {tokenizer.decode(ids)!r}")
        lengths = [pair.length("plain", "chosen") for pair in pairs["train"]]
        print(
            f"{memory_summary(model, *adapters.values())}; {config.steps} steps of "
            f"{config.batch_size} pairs, prompt and chosen response of "
            f"{sum(lengths) / len(lengths):.0f} tokens on average"
        )

        # 2. train
        valid = sample(pairs["valid"], VALIDATION_PAIRS, config.seed)

        def validate_now():
            return validate(model, adapters, valid, tokenizer.pad_token_id, config.tokens_per_pass)

        nll_start, _ = validate_now()
        with open_log(folder, "dual", config) as write_line:
            train(adapters, inputs, config, write_line)
            rewards = reward_metrics(
                model,
                adapters.values(),
                adapters["good"],
                valid,
                "plain",
                config.beta,
                tokenizer.pad_token_id,
                config.tokens_per_pass,
            )
            write_line({"step": config.steps, **rewards})
        nll_end, accuracy = validate_now()

        # 3. save
        leave()
        if not is_first():
            return
        for name, adapter in adapters.items():
            start, end = nll_start[name], nll_end[name]
            validation = {"nll_start": start, "nll_end": end, "accuracy": accuracy}
            manifest = {**inputs.manifest, "validation": validation}
            with write_stage(folder / name, name, manifest) as new:
                model_name = inputs.settings["model"]
                save_adapter(new, adapter.weights(), trunk, model_name, config.lora_dropout)
            print(f"wrote {folder / name}; validation NLL per token {start:.3f} -> {end:.3f}")
        remove_checkpoints(folder, "dual")
    print(
        f"log π_good - log π_bad is higher for the chosen response in {accuracy:.0%} of the "
        f"validation pairs"
    )
    print(next_command("collect.py", config.out))


if __name__ == "__main__":
    run(main, Config, distributed=True)
