"""Stage 3: train a LoRA whose hidden states land at base + α (h+ - h-) (paper section 3.3).

    python align.py                                      after collect.py
    python align.py --alpha 1 --layers middle            the paper's form: one α for some middle layers
    python align.py --strength 0.15 0.25 0.4             a sweep: an adapter each, scored on held-out pairs, the best marked
    python align.py --profile                            where a step's time goes; trains nothing

On the plain prompt <q, r>, with b, h+ and h- recorded by collect.py at the same positions:

    loss = mean over target layers l and recorded tokens of || A(π_lora, <q, r>, l) - (b_l + α (h+_l - h-_l)) ||_2

Two things go beyond the paper. α does not carry over between models; a strength ρ does better: α_l = ρ / mean(|v_l|/|b_l|),
so that states move by a share ρ of their length. And v may be replaced by v U^T U, its part in the span of the layer's
top k uncentred principal directions U [k, D] (ρ is still of the whole v).

The LoRA is on blocks 0 to the highest target; nothing above is loaded or run. One collection serves many α.
Writes OUT/METHOD/align, a PEFT adapter that applies to the original base model alone. A sweep has its adapters and its
table in OUT/METHOD/sweep, and the best is OUT/METHOD/align.
"""
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
from files import Diverged, UserError, checked, choose_method, inherit, new_stage, next_command, open_log, read_stage, run, setting, write_json
from kernels import bytes_moved, representation_loss, response_index, why_not_triton
from lora import LoRA, Training, descend, fit, load_adapter, only, save_adapter, sizes, stack
from model import (find_linears, hidden_states, load_config, load_model, load_tokenizer, model_digest, pick_device, pick_layers, pick_tokens,
                   principal_directions)
from score import check_reward_model, choose, load_judge, load_reward_model, score_models, table

STRENGTH = 0.25                               # the default ρ, for both methods, chosen on validation pairs of the embedded default
SCORED = 200                                  # held-out pairs, at most, that the adapters of a sweep are scored on


@dataclass
class Run:
    """One adapter to train: its name, the setting that it is of ("alpha" or "strength") with its value, and α per layer."""
    name: str
    setting: str
    value: float
    alphas: list


@dataclass
class Config(Training):
    out: str = setting("out", "folder of all stages")
    method: Literal["scit", "dual"] | None = setting(None, "whose collection to use; empty takes the one that is there")
    device: str | None = setting(None, "cpu, cuda, cuda:1; empty takes the GPU where there is one")
    alpha: list[float] | None = setting(None, "α, the same for every layer, as in the paper; empty: what --strength says; several: a sweep")
    strength: list[float] | None = setting(None, f"ρ: α per layer such that α|v|/|h| is ρ on average; empty: {STRENGTH}, unless --alpha is given; "
                                                 "several: a sweep")
    rank: int | None = setting(None, "use v's part on so many top directions a layer; empty: all of v, or what was collected", least=1)
    kind: Literal["l2", "mse"] = setting("l2", "the norm, as in the authors' code, or its square by the width, as in the paper")
    layers: list[str] | None = setting(None, "target layers, of those collected, numbers or names as in collect.py; empty takes them all")
    steps: int = setting(150, "optimiser steps", least=1)
    batch_size: int = setting(16, "responses in a step", least=1)
    lr: float = setting(1e-3, "learning rate, constant", least=0)
    limit: int | None = setting(None, "use so many collected responses only, drawn at random", least=1)
    merge: bool = setting(False, "also write OUT/METHOD/merged: the whole model with the adapter in its weights")
    judge: str | None = setting(None, "of a sweep: module:function that scores (prompt, response); empty inherits")
    reward_model: str | None = setting(None, "of a sweep: a sequence classifier of one label, folder or hub name")
    max_new_tokens: int = setting(64, "of a sweep: longest answer", least=1)
    profile: bool = setting(False, "trace a few steps, tell the loss kernel's share and bandwidth, and end")
    model: str | None = setting(None, "the base model, where it has moved; empty inherits from collect")
    seed: int | None = setting(None, "seed of the adapter and the order; empty inherits")


def plan_runs(config, ratio):
    """The adapters to train, of settings with several values several. ratio: mean |v|/|b| of each layer. UserError where they do not go.

        α_l = --alpha,  or  α_l = ρ / mean(|v_l|/|b_l|)  with ρ = --strength
    """
    if config.alpha and config.strength:
        raise UserError("--alpha and --strength exclude each other: give one of them")
    if config.strength and not all(0 < r < math.inf for r in ratio):
        raise UserError(f"--strength: |v|/|h| is {ratio} at layers {config.layers}: h+ and h- must differ; train stage 1 longer, or give --alpha")
    runs = [Run(f"alpha_{alpha:g}", "alpha", alpha, [alpha] * len(ratio)) for alpha in config.alpha or ()]
    runs += [Run(f"strength_{rho:g}", "strength", rho, [rho / r for r in ratio]) for rho in config.strength or ()]
    if len({each.name for each in runs}) < len(runs) or not all(math.isfinite(each.value) for each in runs):
        raise UserError(f"--{runs[0].setting} {' '.join(f'{each.value:g}' for each in runs)}: give finite values, each once")
    return runs


def find_directions(collection, folder, record, layers, rank, device, tokens_per_pass):
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
    directions, shares = principal_directions(collection.differences(device, tokens_per_pass), rank)
    return [U.to(getattr(torch, settings["dtype"])) for U in directions], [share[rank - 1] for share in shares]


def targets(collection, groups, trunk, adapter):
    """For each group of collected responses (Batch, base, plus, minus), on a GPU read one step ahead; b, h+ and h- are lists of L tensors [T, D]."""
    def read(group):
        return collection.batch(group, trunk.device), *collection.states(group, trunk.device)
    on_gpu = trunk.device.type == "cuda"      # on a CPU the reading would take the cores from the work
    for batch, base, plus, minus in data.one_ahead(read, groups, trunk.device) if on_gpu else map(read, groups):
        if base is None:                      # not stored: the states of the model with the adapter off
            with torch.no_grad(), only([adapter]):
                base = [h[batch.response] for h in hidden_states(trunk, collection.layers, batch.ids)]
        yield batch, base, plus, minus


def alignment_loss(hidden, collection, batch, base, plus, minus, alphas, kind="l2", tokens=None):
    """mean || A(π_lora, <q, r>, l) - (b_l + α_l (h+_l - h-_l)) ||_2, and the norms [L, T]. hidden: L x [B, S, D]; alphas: [L];
    tokens: those of a whole step of which this is a part."""
    return representation_loss(hidden, base, plus, minus, response_index(batch.response), alphas, kind=kind,
                               directions=collection.directions, denom=tokens and len(hidden) * tokens)


def objective(trunk, adapter, collection, alphas, config):
    """What lora.fit needs to move the adapter's hidden states to their targets: (losses, batches)."""
    def batches(done):
        """Each step's passes, less the first `done` steps, with what draws their targets: all passes in a row are read ahead."""
        groups = data.endless_batches(collection.lengths, config.batch_size, config.seed, done)
        steps, ahead = itertools.tee(data.micro_batches(group, collection.lengths, config.tokens_per_pass) for group in groups)
        draws = targets(collection, itertools.chain.from_iterable(ahead), trunk, adapter)
        return ((passes, draws) for passes in steps)

    def losses(step):
        """The loss of a step, pass by pass."""
        passes, draws = step
        tokens = sum(collection.tokens(i) for part in passes for i in part)
        for batch, *states in itertools.islice(draws, len(passes)):                         # b, h+, h-: L x [T, D]
            hidden = hidden_states(trunk, collection.layers, batch.ids)                    # A(π_lora, <q, r>, l): L x [B, S, D]
            yield alignment_loss(hidden, collection, batch, *states, alphas, config.kind, tokens)[0]
            del hidden, batch, states         # before the next pass
    return losses, batches


@torch.no_grad()
def distances(trunk, adapter, held_out, alphas, tokens_per_pass):
    """Mean over held-out tokens of || h - (b + α v) || per layer: [L]."""
    norms, passes = [], data.micro_batches(range(len(held_out.items)), held_out.lengths, tokens_per_pass)
    for batch, *states in targets(held_out, iter(passes), trunk, adapter):
        hidden = hidden_states(trunk, held_out.layers, batch.ids)
        norms.append(alignment_loss(hidden, held_out, batch, *states, alphas)[1])
    return torch.cat(norms, 1).mean(1)


def profile_step(trunk, adapter, collection, alphas, config):
    """Trace some steps; time a step, and the loss alone of its first pass."""
    from kernels.bench import profile         # with what only a benchmark needs
    losses, batches = objective(trunk, adapter, collection, alphas, config)
    optimizer = torch.optim.AdamW(adapter.train().parameters(), lr=config.lr)
    scaler = torch.amp.GradScaler(trunk.device.type, enabled=trunk.dtype == torch.float16)
    (passes, _), steps = next(batches(0)), batches(0)
    batch, *states = next(targets(collection, iter(passes), trunk, adapter))
    hidden = [h.detach().requires_grad_() for h in hidden_states(trunk, collection.layers, batch.ids)]
    profile(lambda: descend(losses(next(steps)), adapter, optimizer, scaler),
            lambda: torch.autograd.grad(alignment_loss(hidden, collection, batch, *states, alphas, config.kind)[0], hidden),
            bytes_moved(hidden, *states, collection.directions), Path(config.out) / config.method / "align_trace.json")


def score_sweep(factors, records, trunk, pairs, config, settings, tokenizer):
    """Score every adapter {name: Factors} and their base on held-out pairs. Writes OUT/METHOD/sweep, returns the best one's name."""
    settings, device, dtype = {**settings, **vars(config)}, pick_device(config.device), settings["dtype"]
    scorers = {"judge": load_judge(config.judge)} if config.judge else {}
    if config.reward_model:
        scorers["reward"] = load_reward_model(config.reward_model, dtype, device, config.batch_size)
    adapters = {"base": (None, "plain"), **{name: (adapter, "plain") for name, adapter in factors.items()}}
    reports, _ = score_models(load_model(config.model, dtype, device), adapters, tokenizer, pairs, scorers,
                              config.max_new_tokens, config.batch_size, config.seed, config.tokens_per_pass)
    best, why = choose(reports)
    words = f"{table(reports)}\n\nbest: {best}, {why}\n"
    print(words)
    with new_stage(Path(config.out) / config.method / "sweep", "sweep", {"settings": settings, "method": config.method}) as new:
        for name, adapter in factors.items():
            with new_stage(new / name, "align", records[name]) as folder:
                save_adapter(folder, adapter, trunk, config.model, config.lora_dropout)
        write_json(new / "sweep.json", {"best": best, "why": why, "pairs": len(pairs), "models": reports, "settings": settings})
        (new / "sweep.md").write_text(words)
    return best


def write_merged(folder, factors, settings, model):
    """Write the whole model with an adapter in its weights, and its tokenizer."""
    LoRA(model.base_model, factors=factors).merge()
    with new_stage(folder, "merged", {"settings": settings}) as new:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(settings["model"]).save_pretrained(new)


def main(config):
    # what collect says
    config.method = choose_method(config.out, config.method, dict.fromkeys(("scit", "dual"), "collect"), ["python collect.py"])
    out, folder = Path(config.out) / config.method, Path(config.out) / config.method / "collect"
    record = read_stage(folder, "collect", "python collect.py")
    settings = record["settings"]
    if config.layers:
        config.layers = pick_layers(config.layers, load_config(config.model or settings["model"]).num_hidden_layers)
    inherit(config, {"judge": None, **settings}, ("model", "seed", "layers", "judge"), folder)
    layers, device, dtype = config.layers, pick_device(config.device), settings["dtype"]
    config.tokens_per_pass = pick_tokens(config.tokens_per_pass, device)
    missing = [layer for layer in layers if layer not in settings["layers"]]
    if missing:
        raise UserError(f"--layers {missing[0]}: {folder} holds layers {settings['layers']}: collect it with `python collect.py --layers ...`")
    ratio = [record["ratio"][settings["layers"].index(layer)] for layer in layers]           # mean |v|/|b|
    config.strength = config.strength or (None if config.alpha else [STRENGTH])
    runs, tokenizer = plan_runs(config, ratio), load_tokenizer(config.model)
    if len(runs) > 1:                         # what the end of a sweep needs fails at its start
        if config.judge:
            load_judge(config.judge)
        if config.reward_model:
            check_reward_model(config.reward_model)
        pairs = data.prepare(settings["data"], ("valid",), tokenizer, settings["max_length"], settings["split_seed"], None,
                             settings["positive"], settings["negative"], settings["template"])["valid"]
    collection, held_out = (data.Collection([checked(folder, record, name) for name in record[part]], layers, settings["store"], tokenizer.pad_token_id)
                            for part in ("shards", "held_out"))
    if config.limit:
        collection.keep(config.limit, config.seed)

    # the base up to the highest target layer, with its adapter where there is one
    trunk = load_model(config.model, dtype, device, blocks=layers[-1] + 1, checkpointing=config.gradient_checkpointing)
    if model_digest(config.model) != record["model_digest"]:
        raise UserError(f"{folder} was made for another model than --model {config.model}: run `python collect.py` again")
    adapted, below = {path.rpartition(".")[2] for path in find_linears(trunk, config.lora_targets)}, None
    if settings["base"] == "instructed":
        below = load_adapter(checked(folder, record, "base_adapter"), trunk)
        LoRA(trunk, factors=below).requires_grad_(False).eval()
    collection.directions, shares = find_directions(collection, folder, record, layers, config.rank, device, config.tokens_per_pass)
    held_out.directions = collection.directions
    for each in runs:
        for layer, alpha, r, share in zip(layers, each.alphas, ratio, shares):
            print(f"  {each.name}, layer {layer}: α {alpha:.3g}, α|v|/|h| {abs(alpha) * r:.2f}"
                  + (f", {len(collection.directions[0])} directions hold {share:.0%} of |v|²" if share is not None else "")
                  + ("  WARNING: near 1 or above, expect the model to collapse; lower the strength" if abs(alpha) * r > 0.8 else ""))
    print(f"layers {layers}, base {settings['base']}: {len(collection.lengths):,} responses of "
          f"{sum(collection.lengths) / len(collection.lengths):.0f} tokens on average, {record['tokens'] * record['token_bytes'] / 1e9:.3g} GB "
          f"of states on disk, {len(runs)} times {config.steps} steps of {config.batch_size}, LoRA on {', '.join(sorted(adapted))}")

    if device.type == "cuda" and (reason := why_not_triton(torch.empty(record["hidden_size"], device=device))):
        print(f"the loss is computed in plain PyTorch and not by the Triton kernel: {reason}")

    # training; a written adapter applies to the original base alone
    def fresh():
        torch.manual_seed(config.seed)
        return LoRA(trunk, config.lora_rank, config.lora_alpha, config.lora_dropout, targets=config.lora_targets)

    if config.profile:
        return profile_step(trunk, fresh(), collection, torch.tensor(runs[0].alphas, device=device), config)
    factors, records, checkpoints = {}, {}, []
    with open_log(out, "align") as log:
        for each in runs:
            adapter, alphas = fresh(), torch.tensor(each.alphas, device=device)
            print(f"{each.name}: {sizes(trunk, adapter)}")
            start = distances(trunk, adapter, held_out, alphas, config.tokens_per_pass)
            losses, batches = objective(trunk, adapter, collection, alphas, config)
            inputs = {**settings, "alphas": each.alphas, "collected": record["digests"]}
            try:
                checkpoints.append(fit(f"align-{each.name}", adapter, losses, batches, lambda step: 1.0, config, log, out, inputs))
            except Diverged as error:
                if len(runs) == 1:
                    raise
                print(f"WARNING: left out: {error}")
                adapter.remove()
                continue
            end, own = distances(trunk, adapter, held_out, alphas, config.tokens_per_pass), adapter.factors()
            adapter.remove()
            factors[each.name] = own if below is None else stack(below, own)
            records[each.name] = {"settings": {**settings, **vars(config), "alpha": None, "strength": None, each.setting: each.value},
                                  "method": config.method, "model_digest": record["model_digest"], "alphas": each.alphas,
                                  "distance_start": start.tolist(), "distance_end": end.tolist()}
            for layer, a, b in zip(layers, start.tolist(), end.tolist()):
                print(f"  layer {layer}: held-out distance to the target {a:.3f} -> {b:.3f}" + (f" ({b / a:.2f} of it)" if a else ""))
            print(f"{each.name}: held-out distance {start.mean():.3f} -> {end.mean():.3f}")
        if not factors:
            raise UserError("no adapter of the sweep is left: lower --lr or the values")

        # saving
        trunk.to("meta")                      # makes room for a whole model, and still names the linears
        best = runs[0].name if len(runs) == 1 else score_sweep(factors, records, trunk, data.sample(pairs, SCORED, config.seed), config, settings, tokenizer)
    with new_stage(out / "align", "align", records[best]) as new:
        save_adapter(new, factors[best], trunk, config.model, config.lora_dropout)
    print(f"wrote {out / 'align'}: {best}" + (f", the best; all of them and their table are in {out / 'sweep'}" if len(runs) > 1 else ""))
    if factors[best].rank > 16:
        print(f"WARNING: the adapter has rank {factors[best].rank}; some servers take 16 at most by default")
    if config.merge:
        write_merged(out / "merged", factors[best], records[best]["settings"], load_model(config.model, dtype, device))
        print(f"wrote {out / 'merged'}: the whole model with {best} in its weights, for plain from_pretrained")
    elif (out / "merged").exists():
        print(f"{out / 'merged'} is of an earlier adapter")
    for checkpoint in checkpoints:            # once all is written
        checkpoint.remove()
    print(next_command("evaluate.py", config.out))


if __name__ == "__main__":
    run(main, Config)
