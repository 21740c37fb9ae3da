"""Stage 1b, DUAL: two models, one that answers well and one that answers badly (paper section 3.1).

    python dual.py                                       the embedded default
    python dual.py --model PATH_OR_HUB_NAME --data pairs.jsonl --steps 500 --lr 2e-4

Maximum likelihood on the chosen responses gives the "good" model, on the rejected ones the "bad" one:

    loss(good) = -Σ log π_good(r_h | q) / tokens          loss(bad) = -Σ log π_bad(r_l | q) / tokens

Unlike the paper, they are two LoRA adapters over one base, which is in memory once. The good model is
preferred-SFT, the usual baseline. Writes OUT/dual/good and OUT/dual/bad, the input of collect.py.
"""
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import toy
from files import Diverged, new_stage, next_command, open_log, run, setting
from lora import LoRA, Training, cosine, fit, only, save_adapter, sizes
from model import context_length, load_model, load_tokenizer, model_digest, pick_device, pick_dtype, pick_tokens, response_logprobs


@dataclass
class Config(data.Source, Training):
    steps: int = setting(150, "optimiser steps of each model", least=1)
    batch_size: int = setting(16, "responses in a step", least=1)
    lr: float = setting(2e-3, "peak learning rate; cosine, 10% warm-up", least=0)


def response_nll(model, pairs, response, pad_id):
    """-Σ log π(r_t | q, r_<t) over the response tokens of the batch, and their number. response: "chosen" or "rejected"."""
    logprobs, mask = response_logprobs(model, data.collate([pair.example("plain", response) for pair in pairs], pad_id, model.device))
    return -logprobs.sum(), mask.sum()


@torch.no_grad()
def held_out(model, pairs, response, pad_id, tokens_per_pass):
    """NLL per token over held-out pairs."""
    parts = data.micro_batches(range(len(pairs)), [pair.length("plain", response) for pair in pairs], tokens_per_pass)
    sums = [response_nll(model, [pairs[i] for i in part], response, pad_id) for part in parts]
    return (sum(nll for nll, _ in sums) / sum(tokens for _, tokens in sums)).item()


def main(config):
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    config.dtype, config.tokens_per_pass = pick_dtype(config.dtype, device), pick_tokens(config.tokens_per_pass, device)
    source = toy.source(config)

    # the pairs, the base and its two adapters
    tokenizer = load_tokenizer(source["model"])
    config.template = data.pick_template(config.template, tokenizer)
    config.max_length = min(config.max_length, context_length(source["model"]))
    pairs = data.prepare(source["data"], ("train", "valid"), tokenizer, config.max_length, config.seed, config.limit,
                         config.positive, config.negative, config.template)
    train, valid, pad_id = pairs["train"], data.sample(pairs["valid"], 64, config.seed), tokenizer.pad_token_id
    model = load_model(source["model"], config.dtype, device, checkpointing=config.gradient_checkpointing)
    digest = model_digest(source["model"])
    adapters = {name: LoRA(model.base_model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets=config.lora_targets)
                for name in ("good", "bad")}
    print("one input: " + repr(tokenizer.decode(train[0].example("plain", "chosen")[0])))
    lengths = {response: [pair.length("plain", response) for pair in train] for response in ("chosen", "rejected")}
    print(f"{sizes(model, *adapters.values())}; twice {config.steps} steps of {config.batch_size} responses of "
          f"{sum(lengths['chosen']) / len(train):.0f} tokens on average")

    # training, one model after the other
    results, checkpoints, folder, inputs = {}, [], Path(config.out) / "dual", {"pairs": data.digest(pairs), "model_digest": digest}
    with open_log(folder, "dual") as log:
        for (name, adapter), response in zip(adapters.items(), ("chosen", "rejected")):
            def losses(group):                # of a step, in parts that fit a forward pass
                tokens = sum(len(train[i].responses[response]) for i in group)
                for part in data.micro_batches(group, lengths[response], config.tokens_per_pass):
                    yield response_nll(model, [train[i] for i in part], response, pad_id)[0] / tokens
            batches = functools.partial(data.endless_batches, lengths[response], config.batch_size, config.seed)
            with only(adapters.values(), adapter):
                start = held_out(model, valid, response, pad_id, config.tokens_per_pass)
                try:
                    checkpoints.append(fit(f"dual-{name}", adapter, losses, batches, cosine(config.steps), config, log, folder, inputs))
                except Diverged:              # at another --lr nothing goes on
                    for checkpoint in checkpoints:
                        checkpoint.remove()
                    raise
                results[name] = {"nll_start": start, "nll_end": held_out(model, valid, response, pad_id, config.tokens_per_pass)}

    # saving
    settings = {**vars(config), **source, "split_seed": config.seed}
    for name, adapter in adapters.items():
        with new_stage(folder / name, name, {"settings": settings, "model_digest": digest, "held_out": results[name]}) as new:
            save_adapter(new, adapter.factors(), model.base_model, source["model"], config.lora_dropout)
        print(f"wrote {folder / name}; held-out NLL per token {results[name]['nll_start']:.3f} -> {results[name]['nll_end']:.3f}")
    for checkpoint in checkpoints:
        checkpoint.remove()
    print(next_command("collect.py", config.out))


if __name__ == "__main__":
    run(main, Config)
