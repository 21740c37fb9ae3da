"""What the training loops of the stages share: learning rate, progress bar, memory in words."""

import math

from tqdm import tqdm


def cosine_with_warmup(steps):
    """lr_lambda of a schedule: 10% linear warm-up, then a cosine to 0."""
    warmup_steps = max(1, steps // 10)

    def lr_lambda(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min((step + 1) / warmup_steps, cosine)

    return lr_lambda


def progress_bar(description, steps_done, steps):
    """A tqdm bar that yields the numbers of the remaining steps, steps_done + 1 to steps."""
    return tqdm(
        range(steps_done + 1, steps + 1),
        desc=description,
        unit="step",
        initial=steps_done,
        total=steps,
    )


def memory_summary(model, *adapters):
    """How much memory a model and its adapters take, in words.

    A trained weight in fp32 has a gradient and Adam's two moments beside it: 16 bytes.
    """
    parameters = sum(p.numel() for p in model.parameters())
    model_bytes = sum(p.nbytes for p in model.parameters())
    summary = f"{parameters:,} parameters ({model_bytes / 1e9:.3g} GB)"
    if adapters:
        trained = sum(p.numel() for adapter in adapters for p in adapter.parameters())
        summary += (
            f" and {trained:,} trained ones ({16 * trained / 1e9:.3g} GB with gradient and Adam, "
            f"{4 * trained / 1e9:.3g} GB on disk)"
        )
    return summary
