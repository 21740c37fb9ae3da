"""Stage 3: train a LoRA that moves the hidden states to b + α (h+ - h-) (paper section 3.3).

    python align.py                                      after collect.py
    python align.py --kl 2                               as strong as 2 nats allow
    python align.py --alpha 5                            the paper's α

Without an instruction, on <q, r>, with b, h+ and h- recorded by collect.py at the same positions:

    loss = mean over target layers l and recorded tokens of
           || A(π_lora, <q, r>, l) - (b_l + α (h+_l - h-_l)) ||_2

Three things are ours. --strength ρ sets α so that states move by ρ times their norm on average,
α = ρ / mean(|v|/|b|) with v = h+ - h-: a good ρ carries over between models better than a good α.
--rank k projects v on each layer's top k principal directions U [k, D]: v U^T U. And the last step
scales the adapter until its answers are --kl nats from the base's (see common/dial.py): how far one
goes is hard to know beforehand.

The LoRA is on blocks 0 to the highest target layer; training neither loads nor runs what is above
("trunk" means a model without its head). One collection serves many α. Writes OUT/METHOD/align, a
PEFT adapter for the original base model.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from common.answers import GenerationSettings
from common.checkpoint import Checkpoint
from common.collection import Collection, principal_directions
from common.config import TrainingSettings, UserError, run, setting
from common.data import shuffled_batches, split_into_passes
from common.dial import dial, scaled
from common.distributed import is_first, leave, share_of, sum_gradients
from common.hf import (
    check_same_model,
    choose_device,
    choose_layers,
    choose_tokens_per_pass,
    hidden_states,
    load_config,
    load_model,
    load_tokenizer,
    load_trunk,
)
from common.log import TrainingLog, check_tracker, open_log
from common.stage1 import check_adapters
from common.stages import (
    choose_method,
    claim,
    fill,
    inherit,
    next_command,
    read_stage,
    verified_path,
    write_stage,
)
from common.training import (
    check_batch_size,
    memory_summary,
    parameters_run,
    progress_bar,
)
from kernel import representation_loss, triton_unavailable_reason
from lora import LoRA, enable_only, load_adapter, save_adapter, stack

# What the settings are for real models where they are left empty: common/toy.py has those of the
# embedded default.
DEFAULTS = {"steps": 80, "batch_size": 16, "lr": 3e-4}
STRENGTH = 0.1
KL = 3.0

# prompts answered at a time, to measure the KL
DIAL_BATCH = 64


@dataclass
class Config(TrainingSettings):
    """The settings of this stage. Those that it shares with others are in common/config.py."""

    kl: float | None = setting(
        None,
        "scale the trained adapter until its answers are this many nats from the base's; empty "
        f"takes {KL:g}, unless a strength or α is given or comes from stage 1 (as in the embedded "
        "default): then it stays as it is",
        minimum=1e-3,
    )
    strength: float | None = setting(
        None,
        f"ρ: states move by this share of their norm, on average over tokens and layers; "
        f"empty takes {STRENGTH}, unless --alpha is given; the embedded default has its own",
    )
    alpha: float | None = setting(None, "α, as in the paper; empty takes what --strength says")
    rank: int | None = setting(
        None,
        "project v on this many top principal directions of each layer; empty takes all of v "
        "(the LoRA's own rank is --lora-rank)",
        minimum=1,
    )
    kind: Literal["l2", "mse"] = setting(
        "l2", "the norm, as in the authors' code, or its square over the width, as in the paper"
    )
    layers: list[str] | None = setting(
        None,
        "target layers among the collected ones, as in collect.py; empty takes all of them",
    )
    steps: int | None = setting(
        None,
        f"optimizer steps; empty takes {DEFAULTS['steps']}; the embedded default has its own",
        minimum=1,
    )
    batch_size: int | None = setting(
        None, f"responses in a step; empty takes {DEFAULTS['batch_size']}", minimum=1
    )
    lr: float | None = setting(
        None,
        f"learning rate, constant as in the authors' code; empty takes {DEFAULTS['lr']}; the "
        "embedded default has its own",
        minimum=0,
    )
    max_new_tokens: int = setting(
        64, "longest answer in tokens, of those that --kl is measured on", minimum=1
    )
    method: Literal["scit", "dual"] | None = setting(
        None, "whose collection to use; empty takes the one that is there"
    )
    limit: int | None = setting(
        None,
        "use this many collected responses, drawn at random; empty takes all",
        minimum=1,
        group="data",
    )
    model: str | None = setting(
        None, "the base model, if it has moved; empty takes collect's", group="data"
    )
    out: str = setting("out", "folder that all stages write to", group="run")
    seed: int | None = setting(
        None,
        "seed of the adapter's first weights, of the order of responses, of --limit and of the "
        "answers for --kl; empty takes collect's",
        group="run",
    )
    backend: Literal["auto", "torch", "triton"] = setting(
        "auto",
        "what computes the loss; auto takes the Triton kernel on a GPU where it runs, else PyTorch",
        group="run",
    )
    device: str | None = setting(
        None, "cpu, cuda or cuda:1; empty takes the GPU where there is one", group="run"
    )


def choose_alpha(config, ratios):
    """α of all layers: --alpha, or ρ / mean(|v_l|/|b_l|) with ρ = --strength.

    One α for all layers, as in the paper: |v|/|b| differs between layers, and an α for each would
    ask later blocks to undo what earlier ones did. ratios: mean |v_l|/|b_l| of each layer.
    """
    if config.alpha is not None:
        return config.alpha
    ratio = sum(ratios) / len(ratios)
    if not 0 < ratio < math.inf:
        raise UserError(
            f"--strength: |v|/|b| is {ratios} at layers {config.layers}: h+ and h- must differ; "
            "train stage 1 longer, or give --alpha"
        )
    return config.strength / ratio


def read_batch(collection, indices, trunk, adapter):
    """The CollectedBatch of some responses. Where b was not stored, it comes from the model with
    the adapter off."""
    batch = collection.read(indices, trunk.device)
    if batch.base is None:
        with torch.no_grad(), enable_only([], among=[adapter]):
            states = hidden_states(trunk, collection.layers, batch.ids)
        batch.base = [h.flatten(0, 1).index_select(0, batch.positions) for h in states]
    return batch


@torch.no_grad()
def validation_distances(trunk, adapter, validation, alpha, config):
    """Mean over validation tokens of || h - (b + α v) ||, per layer: list of L floats. config: with
    tokens_per_pass and backend."""
    norms = []
    everything = range(len(validation.responses))
    for part in split_into_passes(everything, validation.lengths, config.tokens_per_pass):
        batch = read_batch(validation, part, trunk, adapter)
        hidden = hidden_states(trunk, validation.layers, batch.ids)
        states = (batch.base, batch.plus, batch.minus, batch.positions)
        _, part_norms = representation_loss(hidden, *states, alpha, backend=config.backend)
        norms.append(part_norms)  # [L, T]
    return torch.cat(norms, 1).mean(1).tolist()


def train(trunk, adapter, collection, alpha, config, checkpoint_path, depends_on, write_line):
    """Train the adapter to move the hidden states to their targets."""
    layers, lengths = collection.layers, collection.lengths
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    checkpoint = Checkpoint(
        checkpoint_path, config, depends_on, adapter=adapter, optimizer=optimizer
    )
    batches = shuffled_batches(lengths, config.batch_size, config.seed, skip=checkpoint.step)
    bar = progress_bar("align", checkpoint.step, config.steps)
    # where b was not stored, the base model runs too
    flops_per_token = (4 if collection.has_base else 6) * parameters_run(trunk)
    log = TrainingLog(write_line, bar, flops_per_token)
    adapter.train()
    with checkpoint:
        for step in bar:
            indices = next(batches)
            recorded = sum(collection.recorded_lengths[i] for i in indices)
            loss = torch.zeros((), device=trunk.device)
            # this process's share; the loss is divided by the count of the whole batch
            share = share_of(indices)
            for part in split_into_passes(share, lengths, config.tokens_per_pass):
                # on a GPU the backward pass before may still be running meanwhile
                batch = read_batch(collection, part, trunk, adapter)
                # || A(π_lora, <q, r>, l) - (b + α (h+ - h-)) ||: L x [B, S, D] against L x [T, D].
                # To change the loss, edit torch_loss in kernel/ and take --backend torch.
                hidden = hidden_states(trunk, layers, batch.ids)
                part_loss, _ = representation_loss(
                    hidden,
                    batch.base,
                    batch.plus,
                    batch.minus,
                    batch.positions,
                    alpha,
                    kind=config.kind,
                    denom=len(layers) * recorded,
                    backend=config.backend,
                )
                part_loss.backward()
                loss += part_loss.detach()
                # free them before the next pass is read
                hidden = batch = None
            sum_gradients(adapter.parameters(), loss)
            norm = clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            input_tokens = sum(lengths[i] for i in indices)
            log.after_step(step, input_tokens, loss, lr=config.lr, grad_norm=norm)
            checkpoint.after_step(step, loss)
    adapter.eval()
    print(log.summary(trunk.device))


def choose_backend(backend, hidden_size, device):
    """What computes the loss, "torch" or "triton". UserError if Triton is asked for in vain."""
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return "torch"
    reason = triton_unavailable_reason(hidden_size, device)
    if not reason:
        return "triton"
    if backend == "triton":
        raise UserError(f"--backend triton: {reason}; use --backend torch")
    print(f"the loss is computed by plain PyTorch, not by the Triton kernel: {reason}")
    return "torch"


def main(config, target=None):
    """Train an adapter and write it to the folder target, by default OUT/METHOD/align."""
    manifest = complete_settings(config)
    collected, layers = manifest["settings"], config.layers
    folder = Path(config.out) / config.method
    collect_folder = folder / "collect"
    target = Path(target or folder / "align")
    with claim(target):
        # 1. what collect recorded
        device = choose_device(config.device)
        config.tokens_per_pass = choose_tokens_per_pass(config.tokens_per_pass, device)
        config.backend = choose_backend(config.backend, manifest["hidden_size"], device)
        ratios = [manifest["ratio"][collected["layers"].index(layer)] for layer in layers]
        alpha = choose_alpha(config, ratios)
        tokenizer = load_tokenizer(config.model)
        pad_id = tokenizer.pad_token_id
        collection = open_collection(collect_folder, manifest, "shards", layers, pad_id)
        validation = open_collection(collect_folder, manifest, "validation_shards", layers, pad_id)
        if config.limit:
            collection.keep_random(config.limit, config.seed)

        # 2. the model that b is of, and the new adapter on it
        trunk, stage1_weights = load_base(config, manifest, collect_folder, tokenizer, device)
        shares = project_on_directions(collection, validation, config, device)
        torch.manual_seed(config.seed)
        adapter = LoRA(
            trunk, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets
        )
        print_plan(config, alpha, ratios, shares, manifest, collection, trunk, adapter)

        # 3. train
        def distances(at_alpha):
            return validation_distances(trunk, adapter, validation, at_alpha, config)

        checkpoint_path = target.with_name(f".checkpoint-{target.name}")
        depends_on = {**collected, "chosen_alpha": alpha, "collected": manifest["digests"]}
        # at α 0 the target is b, and the new adapter changes nothing: what is left is rounding
        distance_floor = distances(0.0)
        distance_start = distances(alpha)
        with open_log(target.parent, target.name, config) as write_line:
            train(
                trunk, adapter, collection, alpha, config, checkpoint_path, depends_on, write_line
            )
        distance_end = distances(alpha)
        # the first process alone goes on to measure the KL
        leave()
        if not is_first():
            return

        # 4. stage 1's adapter is stacked in, so that the original base model is all it needs
        weights = adapter.weights()
        if stage1_weights is not None:
            weights = stack(stage1_weights, weights)

        # 5. scale it to the KL that was asked for; of the trunk only the structure is still needed
        forget_weights(trunk)
        scale, measured = 1.0, []
        if config.kl:
            prompts = validation.prompts(collected["last_prompt_token"])
            scale, measured = find_scale(weights, prompts, tokenizer, config, manifest, device)
            weights = scaled(weights, scale)

        # 6. save
        result = {
            "settings": {**collected, **vars(config)},
            "method": config.method,
            "inputs": manifest["inputs"],
            "adapters": manifest["adapters"],
            "alpha": alpha,
            "scale": scale,
            "kl_at_scale": measured,
            "distance_floor": distance_floor,
            "distance_start": distance_start,
            "distance_end": distance_end,
        }
        with write_stage(target, "align", result) as new:
            save_adapter(new, weights, trunk, config.model, config.lora_dropout)
        checkpoint_path.unlink(missing_ok=True)
    print_distances(layers, distance_floor, distance_start, distance_end)
    if config.kl:
        kl = dict(measured)[scale]
        print(f"scaled by {scale:.3g}: KL to the base {kl:.2f} nats")
    if target == folder / "align":
        print(f"wrote {target}")
        print_warnings(folder, weights)
        print(next_command("evaluate.py", config.out))


def open_collection(folder, manifest, key, layers, pad_id):
    """The Collection of the shards that a collection's manifest names under a key."""
    paths = [verified_path(folder, manifest, name) for name in manifest[key]]
    return Collection(paths, layers, manifest["settings"]["store"], pad_id)


def load_base(config, manifest, folder, tokenizer, device):
    """The model whose states are b, up to the highest target layer: (trunk, AdapterWeights of stage
    1, or None where b is of the original model). folder: the collection's.

    UserError where it is not the model that the collection is of.
    """
    collected = manifest["settings"]
    trunk = load_trunk(
        config.model,
        config.layers[-1] + 1,
        collected["dtype"],
        device,
        config.gradient_checkpointing,
        collected["quantize"],
    )
    check_same_model(config.model, tokenizer, manifest, folder)
    if collected["base"] == "original":
        return trunk, None
    weights = load_adapter(verified_path(folder, manifest, "base_adapter"), trunk)
    # its hooks keep it on the trunk, which from here on computes stage 1's model
    LoRA(trunk, weights=weights).requires_grad_(False).eval()
    return trunk, weights


def forget_weights(trunk):
    """Free the memory of a trunk's weights; its modules stay. (A quantized one cannot be moved to
    the device meta.)"""
    for module in trunk.modules():
        module._parameters.clear()
        module._buffers.clear()
        if hasattr(module, "state"):
            # a layer in 8 bits keeps its weight there, too
            module.state = None


def find_scale(weights, prompts, tokenizer, config, manifest, device):
    """The scale at which the adapter is config.kl nats from the base on some prompts, and
    [(scale, KL)] of all that were measured."""
    collected = manifest["settings"]
    return dial(
        load_model(config.model, collected["dtype"], device, quantize=collected["quantize"]),
        tokenizer,
        weights,
        prompts,
        manifest["end_token"],
        config.kl,
        GenerationSettings(config.max_new_tokens, DIAL_BATCH, config.seed),
        config.tokens_per_pass,
    )


def complete_settings(config):
    """Fill the empty settings from the collection that they choose. Returns its manifest.

    UserError where the settings contradict each other or the collection.
    """
    if config.alpha is not None and config.strength is not None:
        raise UserError("--alpha and --strength exclude each other: give one of them")
    check_tracker(config.report_to)
    required = {"scit": "collect", "dual": "collect"}
    config.method = choose_method(config.out, config.method, required, ["python collect.py"])
    folder = Path(config.out) / config.method / "collect"
    manifest = read_stage(folder, "collect", "python collect.py")
    check_adapters(config.out, config.method, manifest["adapters"])
    collected = manifest["settings"]
    if config.layers:
        n_blocks = load_config(config.model or collected["model"]).num_hidden_layers
        config.layers = choose_layers(config.layers, n_blocks)
    inherit(config, collected, ("model", "seed", "layers"), folder)
    choose_strength(config, collected.get("align", {}), folder)
    missing = [layer for layer in config.layers if layer not in collected["layers"]]
    if missing:
        raise UserError(
            f"--layers {missing[0]}: {folder} holds layers {collected['layers']}: "
            "collect it with `python collect.py --layers ...`"
        )
    check_batch_size(config.batch_size)
    if config.rank and config.rank > manifest["hidden_size"]:
        width = manifest["hidden_size"]
        raise UserError(
            f"--rank {config.rank}: hidden states of width {width} have {width} directions"
        )
    return manifest


def choose_strength(config, handed_on, folder):
    """Fill what the user left empty of the training's settings and of strength, alpha and kl.

    handed_on: the settings that the embedded default brings for this stage, {} for other models.
    """
    if config.alpha is not None:
        handed_on = {name: value for name, value in handed_on.items() if name != "strength"}
    fill(config, DEFAULTS, handed_on, folder)
    if config.strength is None and config.alpha is None:
        # nothing says how strong: train at the default ρ, then scale to --kl
        config.strength = STRENGTH
        config.kl = config.kl or KL


def project_on_directions(collection, validation, config, device):
    """With --rank k, make both collections read v U^T U, U [k, D] the top directions of v.

    Returns the share of Σ|v|² that they hold, per layer, or None without --rank.
    """
    if config.rank is None:
        return None
    differences = collection.differences(device, config.tokens_per_pass)
    directions, shares = principal_directions(differences, config.rank)
    collection.directions = validation.directions = directions
    return [share[config.rank - 1] for share in shares]


def print_plan(config, alpha, ratios, shares, manifest, collection, trunk, adapter):
    """Print what will be trained on what, layer by layer."""
    print(f"α {alpha:.3g}")
    for i, layer in enumerate(config.layers):
        moved = abs(alpha) * ratios[i]
        line = f"  layer {layer}: α|v|/|b| {moved:.2f}"
        if shares:
            line += f", {config.rank} directions hold {shares[i]:.0%} of |v|²"
        if moved > 0.8:
            line += "  WARNING: the model is likely to collapse near 1; lower the strength"
        print(line)
    lengths = collection.lengths
    gigabytes = manifest["tokens"] * manifest["token_bytes"] / 1e9
    adapted = sorted({name.rpartition(".")[2] for name in adapter.names})
    print(
        f"{memory_summary(trunk, adapter)}; base {manifest['settings']['base']}, "
        f"{len(lengths):,} responses of {sum(lengths) / len(lengths):.0f} tokens on average, "
        f"{gigabytes:.3g} GB of states on disk, {config.steps} steps of {config.batch_size}, "
        f"LoRA on {', '.join(adapted)}"
    )


def print_distances(layers, floor, start, end):
    """Print how far the validation states are from their targets before and after training, and
    what of it is the rounding of the model's dtype."""
    for layer, rounding, before, after in zip(layers, floor, start, end):
        line = f"  layer {layer}: validation distance to the target {before:.3f} -> {after:.3f}"
        line += f" ({after / before:.2f} of it)" if before else ""
        print(line + (f", rounding alone {rounding:.3f}" if rounding > 0.01 * before else ""))
    mean_start, mean_end = sum(start) / len(start), sum(end) / len(end)
    print(f"validation distance {mean_start:.3f} -> {mean_end:.3f}")


def print_warnings(folder, weights):
    """Print what a user of the new adapter in OUT/METHOD/align should know."""
    if weights.rank > 16:
        print(f"WARNING: the adapter has rank {weights.rank}; some servers take at most 16")
    for name in ("merged", "export"):
        if (folder / name).exists():
            print(f"{folder / name} holds an earlier adapter: run `python -m tools.export` again")


if __name__ == "__main__":
    run(main, Config, distributed=True)
