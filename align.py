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
import gc
import itertools
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
from files import Diverged, UserError, checked, choose_method, inherit, new_stage, next_command, open_log, read_stage, run, setting, write_json
from kernels import bytes_moved, representation_loss, response_index
from lora import CONFIG, WEIGHTS, LoRA, Training, descend, fit, load_adapter, only, save_adapter, sizes, stack
from model import find_linears, hidden_states, load_config, load_model, load_tokenizer, model_digest, pick_device, pick_layers, principal_directions
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
    strength: list[float] | None = setting(None, f"ρ: α per layer such that α|v|/|h| is ρ in the mean; empty: {STRENGTH}, unless --alpha is given; several: a sweep")
    rank: int | None = setting(None, "use v's part on so many top directions a layer; empty: all of v, or what was collected", least=1)
    kind: Literal["l2", "mse"] = setting("l2", "the norm, as in the authors' code, or its square, as in the paper")
    layers: list[str] | None = setting(None, "target layers, of those collected, numbers or names as in collect.py; empty takes them all")
    steps: int = setting(150, "optimiser steps", least=1)
    batch_size: int = setting(16, "responses in a step", least=1)
    lr: float = setting(1e-3, "learning rate, constant", least=0)
    limit: int | None = setting(None, "use the first collected responses only", least=1)
    merge: bool = setting(False, "also write OUT/METHOD/merged: the whole model with the adapter in its weights")
    judge: str | None = setting(None, "of a sweep: module:function that scores (prompt, response); empty inherits")
    reward_model: str | None = setting(None, "of a sweep: a sequence classifier of one label, folder or hub name")
    max_new_tokens: int = setting(64, "of a sweep: longest answer", least=1)
    profile: bool = setting(False, "trace a few steps, tell the loss kernel's share and bandwidth, and end")
    model: str | None = setting(None, "the base model, where it has moved; empty inherits from collect")
    seed: int | None = setting(None, "seed of the adapter and the order; empty inherits")


def find_directions(collection, folder, record, layers, rank, device):
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
    directions, shares = principal_directions(collection.differences(device), rank)
    return [U.to(getattr(torch, settings["dtype"])) for U in directions], [share[rank - 1] for share in shares]


def targets(collection, groups, trunk, adapter, pad_id, device):
    """For each group of collected responses (Batch, base, plus, minus), read one step ahead; b, h+ and h- are lists of L tensors [T, D]."""
    def read(group):
        return data.collate(collection.examples(group), pad_id, device), *collection.states(group, device)
    for batch, base, plus, minus in data.one_ahead(read, groups, device):
        if base is None:                      # not stored: the states of the model with the adapter off
            with torch.no_grad(), only([adapter]):
                base = [h[batch.response] for h in hidden_states(trunk, collection.layers, batch.ids, batch.attention)]
        yield batch, base, plus, minus


def alignment_loss(hidden, collection, batch, base, plus, minus, alphas, kind="l2", tokens=None):
    """mean || A(π_lora, <q, r>, l) - (b_l + α_l (h+_l - h-_l)) ||_2, and the norms [L, T]. hidden: L x [B, S, D]; alphas: [L];
    tokens: those of a whole step of which this is a part."""
    return representation_loss(hidden, base, plus, minus, response_index(batch.response), alphas, kind=kind, directions=collection.directions,
                               denom=tokens and len(hidden) * tokens)


@torch.no_grad()
def distances(trunk, adapter, held_out, alphas, pad_id, device, batch_size):
    """Mean over held-out tokens of || h - (b + α v) || per layer: [L]."""
    norms, groups = [], iter(torch.arange(len(held_out.items)).split(batch_size))
    for batch, *states in targets(held_out, groups, trunk, adapter, pad_id, device):
        norms.append(alignment_loss(hidden_states(trunk, held_out.layers, batch.ids, batch.attention), held_out, batch, *states, alphas)[1])
    return torch.cat(norms, 1).mean(1)


def train(trunk, adapter, collection, alphas, config, pad_id, device, log, name, folder, inputs):
    """Move the adapter's hidden states to their targets, config.steps steps over batches of collected responses (--profile: trace and
    time a step instead). Returns the checkpoint, to be removed when the adapter is written; folder: for it; inputs: all that it
    depends on."""
    def batches(done):
        """The parts of each step; all parts in a row are read ahead, by draws."""
        nonlocal draws
        groups = data.endless_batches(collection.lengths[:config.limit], config.batch_size, config.seed, done)
        steps, ahead = itertools.tee(data.parts(group, collection.lengths, config.tokens_per_pass) for group in groups)
        draws = targets(collection, itertools.chain.from_iterable(ahead), trunk, adapter, pad_id, device)
        return steps

    def losses(parts):
        """The loss of a step, in parts that fit a forward pass."""
        tokens = sum(collection.recorded(i) for part in parts for i in part)
        for _ in parts:
            batch, *states = next(draws)                                                   # b, h+, h-: L x [T, D]
            hidden = hidden_states(trunk, collection.layers, batch.ids, batch.attention)   # A(π_lora, <q, r>, l): L x [B, S, D]
            yield alignment_loss(hidden, collection, batch, *states, alphas, config.kind, tokens)[0]
    draws = None
    if config.profile:
        from kernels.bench import profile     # with what only a benchmark needs
        steps, optimizer, scaler = batches(0), torch.optim.AdamW(adapter.parameters(), lr=config.lr), torch.amp.GradScaler(device.type, enabled=trunk.dtype == torch.float16)
        batch, *states = next(draws)
        hidden = [h.detach().requires_grad_() for h in hidden_states(trunk, collection.layers, batch.ids, batch.attention)]
        return profile(lambda: descend(losses(next(steps)), adapter.train(), optimizer, scaler),
                       lambda: torch.autograd.grad(alignment_loss(hidden, collection, batch, *states, alphas, config.kind)[0], hidden),
                       bytes_moved(hidden, *states, collection.directions), Path(config.out) / "align_trace.json")
    return fit(name, adapter, losses, batches, lambda step: 1.0, config, trunk.dtype, device, log, folder / f".checkpoint-align-{name}", inputs)


def score_sweep(factors, pairs, config, settings, tokenizer, device, folder):
    """Score every adapter {name: Factors} and their base on held-out pairs; writes sweep.json and sweep.md. Returns the best's name."""
    dtype = getattr(torch, settings["dtype"])
    scorers = {"judge": load_judge(config.judge)} if config.judge else {}
    if config.reward_model:
        scorers["reward"] = load_reward_model(config.reward_model, dtype, device, config.batch_size)
    adapters = {"base": (None, "plain"), **{name: (adapter, "plain") for name, adapter in factors.items()}}
    reports, _ = score_models(load_model(config.model, dtype, device), adapters, tokenizer, pairs, scorers, config.max_new_tokens, config.batch_size, config.seed)
    best, why = choose(reports)
    write_json(folder / "sweep.json", {"best": best, "why": why, "pairs": len(pairs), "models": reports, "settings": {**settings, **vars(config)}})
    (folder / "sweep.md").write_text(f"{table(reports)}\n\nbest: {best}, {why}\n")
    print((folder / "sweep.md").read_text())
    return best


def main(config):
    # what collect says
    method = choose_method(config.out, config.method, dict.fromkeys(("scit", "dual"), "collect"), ["python collect.py"])
    folder = Path(config.out) / method / "collect"
    record = read_stage(folder, "collect", "python collect.py")
    settings = record["settings"]
    if config.layers:
        config.layers = pick_layers(config.layers, load_config(config.model or settings["model"]).num_hidden_layers)
    inherit(config, {"judge": None, **settings}, ("model", "seed", "layers", "judge"), folder)
    layers, device = config.layers, pick_device(config.device)
    missing = [layer for layer in layers if layer not in settings["layers"]]
    if missing:
        raise UserError(f"--layers {missing[0]}: {folder} holds layers {settings['layers']}: collect it with `python collect.py --layers ...`")
    if config.alpha and config.strength:
        raise UserError("--alpha and --strength exclude each other: give one of them")
    if not config.alpha and not config.strength:
        config.strength = [STRENGTH]
    ratio = [record["ratio"][settings["layers"].index(layer)] for layer in layers]           # mean |v|/|h|
    if config.strength and not all(0 < r < math.inf for r in ratio):
        raise UserError(f"--strength: {folder} has |v|/|h| {ratio} at layers {layers}: h+ and h- must differ; train stage 1 longer, or give --alpha")
    runs = [Run(f"alpha_{alpha:g}", "alpha", alpha, [alpha] * len(layers)) for alpha in config.alpha or ()]
    runs += [Run(f"strength_{rho:g}", "strength", rho, [rho / r for r in ratio]) for rho in config.strength or ()]
    if len({r.name for r in runs}) < len(runs) or not all(math.isfinite(r.value) for r in runs):
        raise UserError(f"--{runs[0].setting} {' '.join(f'{r.value:g}' for r in runs)}: give finite values, each once")
    tokenizer, dtype = load_tokenizer(config.model), getattr(torch, settings["dtype"])
    if len(runs) > 1:                         # what the end of a sweep needs fails at its start
        if config.judge:
            load_judge(config.judge)
        if config.reward_model:
            check_reward_model(config.reward_model)
        pairs = data.sample(data.prepare(settings["data"], ("valid",), tokenizer, settings["max_length"], settings["seed"], None, settings["positive"],
                                         settings["negative"], settings["template"])["valid"], SCORED, config.seed)
    collection = data.Collection([checked(folder, record, name) for name in record["shards"]], layers, settings["store"])
    held_out = data.Collection([checked(folder, record, "heldout.safetensors")], layers, settings["store"])

    # the base up to the highest target layer, with its adapter where there is one
    trunk = load_model(config.model, dtype, device, blocks=layers[-1] + 1, checkpointing=config.gradient_checkpointing)
    if model_digest(config.model) != record["model_digest"]:
        raise UserError(f"{folder} was made for another model than --model {config.model}: run `python collect.py` again")
    adapted = {path.rpartition(".")[2] for path in find_linears(trunk, config.lora_targets)}
    below = None
    if settings["base"] == "instructed":
        below = load_adapter(checked(folder, record, "base_adapter"), trunk)
        LoRA(trunk, factors=below).requires_grad_(False).eval()
    collection.directions, shares = find_directions(collection, folder, record, layers, config.rank, device)
    held_out.directions = collection.directions
    for each in runs:
        for layer, alpha, r, share in zip(layers, each.alphas, ratio, shares):
            print(f"  {each.name}, layer {layer}: α {alpha:.3g}, α|v|/|h| {abs(alpha) * r:.2f}"
                  + (f", {len(collection.directions[0])} directions hold {share:.0%} of |v|²" if share is not None else "")
                  + ("  WARNING: near 1 or above, expect the model to collapse; lower the strength" if abs(alpha) * r > 0.8 else ""))
    print(f"layers {layers}, base {settings['base']}: {len(collection.lengths[:config.limit]):,} responses of "
          f"{sum(collection.lengths) / len(collection.lengths):.0f} tokens in the mean, {record['tokens'] * record['token_bytes'] / 1e9:.3g} GB of states on disk, "
          f"{len(runs)} times {config.steps} steps of {config.batch_size}, LoRA on {', '.join(sorted(adapted))}")

    # training; a written adapter applies to the original base alone
    def train_one(each, written, log):
        torch.manual_seed(config.seed)
        adapter, alphas = LoRA(trunk, config.lora_rank, config.lora_alpha, config.lora_dropout, targets=config.lora_targets), torch.tensor(each.alphas, device=device)
        print(f"{each.name}: {sizes(trunk, adapter)}")
        try:
            start = distances(trunk, adapter, held_out, alphas, tokenizer.pad_token_id, device, config.batch_size)
            inputs = {**settings, **vars(config), "alphas": each.alphas, "collected": record["digests"]}
            checkpoint = train(trunk, adapter, collection, alphas, config, tokenizer.pad_token_id, device, log, each.name, out, inputs)
            if config.profile:
                return None
            checkpoints.append(checkpoint)
            end = distances(trunk, adapter, held_out, alphas, tokenizer.pad_token_id, device, config.batch_size)
        finally:
            adapter.remove()
        factors = adapter.factors() if below is None else stack(below, adapter.factors())
        result = {"settings": {**settings, **vars(config), "alpha": None, "strength": None, each.setting: each.value}, "method": method,
                  "model_digest": record["model_digest"], "alphas": each.alphas, "distance_start": start.tolist(), "distance_end": end.tolist()}
        with new_stage(written, "align", result) as new:
            save_adapter(new, factors, trunk, config.model, config.lora_dropout)
        for layer, a, b in zip(layers, result["distance_start"], result["distance_end"]):
            print(f"  layer {layer}: held-out distance to the target {a:.3f} -> {b:.3f}" + (f" ({b / a:.2f} of it)" if a else ""))
        print(f"{each.name}: held-out distance {start.mean():.3f} -> {end.mean():.3f}")
        return factors

    out, checkpoints = Path(config.out) / method, []
    with open_log(config.out, "align") as log:
        if len(runs) == 1 or config.profile:
            best, factors = runs[0].name, {runs[0].name: train_one(runs[0], out / "align", log)}
            if config.profile:
                return
            del trunk
        else:
            factors = {}
            with new_stage(out / "sweep", "sweep", {"settings": {**settings, **vars(config)}, "method": method}) as new:
                for each in runs:
                    try:
                        factors[each.name] = train_one(each, new / each.name, log)
                    except Diverged as error:
                        print(f"WARNING: left out: {error}")
                if not factors:
                    raise UserError("no adapter of the sweep is left: lower --lr or the values")
                del trunk
                gc.collect()                  # hooks hold it in cycles, and the whole model comes next
                best = score_sweep(factors, pairs, config, settings, tokenizer, device, new)
            chosen = read_stage(out / "sweep" / best, "align", "python align.py")
            with new_stage(out / "align", "align", {key: value for key, value in chosen.items() if key not in ("kind", "version", "made_by", "digests")}) as new:
                for file in (CONFIG, WEIGHTS):
                    shutil.copy(out / "sweep" / best / file, new / file)
            print(f"{best} is the best; all of them and their table are in {out / 'sweep'}")
    for checkpoint in checkpoints:
        checkpoint.remove()
    print(f"wrote {out / 'align'}: {best}")
    if factors[best].rank > 16:
        print(f"WARNING: the adapter has rank {factors[best].rank}; some servers take 16 at most by default")
    if config.merge:
        gc.collect()
        model = load_model(config.model, dtype, device)
        LoRA(model.base_model, factors=factors[best]).merge()
        with new_stage(out / "merged", "merged", {"settings": read_stage(out / "align", "align", "")["settings"]}) as new:
            model.save_pretrained(new)
            AutoTokenizer.from_pretrained(config.model).save_pretrained(new)
        print(f"wrote {out / 'merged'}: the whole model with {best} in its weights, for plain from_pretrained")
    elif (out / "merged").exists():
        print(f"{out / 'merged'} is of an earlier adapter")
    print(next_command("evaluate.py", config.out))


if __name__ == "__main__":
    run(main, Config)
