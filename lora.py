"""LoRA by hand (Hu et al. 2021): y = W x + s B A x on chosen linear layers, s = alpha / rank.

The adapter lives beside the model: a forward hook adds s B A x to the output of each linear layer.
So the base model's weights and module names stay untouched, `enabled = False` gives the base
model bit for bit, and several adapters on one model simply add up. The files are PEFT's:
adapter_model.safetensors and adapter_config.json.
"""

import contextlib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.config import UserError
from common.hf import find_blocks, find_linears, is_linear

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass
class AdapterWeights:
    """An adapter as plain tensors: {path of a linear layer in the trunk: (A [rank, in_features],
    B [out_features, rank])}. Its scale is alpha / rank."""

    tensors: dict
    rank: int
    alpha: float


class LoRA(nn.Module):
    """A trainable adapter on the linear layers of a trunk's blocks. As B starts at 0, a new
    adapter changes nothing."""

    def __init__(self, trunk, rank=8, alpha=16, dropout=0.0, targets="all-linear", weights=None):
        """targets: which linear layers, see common.hf.find_linears. weights: AdapterWeights to
        start from, with their rank and alpha; those of layers that the trunk lacks are skipped.
        UserError where the rank is more than any weight's."""
        super().__init__()
        self.rank = weights.rank if weights else rank
        self.alpha = weights.alpha if weights else alpha
        self.scale = self.alpha / self.rank
        self.dropout = dropout
        self.enabled = True
        linears = find_linears(trunk, targets)
        if weights:
            linears = {name: m for name, m in linears.items() if name in weights.tensors}
        else:
            largest = max(min(features(linear)) for linear in linears.values())
            if rank > largest:
                raise UserError(f"--lora-rank {rank}: the weights have rank {largest} at most")
        self.names = list(linears)
        # a plain list, so that the base model's layers are not submodules of the adapter
        self.linears = list(linears.values())
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.hooks = []
        for i, (name, linear) in enumerate(linears.items()):
            A, B = weights.tensors[name] if weights else self.initial_weights(linear)
            # fp32 whatever the base model's dtype: AdamW's small steps would be lost in bf16
            self.A.append(nn.Parameter(A.to(linear.weight.device, torch.float32)))
            self.B.append(nn.Parameter(B.to(linear.weight.device, torch.float32)))
            hook = functools.partial(self.add_to_output, i)
            self.hooks.append(linear.register_forward_hook(hook))

    def initial_weights(self, linear):
        """A [rank, in_features], random as in nn.Linear, and B [out_features, rank] = 0."""
        in_features, out_features = features(linear)
        A = torch.empty(self.rank, in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A, torch.zeros(out_features, self.rank)

    def add_to_output(self, i, linear, args, output):
        """Forward hook of the i-th linear layer: W x -> W x + s B A x."""
        if not self.enabled:
            return output
        x = F.dropout(args[0], self.dropout, self.training)  # [..., in_features]
        low_rank = F.linear(x, self.A[i].to(x.dtype)) * self.scale  # s A x: [..., rank]
        B = self.B[i].to(x.dtype)
        # addmm makes no second tensor of the output's size
        total = torch.addmm(output.flatten(0, -2), low_rank.flatten(0, -2), B.T)
        return total.view(output.shape)

    def remove(self):
        """Take the hooks off: the model is its base model again, for good."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def merge(self):
        """Add s B A to the base model's weights and take the hooks off."""
        for linear, A, B in zip(self.linears, self.A, self.B):
            delta = self.scale * B @ A  # [out_features, in_features]
            if isinstance(linear, Conv1D):
                delta = delta.T
            linear.weight.copy_(linear.weight.float() + delta)
        self.remove()

    def weights(self):
        """The adapter's AdapterWeights, detached, on the CPU."""
        tensors = {
            name: (A.detach().cpu(), B.detach().cpu())
            for name, A, B in zip(self.names, self.A, self.B)
        }
        return AdapterWeights(tensors, self.rank, self.alpha)


def features(linear):
    """(in_features, out_features) of a linear layer. (A quantized weight has another shape.)"""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


@contextlib.contextmanager
def enable_only(enabled, among):
    """Within the context, of the adapters `among` only those in `enabled` act on their model; with
    [] none of them does."""
    adapters = list(among)
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = any(adapter is other for other in enabled)
    try:
        yield
    finally:
        for adapter, was_enabled in zip(adapters, before):
            adapter.enabled = was_enabled


def stack(first, second):
    """Two adapters that add up, as one AdapterWeights of rank r1 + r2 and scale 1:

        s1 B1 A1 x + s2 B2 A2 x = [s1 B1, s2 B2] [A1; A2] x

    Where only one of them has a linear layer, the rows and columns of the other are zero, so that
    the rank is the same everywhere.
    """
    rank = first.rank + second.rank
    tensors = {}
    for name in {**first.tensors, **second.tensors}:
        A, B = first.tensors.get(name) or second.tensors[name]
        rows, columns = [], []
        for adapter in (first, second):
            zeros = (A.new_zeros(adapter.rank, A.shape[1]), B.new_zeros(len(B), adapter.rank))
            A_part, B_part = adapter.tensors.get(name) or zeros
            rows.append(A_part)
            columns.append(B_part * (adapter.alpha / adapter.rank))
        tensors[name] = torch.cat(rows), torch.cat(columns, 1)
    return AdapterWeights(tensors, rank, alpha=rank)


# ---------------------------------------------------------------- PEFT's files


def save_adapter(folder, weights, trunk, model_name, dropout=0.0):
    """Write AdapterWeights as PEFT does. The trunk, which may be cut, gives paths and layouts;
    model_name: the base model's folder or hub name, for PEFT."""
    prefix = f"base_model.model.{trunk.base_model_prefix}."
    tensors = {}
    for name, (A, B) in weights.tensors.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = B.contiguous()
    path, blocks = find_blocks(trunk)
    layers = sorted({block_number(name, path) for name in weights.tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name,
        "r": weights.rank,
        "lora_alpha": weights.alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": target_modules(weights.tensors, other_modules(weights, trunk, layers)),
        "layers_to_transform": layers,
        "layers_pattern": path.rpartition(".")[2],
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in blocks.modules()),
        "inference_mode": True,
        "modules_to_save": None,
    }
    save_file(tensors, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2)
    (Path(folder) / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def block_number(name, path):
    """The number of the block that a linear layer is in: 3 of "layers.3.mlp.down_proj"."""
    return int(name.removeprefix(f"{path}.").partition(".")[0])


def other_modules(weights, trunk, layers):
    """Paths of modules that PEFT must not match: all linear layers outside the blocks, and whatever
    else the adapted blocks `layers` hold, of which a cut trunk may lack some."""
    path, _ = find_blocks(trunk)
    others = set()
    for name, module in trunk.named_modules():
        if name.startswith(f"{path}."):
            other = block_number(name, path) in layers
        else:
            other = is_linear(module)
        if other:
            others.add(name)
    in_block = [name.removeprefix(f"{path}.").partition(".")[2] for name in weights.tensors]
    for layer in layers:
        others |= {f"{path}.{layer}.{name}" for name in in_block}
    return others - set(weights.tensors)


def target_modules(paths, others):
    """The shortest endings of module paths by which PEFT, which matches by suffix, takes `paths`
    and none of the others."""
    longest = max(path.count(".") + 1 for path in paths)
    for parts in range(1, longest + 1):
        names = sorted({".".join(path.split(".")[-parts:]) for path in paths})
        suffixes = tuple(f".{name}" for name in names)
        if not any(f".{other}".endswith(suffixes) for other in others):
            break
    return names


def load_adapter(folder, trunk):
    """The AdapterWeights that save_adapter wrote."""
    config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    prefix = f"base_model.model.{trunk.base_model_prefix}."
    matrices = {}
    for key, tensor in load_file(Path(folder) / ADAPTER_WEIGHTS).items():
        name, _, matrix = key.removeprefix(prefix).removesuffix(".weight").rpartition(".lora_")
        matrices.setdefault(name, {})[matrix] = tensor
    tensors = {name: (pair["A"], pair["B"]) for name, pair in matrices.items()}
    return AdapterWeights(tensors, config["r"], config["lora_alpha"])
