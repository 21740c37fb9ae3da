"""Where does the time of align.py's training step go? Traces a few steps, then times the loss.

    python -m tools.profile                              after collect.py

Runs align.py itself for some steps into a temporary folder; nothing is kept but the trace. Writes
OUT/METHOD/align_trace.json for chrome://tracing or ui.perfetto.dev, and prints the time of a step,
the share of loss and gradient in it, and the bandwidth that these reach.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.benchmark import Timer

import align
from common.config import Interrupted, run, setting
from kernel import bytes_moved, representation_loss

# Steps before the trace: compilation and the allocator's first calls stay out.
WARMUP_STEPS = 2
TRACED_STEPS = 5
TIMED_STEPS = 10


@dataclass
class Config(align.Config):
    """The settings of align.py, with another default for the number of steps."""

    steps: int = setting(
        WARMUP_STEPS + TRACED_STEPS + TIMED_STEPS, "optimizer steps to run", minimum=10
    )


class StepRecorder:
    """An optimizer hook that marks the training steps in a trace and takes the time of those
    after it."""

    def __init__(self):
        self.profiler = torch.profiler.profile()
        self.steps = 0
        self.mark = None
        self.times = []

    def __call__(self, optimizer, args, kwargs):
        self.steps += 1
        if self.mark:
            self.mark.__exit__(None, None, None)
            self.mark = None
        if self.steps == WARMUP_STEPS:
            self.profiler.start()
        if WARMUP_STEPS <= self.steps < WARMUP_STEPS + TRACED_STEPS:
            self.mark = torch.profiler.record_function("step")
            self.mark.__enter__()
        if self.steps == WARMUP_STEPS + TRACED_STEPS:
            self.profiler.stop()
        if self.steps >= WARMUP_STEPS + TRACED_STEPS:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    def seconds(self):
        """The median time from one optimizer step to the next."""
        return statistics.median(end - start for start, end in zip(self.times, self.times[1:]))


def time_loss(arguments, options):
    """(median seconds of loss and gradient of one forward pass, bytes that they move at least)."""
    hidden, base, plus, minus, *others = arguments

    def loss_and_gradient():
        loss, _ = representation_loss(hidden, base, plus, minus, *others, **options)
        torch.autograd.grad(loss, hidden)

    threads = torch.get_num_threads()
    timer = Timer("f()", globals={"f": loss_and_gradient}, num_threads=threads)
    seconds = timer.blocked_autorange(min_run_time=1).median
    return seconds, bytes_moved(hidden, base, plus, minus)


def main(config):
    # only the steps: no --kl
    config.kl = None
    if config.strength is None and config.alpha is None:
        config.strength = align.STRENGTH
    recorder = StepRecorder()
    # (arguments, options) of the first training pass
    calls = []

    def remember(*arguments, **options):
        """The loss itself; keeps copies of the inputs of the first training pass."""
        hidden = arguments[0]
        if not calls and torch.is_grad_enabled():
            copies = [h.detach().clone().requires_grad_() for h in hidden]
            calls.append(((copies, *arguments[1:]), options))
        return representation_loss(*arguments, **options)

    hook = register_optimizer_step_post_hook(recorder)
    patch = mock.patch.object(align, "representation_loss", remember)
    with tempfile.TemporaryDirectory() as folder, patch:
        try:
            align.main(config, Path(folder) / "profiled")
        except Interrupted:
            # its checkpoint goes with the folder: there is nothing to resume
            raise KeyboardInterrupt from None
        finally:
            hook.remove()
    step = recorder.seconds()
    loss, moved = time_loss(*calls[0])
    print(
        f"a step {step * 1e3:.3g} ms; loss and gradient {loss * 1e3:.3g} ms of it "
        f"({loss / step:.1%}), {moved / 1e6:.3g} MB at {moved / loss / 1e9:.3g} GB/s"
    )
    if torch.cuda.is_initialized():
        print("(states that fit the GPU's cache may be read from there)")
    path = Path(config.out) / config.method / "align_trace.json"
    recorder.profiler.export_chrome_trace(str(path))
    print(f"wrote {path}: open it at chrome://tracing or ui.perfetto.dev")


if __name__ == "__main__":
    run(main, Config)
