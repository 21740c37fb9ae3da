"""Stage 1a, SCIT: one model learns to tell good from bad, by contrastive instruction tuning (paper section 3.1).

    python scit.py                                       the embedded default
    python scit.py --model PATH_OR_HUB_NAME --data pairs.jsonl --steps 500 --lr 2e-4

Every pair gives two examples, (p+, q, r_h) and (p-, q, r_l): the instruction asks for just the response that it
comes with. The model learns the response (NLL) and that the opposite instruction p~ makes it less likely (contrast):

    loss = -log π(r | p, q) - log( e^P(p) / (e^P(p) + e^P(p~)) ),      P(p) = mean log π(r_t | p, q, r_<t)

Unlike the paper: P is a mean over tokens and the contrast is smoothed, as in the authors' code; a LoRA is trained instead of
all weights; and some examples without instruction anchor the plain prompt (see `anchor`), on which align.py builds.
Writes OUT/scit/adapter, the input of collect.py.
"""
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import toy
from files import new_stage, next_command, open_log, run, setting
from lora import LoRA, Training, cosine, fit, save_adapter, sizes
from model import context_length, load_model, load_tokenizer, model_digest, pick_device, pick_dtype, pick_tokens, response_logprobs, token_mean


@dataclass
class Config(data.Source, Training):
    steps: int = setting(240, "optimiser steps", least=1)
    batch_size: int = setting(8, "pairs in a step; each is 2 examples under 2 instructions", least=1)
    lr: float = setting(6e-3, "peak learning rate; cosine, 10% warm-up", least=0)
    smoothing: float = setting(0.2, "ε of the contrast, as in the authors' code", least=0, most=0.5)
    anchor: float = setting(0.375, "share of a step's pairs that come without instruction too, rounded up; 0 is the paper", least=0, most=1)


def contrast_loss(own, opposite, smoothing):
    """How well the right instruction is told from the wrong one. own, opposite: P(p) and P(p~) [m], P = mean log π(r_t | p, q, r_<t).

        contrast = (1-ε) softplus(P(p~) - P(p)) + ε softplus(P(p) - P(p~)),    softplus(P~ - P) = -log(e^P / (e^P + e^P~))
    """
    return ((1 - smoothing) * F.softplus(opposite - own) + smoothing * F.softplus(own - opposite)).mean()


def instructed(pair):
    """Four inputs of a pair: r_h and r_l under their own instruction, then both under the opposite one."""
    return [pair.example(*names) for names in (("positive", "chosen"), ("negative", "rejected"),
                                                ("negative", "chosen"), ("positive", "rejected"))]


def batch_loss(model, pairs, anchors, pad_id, smoothing, tokens=None, count=None):
    """loss = NLL + contrast of some pairs; NLL is the mean over the response tokens of the own-instruction and anchor examples.
    Returns (loss, contrast, P [n, own | opposite, r_h | r_l]).

    tokens, count: these tokens and the pairs of a whole step, of which `pairs` are a part; the parts' losses add up to the step's.
    """
    inputs = [example for pair in pairs for example in instructed(pair)]
    inputs += [pair.example("plain", response) for pair in anchors for response in ("chosen", "rejected")]
    logprobs, mask = response_logprobs(model, data.collate(inputs, pad_id, model.device))       # [4n + 2a, S-1]
    P = token_mean(logprobs, mask)[:4 * len(pairs)].view(-1, 2, 2)                              # [n, own | opposite, r_h | r_l]
    own = torch.arange(len(inputs), device=model.device) % 4 < 2                                # r_h and r_l under their own instruction,
    own[4 * len(pairs):] = True                                                                 # and the anchors
    nll = -logprobs[own].sum() / (tokens or mask[own].sum())
    contrast = contrast_loss(P[:, 0].flatten(), P[:, 1].flatten(), smoothing) * len(pairs) / (count or len(pairs))
    return nll + contrast, contrast, P.detach()


@torch.no_grad()
def held_out(model, pairs, pad_id, config):
    """(contrast, mean P(p) - P(p~), share of it above 0) over both examples of each pair."""
    parts = data.micro_batches(range(len(pairs)), [pair.longest() for pair in pairs], config.tokens_per_pass // 4)
    P = torch.cat([batch_loss(model, [pairs[i] for i in part], [], pad_id, config.smoothing)[2] for part in parts])         # [n, own | opposite, 2]
    own, opposite = P[:, 0].flatten(), P[:, 1].flatten()
    contrast = contrast_loss(own, opposite, config.smoothing)
    return contrast.item(), (own - opposite).mean().item(), (own > opposite).float().mean().item()


def main(config):
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    config.dtype, config.tokens_per_pass = pick_dtype(config.dtype, device), pick_tokens(config.tokens_per_pass, device)
    source = toy.source(config)

    # the pairs, the model and its adapter
    tokenizer = load_tokenizer(source["model"])
    config.template = data.pick_template(config.template, tokenizer)
    config.max_length = min(config.max_length, context_length(source["model"]))
    pairs = data.prepare(source["data"], ("train", "valid"), tokenizer, config.max_length, config.seed, config.limit,
                         config.positive, config.negative, config.template)
    model = load_model(source["model"], config.dtype, device, checkpointing=config.gradient_checkpointing)
    digest = model_digest(source["model"])
    adapter = LoRA(model.base_model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets=config.lora_targets)
    for prompt in ("plain", "positive"):
        print(f"one input, {prompt}: " + repr(tokenizer.decode(pairs["train"][0].example(prompt, "chosen")[0])))
    lengths = [pair.length("positive", "chosen") for pair in pairs["train"]]
    print(f"{sizes(model, adapter)}; {config.steps} steps of {config.batch_size} pairs of {sum(lengths) / len(lengths):.0f} tokens on average")

    # training
    train, contrasts = pairs["train"], []
    widest = [pair.longest() for pair in train]

    def losses(group):
        """The loss of a step, in parts that fit a forward pass; of a pair up to 6 inputs."""
        anchored = set(group[:math.ceil(round(config.anchor * len(group), 6))])
        own = [len(ids) for i in group for ids in train[i].responses.values()]
        tokens = sum(own) + sum(own[:2 * len(anchored)])
        contrasts.clear()
        for part in data.micro_batches(group, widest, config.tokens_per_pass // 6):
            loss, contrast, _ = batch_loss(model, [train[i] for i in part], [train[i] for i in part if i in anchored],
                                           tokenizer.pad_token_id, config.smoothing, tokens, len(group))
            contrasts.append(contrast.detach())
            yield loss

    batches = functools.partial(data.endless_batches, lengths, config.batch_size, config.seed)
    folder = Path(config.out) / "scit"
    with open_log(folder, "scit") as log:
        checkpoint = fit("scit", adapter, losses, batches, cosine(config.steps), config, log, folder,
                         {"pairs": data.digest(pairs), "model_digest": digest}, lambda: {"contrast": sum(contrasts).item()})
    contrast, margin, accuracy = held_out(model, data.sample(pairs["valid"], 64, config.seed), tokenizer.pad_token_id, config)

    # saving
    record = {"settings": {**vars(config), **source, "split_seed": config.seed},
              "model_digest": digest, "held_out": {"contrast": contrast, "margin": margin, "accuracy": accuracy}}
    with new_stage(folder / "adapter", "scit", record) as new:
        save_adapter(new, adapter.factors(), model.base_model, source["model"], config.lora_dropout)
    checkpoint.remove()
    print(f"wrote {folder / 'adapter'}; held-out pairs: contrast {contrast:.3f} (ln 2 = 0.693 is untrained), "
          f"log-probability per token under the right instruction {margin:+.2f}, right for {accuracy:.0%}")
    if contrast > 0.95 * math.log(2):
        print("WARNING: the contrast has not left ln 2: the model does not tell p+ from p-. Raise --lr or --steps")
    print(next_command("collect.py", config.out))


if __name__ == "__main__":
    run(main, Config)
