"""What the stages share: learning rate, progress bar, speed and memory in words."""

import math

import torch
from tqdm import tqdm

from common import distributed
from common.config import UserError

# FLOPs per second of dense bf16 matrix products, by the data sheets. The first key that is part of
# the GPU's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def cosine_with_warmup(steps):
    """lr_lambda of a schedule: 10% linear warm-up, then a cosine to 0."""
    warmup_steps = max(1, steps // 10)

    def lr_lambda(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min((step + 1) / warmup_steps, cosine)

    return lr_lambda


def check_batch_size(batch_size):
    """UserError if there are more processes than examples in a full step."""
    if batch_size < distributed.WORLD_SIZE:
        raise UserError(
            f"--batch-size {batch_size}: {distributed.WORLD_SIZE} processes share a step's batch: "
            "raise it, or lower torchrun's --nproc-per-node"
        )


def progress_bar(description, steps_done, steps):
    """A tqdm bar that yields the numbers of the remaining steps, steps_done + 1 to steps."""
    return tqdm(
        range(steps_done + 1, steps + 1),
        desc=description,
        unit="step",
        initial=steps_done,
        total=steps,
        disable=not distributed.is_first(),
    )


def memory_summary(model, *adapters):
    """How much memory a model and its adapters take, in words.

    A trained weight in fp32 has a gradient and Adam's two moments beside it: 16 bytes.
    """
    # not p.numel(): of a 4-bit weight two are in one byte
    parameters = model.num_parameters()
    model_bytes = sum(p.nbytes for p in model.parameters())
    summary = f"{parameters:,} parameters ({model_bytes / 1e9:.3g} GB)"
    if adapters:
        trained = sum(p.numel() for adapter in adapters for p in adapter.parameters())
        summary += (
            f" and {trained:,} trained ones ({16 * trained / 1e9:.3g} GB with gradient and Adam, "
            f"{4 * trained / 1e9:.3g} GB on disk)"
        )
    return summary


def parameters_run(model):
    """The parameters that a token is multiplied with: all but the embedding table, which is only
    looked up, unless it is the head as well. (The head sees response tokens alone, and each token
    few of the experts where there are some: there this is too many.)"""
    count = model.num_parameters()
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        count -= embedding.numel()
    return count


def speed_summary(tokens, seconds, flops_per_token, device):
    """Tokens per second, and on a GPU the share of its peak that is used (MFU), in words.

    tokens: of the inputs, without padding. flops_per_token: 2 for each parameter that a token is
    multiplied with in a forward pass, 4 in a forward and backward pass of an adapter on a frozen
    model (the backward needs the gradient of the activations alone). What the attention to other
    tokens takes is left out, as is usual:

        MFU = tokens * flops_per_token / (seconds * the GPUs' peak of dense bf16 products)
    """
    rate = tokens / max(seconds, 1e-9)
    summary = f"{tokens:,} tokens in {seconds:.1f} s, {rate:,.0f} tokens/s"
    if peak := distributed.WORLD_SIZE * peak_flops(device):
        summary += f", MFU {rate * flops_per_token / peak:.2f}"
    return summary


def peak_flops(device):
    """FLOPs per second of dense bf16 products on a GPU, or 0 where that is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    return 0
