"""Stage 1, SCIT: one model learns to tell good from bad (paper section 3.1).

    python scit.py                                       the embedded default
    python scit.py --model PATH_OR_HUB_NAME --data pairs.jsonl --steps 500 --lr 2e-4

This is contrastive instruction tuning. Every pair gives two training examples, (p+, q, r_h) and
(p-, q, r_l): the instruction asks for the kind of response that it comes with. The model learns
the response (NLL), and that the opposite instruction p~ makes it less likely (contrast):

    loss = -Σ log π(r | p, q) / tokens
           + mean over responses of (1-ε) softplus(P(p~) - P(p)) + ε softplus(P(p) - P(p~))
    P(p) = β Σ log π(r_t | p, q, r_<t) over the response's tokens

In the paper ε is 0 and β is 1 (`--reduction sum --beta 1 --smoothing 0`); the authors' code takes
the mean over the tokens in place of β times the sum, and ε 0.2 (`--reduction mean --beta 1
--smoothing 0.2`). The default lies between them: the sum, with β 0.2 and ε 0.2. Two more things are
ours: a LoRA is trained instead of all weights, and a share of the pairs (`--anchor`) also comes
without an instruction, good and bad responses alike, so that the model under the plain prompt, on
which align.py builds, stays between p+ and p-. Writes OUT/scit/adapter, the input of collect.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import toy
from common.checkpoint import Checkpoint, remove_checkpoints
from common.config import SourceSettings, TrainingSettings, run, setting
from common.data import collate, sample, shuffled_batches, split_into_passes
from common.distributed import is_first, leave, share_of, sum_gradients
from common.hf import response_logprobs, token_mean
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
from lora import LoRA, save_adapter

# At most this many validation pairs are measured.
VALIDATION_PAIRS = 64

# The four inputs of a pair: both responses under their own instruction, then under the opposite.
INSTRUCTED = (
    ("positive", "chosen"),
    ("negative", "rejected"),
    ("negative", "chosen"),
    ("positive", "rejected"),
)

# The two inputs of an anchor, a pair that also comes without an instruction.
ANCHORED = (("plain", "chosen"), ("plain", "rejected"))


@dataclass
class Config(SourceSettings, TrainingSettings):
    """The settings of this stage. Those that it shares with others are in common/config.py."""

    embedded_default = toy.SCIT
    embedded_later = toy.LATER_OF_SCIT

    steps: int = setting(60, "optimizer steps", minimum=1)
    batch_size: int = setting(
        8, "pairs in a step; each is two responses under two instructions", minimum=1
    )
    lr: float = setting(5e-4, "peak learning rate: 10% warm-up, then a cosine to 0", minimum=0)
    reduction: Literal["sum", "mean"] = setting(
        "sum", "P is β times the sum (the paper) or the mean (the authors) of log π over tokens"
    )
    beta: float = setting(0.2, "β of P; the paper and the authors have 1", minimum=0)
    smoothing: float = setting(0.2, "ε of the contrast; 0 is the paper", minimum=0, maximum=0.5)
    anchor: float = setting(
        0.375,
        "share of a step's pairs, rounded up, that also come without instruction; 0 is the paper",
        minimum=0,
        maximum=1,
    )


def contrast_loss(P, P_opposite, smoothing):
    """The penalty where the opposite instruction explains a response as well as the right one,
    summed over n responses: scalar.

    P, P_opposite: [n], P(p) and P(p~), see scit_loss.

        contrast = (1-ε) softplus(P(p~) - P(p)) + ε softplus(P(p) - P(p~))

    where softplus(P(p~) - P(p)) = -log( e^P(p) / (e^P(p) + e^P(p~)) ). For one response it is ln 2
    where P(p) = P(p~), and at least the entropy of ε, see least_contrast.
    """
    right = F.softplus(P_opposite - P)
    wrong = F.softplus(P - P_opposite)
    return ((1 - smoothing) * right + smoothing * wrong).sum()


def least_contrast(smoothing):
    """The minimum of the contrast, at P(p) - P(p~) = ln((1-ε) / ε)."""
    return sum(-x * math.log(x) for x in (smoothing, 1 - smoothing) if x > 0)


def scit_loss(model, pairs, anchors, pad_id, config):
    """The two parts of SCIT's loss for n pairs. anchors: the a of them that also come without an
    instruction.

    Returns three things: the NLL, a scalar, summed over the response tokens under the right
    instruction and without one; the contrast, a scalar, summed over the 2n responses; P, [n, 2, 2],
    detached: right and opposite instruction by chosen and rejected response.
    """
    inputs = [pair.input(*names) for pair in pairs for names in INSTRUCTED]
    inputs += [pair.input(*names) for pair in anchors for names in ANCHORED]
    logprobs, mask = response_logprobs(model, collate(inputs, pad_id, model.device))
    n = len(pairs)

    # -log π(r | p, q) under the right instruction, and without one
    sums = logprobs.sum(1)  # [4n + 2a]
    instructed = sums[: 4 * n].view(n, 2, 2)  # [n, right | opposite, chosen | rejected]
    nll = -(instructed[:, 0].sum() + sums[4 * n :].sum())

    # the contrast compares P under the right instruction with P under the opposite one
    P = config.beta * (sums if config.reduction == "sum" else token_mean(logprobs, mask))
    P = P[: 4 * n].view(n, 2, 2)
    contrast = contrast_loss(P[:, 0], P[:, 1], config.smoothing)
    return nll, contrast, P.detach()


def count_tokens(pair, inputs):
    """The tokens of some of a pair's inputs, named as in INSTRUCTED."""
    return sum(pair.length(*names) for names in inputs)


@torch.no_grad()
def validate(model, pairs, pad_id, config):
    """Over both responses of some pairs: the contrast, the mean of P(p) - P(p~) and how often it
    is above 0."""
    lengths = [pair.max_length() for pair in pairs]
    parts = []
    # four inputs a pair
    for part in split_into_passes(range(len(pairs)), lengths, config.tokens_per_pass // 4):
        *_, P = scit_loss(model, [pairs[i] for i in part], [], pad_id, config)
        parts.append(P)
    P = torch.cat(parts)  # [n, right | opposite, chosen | rejected]
    right, opposite = P.unbind(1)  # [n, chosen | rejected]
    return {
        "contrast": contrast_loss(right, opposite, config.smoothing).item() / right.numel(),
        "margin": (right - opposite).mean().item(),
        "accuracy": (right > opposite).float().mean().item(),
    }


def train(adapter, inputs, config, write_line):
    """Train the adapter by SCIT's loss."""
    model, pairs, pad_id = inputs.model, inputs.pairs["train"], inputs.tokenizer.pad_token_id
    lengths = [pair.length("positive", "chosen") for pair in pairs]
    max_lengths = [pair.max_length() for pair in pairs]
    response_tokens = [sum(map(len, pair.responses.values())) for pair in pairs]
    instructed_tokens = [count_tokens(pair, INSTRUCTED) for pair in pairs]
    anchor_tokens = [count_tokens(pair, ANCHORED) for pair in pairs]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(config.steps))
    checkpoint = Checkpoint(
        Path(config.out) / "scit" / ".checkpoint-scit",
        config,
        inputs.depends_on,
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
    )
    batches = shuffled_batches(lengths, config.batch_size, config.seed, skip=checkpoint.step)
    bar = progress_bar("scit", checkpoint.step, config.steps)
    log = TrainingLog(write_line, bar, 4 * parameters_run(model))
    adapter.train()
    with checkpoint:
        for step in bar:
            batch = next(batches)
            # a random share, because the order within a batch is random; rounded first: 0.07 * 100
            # is a little more than 7
            anchored = batch[: math.ceil(round(config.anchor * len(batch), 6))]
            tokens = sum(response_tokens[i] for i in [*batch, *anchored])
            loss, contrast = torch.zeros(2, device=model.device)
            # this process's share; the losses are divided by the counts of the whole batch
            share = share_of(batch)
            # up to six inputs a pair
            for part in split_into_passes(share, max_lengths, config.tokens_per_pass // 6):
                anchors = [pairs[i] for i in part if i in anchored]
                part_pairs = [pairs[i] for i in part]
                nll, part_contrast, _ = scit_loss(model, part_pairs, anchors, pad_id, config)
                part_contrast = part_contrast / (2 * len(batch))
                part_loss = nll / tokens + part_contrast
                part_loss.backward()
                loss += part_loss.detach()
                contrast += part_contrast.detach()
            sum_gradients(adapter.parameters(), loss, contrast)
            norm = clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = schedule.get_last_lr()[0]
            schedule.step()
            input_tokens = sum(instructed_tokens[i] for i in batch)
            input_tokens += sum(anchor_tokens[i] for i in anchored)
            log.after_step(step, input_tokens, loss, contrast=contrast, lr=lr, grad_norm=norm)
            checkpoint.after_step(step, loss)
    adapter.eval()
    print(log.summary(model.device))


def main(config):
    folder = Path(config.out) / "scit"
    with claim(folder / "adapter"):
        # 1. pairs, base model and adapter
        inputs = prepare_stage1(config)
        model, tokenizer, pairs = inputs.model, inputs.tokenizer, inputs.pairs
        # the model without its head; not "the base model" of the method
        trunk = model.base_model
        adapter = LoRA(
            trunk,
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_targets,
        )
        for prompt in ("plain", "positive"):
            ids, _ = pairs["train"][0].input(prompt, "chosen")
            print(f"one input, {prompt}: {tokenizer.decode(ids)!r}")
        lengths = [pair.length("positive", "chosen") for pair in pairs["train"]]
        print(
            f"{memory_summary(model, adapter)}; {config.steps} steps of {config.batch_size} pairs "
            f"of {sum(lengths) / len(lengths):.0f} tokens on average"
        )

        # 2. train
        with open_log(folder, "scit", config) as write_line:
            train(adapter, inputs, config, write_line)
            valid = sample(pairs["valid"], VALIDATION_PAIRS, config.seed)
            rewards = reward_metrics(
                model,
                [adapter],
                adapter,
                valid,
                "positive",
                config.beta,
                tokenizer.pad_token_id,
                config.tokens_per_pass,
            )
            write_line({"step": config.steps, **rewards})
        validation = validate(model, valid, tokenizer.pad_token_id, config)

        # 3. save
        leave()
        if not is_first():
            return
        manifest = {**inputs.manifest, "validation": validation}
        with write_stage(folder / "adapter", "scit", manifest) as new:
            model_name = inputs.settings["model"]
            save_adapter(new, adapter.weights(), trunk, model_name, config.lora_dropout)
        remove_checkpoints(folder, "scit")
    contrast, margin, accuracy = validation.values()
    print(
        f"wrote {folder / 'adapter'}; validation pairs: contrast {contrast:.3f} (0.693 untrained, "
        f"{least_contrast(config.smoothing):.3f} at best), P under the right instruction "
        f"{margin:+.2f}, higher for {accuracy:.0%}"
    )
    if contrast > 0.95 * math.log(2):
        print(
            "WARNING: the contrast has not left ln 2: the model does not tell p+ from p-. "
            "Raise --lr or --steps"
        )
    print(next_command("collect.py", config.out))


if __name__ == "__main__":
    run(main, Config, distributed=True)
