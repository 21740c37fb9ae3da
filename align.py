"""Stage 3: train a LoRA whose hidden states land at base + α (h+ - h-) (paper section 3.3).

    python align.py                                      after collect.py
    python align.py --alpha 1 --layers middle            the paper's form: one α for some middle layers
    python align.py --strength 0.4 --rank 8              a strength of its own; v on its top 8 directions only
    python align.py --profile                            where a step's time goes; trains nothing

On the plain prompt <q, r>, with b, h+ and h- recorded by collect.py at the same positions:

    loss = mean over target layers l and recorded tokens of || A(π_lora, <q, r>, l) - (b_l + α (h+_l - h-_l)) ||_2

Two things go beyond the paper. α does not carry over between models; a strength ρ does better: α_l = ρ / mean(|v_l|/|b_l|),
so that states move by a share ρ of their length. And v may be replaced by v U^T U, its part in the span of the layer's
top k uncentred principal directions U [k, D] (ρ is still of the whole v).

The LoRA is on blocks 0 to the highest target; nothing above is loaded or run. One collection serves many α.
Writes OUT/METHOD/align, a PEFT adapter that applies to the original base model alone.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch.utils.benchmark import Timer
from tqdm import tqdm

import data
from files import Collection, UserError, checked, choose_method, inherit, new_stage, next_command, open_log, read_stage, run, setting
from kernels import bytes_moved, representation_loss, response_index
from lora import LoRA, load_adapter, only, save_adapter, stack
from model import hidden_states, load_config, load_model, load_tokenizer, model_digest, pick_device, pick_layers, principal_directions

STRENGTH = 0.25                               # the default ρ, for both methods, chosen on validation pairs of the embedded default


@dataclass
class Config:
    out: str = setting("out", "folder of all stages")
    method: Literal["scit", "dual"] | None = setting(None, "whose collection to use; empty takes the one that is there")
    device: str | None = setting(None, "cpu, cuda, cuda:1; empty takes the GPU where there is one")
    alpha: float | None = setting(None, "α, the same for every layer, as in the paper; empty: what --strength says")
    strength: float | None = setting(None, f"ρ: α per layer such that α|v|/|h| is ρ in the mean; empty: {STRENGTH}, unless --alpha is given")
    rank: int | None = setting(None, "use v's part on so many top directions a layer; empty: all of v, or what was collected", least=1)
    kind: Literal["l2", "mse"] = setting("l2", "the norm, as in the authors' code, or its square, as in the paper")
    layers: list[str] | None = setting(None, "target layers, of those collected, numbers or names as in collect.py; empty takes them all")
    steps: int = setting(150, "optimiser steps", least=1)
    batch_size: int = setting(16, "responses in a step", least=1)
    lr: float = setting(1e-3, "learning rate, constant", least=0)
    lora_rank: int = setting(8, "rank of the adapter", least=1)
    lora_alpha: float = setting(16, "the adapter's scale is lora_alpha / lora_rank")
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", least=0)
    lora_targets: str = setting("all", "linears to adapt: all, or names such as q_proj,v_proj")
    limit: int | None = setting(None, "use the first collected responses only", least=1)
    profile: bool = setting(False, "trace a few steps, tell the loss kernel's share and bandwidth, and end")
    model: str | None = setting(None, "the base model, where it has moved; empty inherits from collect")
    seed: int | None = setting(None, "seed of the adapter and the order; empty inherits")


def find_directions(train, folder, record, layers, rank, device):
    """Directions U [k, D] per layer, or None for the paper's form, and the share of Σ|v|² that they hold. UserError where there are not so many."""
    settings = record["settings"]
    most = settings["rank"] if settings["store"] == "lowrank" else record["hidden_size"]
    if rank and rank > most:
        raise UserError(f"--rank {rank}: {folder} has {most} directions a layer")
    if settings["store"] == "lowrank":
        stored = load_file(checked(folder, record, "directions.safetensors"), device=str(device))
        shares = [record["energy"][settings["layers"].index(layer)] if rank in (None, most) else None for layer in layers]
        return [stored[f"directions.{layer}"][:rank] for layer in layers], shares
    if rank is None:
        return None, [None] * len(layers)
    directions, shares = principal_directions(train.differences(device), rank)
    return [U.to(getattr(torch, settings["dtype"])) for U in directions], shares


def base_states(trunk, adapter, layers, batch):
    """b of a collection that does not hold it: the states of the model with the adapter off. List of [T, D]."""
    with torch.no_grad(), only([adapter]):
        return [h[batch.response] for h in hidden_states(trunk, layers, batch.ids, batch.attention)]


@torch.no_grad()
def distances(trunk, adapter, held_out, layers, alphas, pad_id, device, batch_size):
    """Mean over held-out tokens of ||h - (b + α v)|| per layer: [L]."""
    norms = []
    for group in torch.arange(len(held_out.items)).split(batch_size):
        batch = data.collate(held_out.examples(group), pad_id, device)
        base, plus, minus = held_out.states(group, device)
        base = base or base_states(trunk, adapter, layers, batch)
        hidden = hidden_states(trunk, layers, batch.ids, batch.attention)
        norms.append(representation_loss(hidden, base, plus, minus, response_index(batch.response), alphas, directions=held_out.directions)[1])
    return torch.cat(norms, 1).mean(1)


def profile(step, loss, moved, path):
    """Trace five calls of step() for a browser; time step() and loss(), which are loss and gradient alone and move `moved` bytes."""
    step()                                                 # compilation and the allocator's first calls stay out
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            with torch.profiler.record_function("step"):
                step()
    profiler.export_chrome_trace(str(path))
    whole, part = (Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=1).median
                   for f in (step, loss))
    print(f"a step {whole * 1e3:.3g} ms; loss and gradient {part * 1e3:.3g} ms of it ({part / whole:.1%}), {moved / 1e6:.3g} MB at "
          f"{moved / part / 1e9:.3g} GB/s" + (" (states that fit the GPU's cache may come from there)" if torch.cuda.is_available() else ""))
    print(f"wrote {path}: open it in a browser at chrome://tracing or ui.perfetto.dev")


def main(config):
    # what collect says
    method = choose_method(config.out, config.method, dict.fromkeys(("scit", "dual"), "collect"), ["python collect.py"])
    folder = Path(config.out) / method / "collect"
    record = read_stage(folder, "collect", "python collect.py")
    settings = record["settings"]
    if config.layers:
        config.layers = pick_layers(config.layers, load_config(config.model or settings["model"]).num_hidden_layers)
    inherit(config, settings, ("model", "seed", "layers"), folder)
    layers, device = config.layers, pick_device(config.device)
    missing = [layer for layer in layers if layer not in settings["layers"]]
    if missing:
        raise UserError(f"--layers {missing[0]}: {folder} holds layers {settings['layers']}: collect it with `python collect.py --layers ...`")
    if config.alpha is not None and config.strength is not None:
        raise UserError("--alpha and --strength exclude each other: give one of them")
    if config.alpha is None and config.strength is None:
        config.strength = STRENGTH
    ratio = [record["ratio"][settings["layers"].index(layer)] for layer in layers]           # mean |v|/|h|
    if config.strength is not None and not all(0 < r < math.inf for r in ratio):
        raise UserError(f"--strength: {folder} has |v|/|h| {ratio} at layers {layers}: h+ and h- must differ; train stage 1 longer, or give --alpha")
    alphas = [config.strength / r if config.alpha is None else config.alpha for r in ratio]
    torch.manual_seed(config.seed)
    train = Collection([checked(folder, record, name) for name in record["shards"]], layers, settings["store"])
    held_out = Collection([checked(folder, record, "heldout.safetensors")], layers, settings["store"])

    # the base up to the highest target layer, with its adapter where there is one, and a fresh LoRA
    pad_id = load_tokenizer(config.model).pad_token_id
    trunk = load_model(config.model, getattr(torch, settings["dtype"]), device, blocks=layers[-1] + 1)
    if model_digest(config.model) != record["model_digest"]:
        raise UserError(f"{folder} was made for another model than --model {config.model}: run `python collect.py` again")
    below = None
    if settings["base"] == "instructed":
        below = load_adapter(checked(folder, record, "base_adapter"), trunk)
        LoRA(trunk, factors=below).requires_grad_(False).eval()
    adapter = LoRA(trunk, config.lora_rank, config.lora_alpha, config.lora_dropout, targets=config.lora_targets)

    directions, shares = find_directions(train, folder, record, layers, config.rank, device)
    train.directions = held_out.directions = directions
    for layer, alpha, r, share in zip(layers, alphas, ratio, shares):
        print(f"  layer {layer}: α {alpha:.3g}, α|v|/|h| {abs(alpha) * r:.2f}"
              + (f", {len(directions[0])} directions hold {share:.0%} of |v|²" if share is not None else "")
              + ("  WARNING: near 1 or above, expect the model to collapse; lower the strength" if abs(alpha) * r > 0.8 else ""))
    lengths, strengths = train.lengths[:config.limit], torch.tensor(alphas, dtype=torch.float32, device=device)     # α per layer
    print(f"layers {layers}, base {settings['base']}: {sum(p.numel() for p in adapter.parameters()):,} trained parameters, "
          f"{len(lengths):,} responses, {config.steps} steps of {config.batch_size}")

    # training
    start = distances(trunk, adapter, held_out, layers, strengths, pad_id, device, config.batch_size)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.0)
    draws = data.endless_batches(lengths, config.batch_size, config.seed)
    adapter.train()

    def drawn():
        group = next(draws)
        batch = data.collate(train.examples(group), pad_id, device)
        base, plus, minus = train.states(group, device)                                    # b, h+, h-: L x [T, D]
        return batch, base or base_states(trunk, adapter, layers, batch), plus, minus

    def loss_of(hidden, batch, base, plus, minus):
        return representation_loss(hidden, base, plus, minus, response_index(batch.response), strengths, kind=config.kind, directions=directions)[0]

    def train_step():
        batch, *states = drawn()
        hidden = hidden_states(trunk, layers, batch.ids, batch.attention)                  # A(π_lora, <q, r>, l): L x [B, S, D]
        loss = loss_of(hidden, batch, *states)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if config.profile:
        batch, *states = drawn()
        hidden = [h.detach().requires_grad_() for h in hidden_states(trunk, layers, batch.ids, batch.attention)]
        return profile(train_step, lambda: torch.autograd.grad(loss_of(hidden, batch, *states), hidden), bytes_moved(hidden, *states, directions),
                       Path(config.out) / "align_trace.json")
    with open_log(config.out, "align") as log:
        bar = tqdm(range(1, config.steps + 1), desc="align", unit="step")
        for step in bar:
            loss = train_step()
            if step % 10 == 0 or step == config.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                log(step=step, loss=loss.item())
    adapter.eval()
    end = distances(trunk, adapter, held_out, layers, strengths, pad_id, device, config.batch_size)

    # saving: the written adapter applies to the original base alone
    factors = adapter.factors() if below is None else stack(below, adapter.factors())
    if factors.rank > 16:
        print(f"WARNING: the adapter has rank {factors.rank}; some servers take 16 at most by default")
    result = {"settings": {**settings, **vars(config)}, "method": method, "model_digest": record["model_digest"], "alphas": alphas,
              "distance_start": start.tolist(), "distance_end": end.tolist()}
    written = Path(config.out) / method / "align"
    with new_stage(written, "align", result) as new:
        save_adapter(new, factors, trunk, config.model, config.lora_dropout)
    for layer, a, b in zip(layers, result["distance_start"], result["distance_end"]):
        print(f"  layer {layer}: held-out distance to the target {a:.3f} -> {b:.3f}" + (f" ({b / a:.2f} of it)" if a else ""))
    print(f"wrote {written}; held-out distance {start.mean():.3f} -> {end.mean():.3f}")
    print(next_command("evaluate.py", config.out))


if __name__ == "__main__":
    run(main, Config)
