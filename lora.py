"""LoRA by hand (Hu et al. 2021): y = W x + s B A x on chosen linears, s = alpha / rank.

The adapter lives beside the model: a forward hook adds s B A x to each target's output. So the base's
weights and module names stay untouched, `enabled = False` gives the base bit for bit, and several adapters
on one model simply add up. Files are PEFT's: adapter_model.safetensors and adapter_config.json.
"""
import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from checkpoint import Checkpoint
from files import Diverged, setting
from model import find_blocks, find_linears

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Training:
    """Settings of every stage that trains an adapter."""
    tokens_per_pass: int | None = setting(None, "most tokens in a forward pass, padding included: a step's batch is cut, its gradient is the "
                                                "same; empty takes 4096 on a GPU, 2048 on the CPU", least=1)
    lora_rank: int = setting(8, "rank of the adapter", least=1)
    lora_alpha: float = setting(16, "the adapter's scale is lora_alpha / lora_rank")
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", least=0, most=1)
    lora_targets: str = setting("all-linear", "linears to adapt: all-linear, attention, or names such as q_proj,v_proj")
    gradient_checkpointing: bool = setting(False, "run blocks again in the backward: less memory, more time")
    checkpoint_minutes: float = setting(10, "how often a run is saved to go on from, should it be cut off", least=0)
    restart: bool = setting(False, "begin anew where an earlier run was cut off")


@dataclass
class Factors:
    """An adapter as plain tensors: {path of a linear in the trunk: (A [rank, in], B [out, rank])}, scale = alpha / rank."""
    weights: dict
    rank: int
    alpha: float


class LoRA(nn.Module):
    """A trainable adapter on the linears of blocks 0..blocks-1 of a trunk; the identity until trained (B = 0)."""

    def __init__(self, trunk, rank=8, alpha=16, dropout=0.0, blocks=None, targets="all-linear", factors=None):
        """targets: see model.find_linears. factors: take A and B (and rank and alpha) from there instead of fresh ones;
        those of blocks that the trunk lacks are left out."""
        super().__init__()
        self.enabled, self.dropout = True, dropout
        self.rank, self.alpha = (factors.rank, factors.alpha) if factors else (rank, alpha)
        self.scale = self.alpha / self.rank
        linears = find_linears(trunk, targets, blocks)
        if factors:
            linears = {name: linear for name, linear in linears.items() if name in factors.weights}
        self.names, self.A, self.B, self.handles = list(linears), nn.ParameterList(), nn.ParameterList(), []
        self.linears = list(linears.values())                 # a plain list: not submodules of the adapter
        for i, (name, linear) in enumerate(linears.items()):
            if factors:
                A, B = factors.weights[name]
            else:
                to, of = linear.weight.shape[::-1] if isinstance(linear, Conv1D) else linear.weight.shape       # Conv1D stores [in, out]
                A, B = torch.empty(rank, of), torch.zeros(to, rank)
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            # fp32 whatever the base's dtype: AdamW's small steps would be lost in bf16
            self.A.append(nn.Parameter(A.to(linear.weight.device, torch.float32)))
            self.B.append(nn.Parameter(B.to(linear.weight.device, torch.float32)))
            self.handles.append(linear.register_forward_hook(self._hook(i)))

    def _hook(self, i):
        def add(linear, args, output):
            if self.enabled:
                x = F.dropout(args[0], self.dropout, self.training)
                low = F.linear(x, self.A[i].to(x.dtype)) * self.scale                        # s A x: [..., rank]
                sum_ = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.B[i].to(x.dtype).T)      # W x + s B A x
                return sum_.view(output.shape)
        return add

    def remove(self):
        """Take the hooks off: the model is its base again for good."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def merge(self):
        """Add s B A to the base's weights and take the hooks off."""
        for linear, A, B in zip(self.linears, self.A, self.B):
            delta = self.scale * B @ A                                                       # [out, in]
            delta = delta.T if isinstance(linear, Conv1D) else delta
            linear.weight.copy_(linear.weight.float() + delta)
        self.remove()

    def factors(self):
        """The adapter's tensors, detached, on the CPU."""
        weights = {name: (A.detach().cpu(), B.detach().cpu()) for name, A, B in zip(self.names, self.A, self.B)}
        return Factors(weights, self.rank, self.alpha)


def sizes(model, *adapters):
    """Words on what a model and its adapters hold in memory, and the adapters on disk; trained weights have a gradient and two moments."""
    held, trained = sum(p.nbytes for p in model.parameters()), sum(p.numel() for adapter in adapters for p in adapter.parameters())
    return f"{sum(p.numel() for p in model.parameters()):,} parameters ({held / 1e9:.3g} GB)" + (
        f" and {trained:,} trained ones ({16 * trained / 1e9:.3g} GB with gradient and Adam, {4 * trained / 1e9:.3g} GB written)" if trained else "")


def descend(losses, adapter, optimizer, scaler):
    """One optimiser step on the sum of the losses, each made when its turn has come. Returns the sum, detached.

    Gradients are clipped to norm 1; scaler (torch.amp.GradScaler) keeps those of fp16 from vanishing.
    """
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def cosine(steps):
    """The learning rate's factor at a step: 10% warm-up, then a cosine to 0."""
    warm_up = max(1, steps // 10)
    return lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(name, adapter, losses, batches, factor, config, log, folder, inputs, more=dict):
    """config.steps steps of AdamW on an adapter. Returns the checkpoint, to be removed once the adapter is written. Diverged at NaN.

    losses: function of a batch, yields the parts of its loss; batches: function of n, an iterator over all batches but the first n;
    factor: function of the step, of the learning rate; folder: for the checkpoint; inputs: what the run depends on besides config;
    more: function without arguments, what else to log.
    """
    weight = adapter.linears[0].weight
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(weight.device.type, enabled=weight.dtype == torch.float16)
    checkpoint = Checkpoint(Path(folder) / f".checkpoint-{name}", {**inputs, **vars(config)}, config,
                            adapter=adapter, optimizer=optimizer, schedule=schedule, scaler=scaler)
    drawn = batches(checkpoint.step)
    adapter.train()
    bar = tqdm(range(checkpoint.step + 1, config.steps + 1), desc=name, unit="step", initial=checkpoint.step, total=config.steps)
    with checkpoint:
        for step in bar:
            loss = descend(losses(next(drawn)), adapter, optimizer, scaler)
            if not (loss.isfinite() and (step < config.steps or all(p.isfinite().all() for p in adapter.parameters()))):
                checkpoint.remove()           # nothing of it is to go on
                what = "NaN or infinite numbers in the adapter" if loss.isfinite() else f"the loss is {loss.item()}"
                raise Diverged(f"{name}: {what} at step {step}: lower --lr")
            schedule.step()
            if step % 10 == 0 or step == config.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                log(adapter=name, step=step, loss=loss.item(), lr=schedule.get_last_lr()[0], **more())
            checkpoint.after(step)
        checkpoint.save(config.steps)         # what follows may be cut off
        checkpoint.check()
    checkpoint.parts = {}                     # they hold the model
    adapter.eval()
    return checkpoint


@contextlib.contextmanager
def only(adapters, *on):
    """Within the block, just the adapters `on` are enabled, of all those given."""
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = any(adapter is o for o in on)
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before):
            adapter.enabled = enabled


def stack(first, second):
    """Two adapters that add up as one of rank r1 + r2, with scale 1:

        s1 B1 A1 x + s2 B2 A2 x = [s1 B1, s2 B2] [A1; A2] x

    Where only one of them has a linear, the other's rows and columns are zero, so that the rank is uniform.
    """
    weights, rank = {}, first.rank + second.rank
    for name in {**first.weights, **second.weights}:
        A, B = first.weights.get(name) or second.weights[name]               # for their sizes: [rank, in], [out, rank]
        both = [f.weights.get(name) or (A.new_zeros(f.rank, A.shape[1]), B.new_zeros(len(B), f.rank)) for f in (first, second)]
        weights[name] = torch.cat([A for A, _ in both]), torch.cat([B * (f.alpha / f.rank) for f, (_, B) in zip((first, second), both)], 1)
    return Factors(weights, rank, alpha=rank)


# ---------------------------------------------------------------- PEFT's on-disk form

def save_adapter(folder, factors, trunk, base_model, dropout=0.0):
    """Write an adapter as PEFT does. `trunk` gives the paths and layouts; it may be a cut one."""
    prefix = f"base_model.model.{trunk.base_model_prefix}."
    tensors = {f"{prefix}{name}.lora_{x}.weight": tensor.contiguous()
               for name, both in factors.weights.items() for x, tensor in zip("AB", both)}
    path, blocks = find_blocks(trunk)
    inside = [name.removeprefix(path + ".").partition(".") for name in factors.weights]        # (block, ".", linear)
    layers = sorted({int(block) for block, _, _ in inside})
    # what a name must not match: the trunk's other linears, and, of the blocks adapted (a cut trunk lacks some), those left out
    others = {name for name, m in trunk.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and not name.startswith(f"{path}.")}
    others |= {f"{path}.{i}.{name}" for i in layers for name in {name for _, _, name in inside}}
    others |= {name for name in find_linears(trunk) if int(name.removeprefix(path + ".").partition(".")[0]) in layers}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": factors.rank, "lora_alpha": factors.alpha, "lora_dropout": dropout, "bias": "none",
        "target_modules": target_names(factors.weights, others),
        "layers_to_transform": layers,
        "layers_pattern": path.rpartition(".")[2],
        "fan_in_fan_out": any(isinstance(m, Conv1D) for m in blocks.modules()),
        "inference_mode": True, "modules_to_save": None,
    }
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2))


def target_names(paths, others):
    """The shortest endings of module paths by which PEFT's suffix match finds `paths` and none of the others."""
    for parts in range(1, 1 + max(path.count(".") + 1 for path in paths)):
        names = sorted({".".join(path.split(".")[-parts:]) for path in paths})
        if not any(f".{other}".endswith(tuple(f".{name}" for name in names)) for other in others if other not in paths):
            break
    return names


def load_adapter(folder, trunk):
    """What save_adapter has written, as Factors. A stage's digests and its model's have been compared before."""
    config, tensors = json.loads((Path(folder) / CONFIG).read_text()), load_file(Path(folder) / WEIGHTS)
    prefix = f"base_model.model.{trunk.base_model_prefix}."
    names = dict.fromkeys(key.removeprefix(prefix).rpartition(".lora_")[0] for key in tensors)
    weights = {name: tuple(tensors[f"{prefix}{name}.lora_{x}.weight"] for x in "AB") for name in names}
    return Factors(weights, config["r"], config["lora_alpha"])
