"""How much a reader must follow: the project's functions that one step of each stage enters.

A function counts once, however often it is called. Lambdas and comprehensions do not count.
"""

import os
import sys

import pytest
import torch
from helpers import CPU, ROOT, go, stage1_source
from torch.optim.optimizer import register_optimizer_step_post_hook

import align
import collect
import dual
import scit

PROJECT, TESTS = f"{ROOT}/", f"{ROOT}/tests/"

# without a GPU, Triton's interpreter runs the kernels on the CPU, as Python functions
TRITON_DEVICE = "cpu" if "TRITON_INTERPRET" in os.environ else "cuda"
KERNELS = {"loss_kernel", "pick", "scale_kernel"}


class StepCounter:
    """Within the context, notes the project's functions and methods that are entered from one call
    of next_step() to the next. steps: sets of "file: qualified name"."""

    def __init__(self):
        self.steps = []
        self.entered = None

    def __enter__(self):
        sys.setprofile(self.note)
        return self

    def __exit__(self, *exception):
        sys.setprofile(None)

    def note(self, frame, event, _):
        code = frame.f_code
        path = code.co_filename
        if self.entered is None or event != "call" or not path.startswith(PROJECT):
            return
        if path.startswith(TESTS) or code.co_name.startswith("<") or code.co_name in KERNELS:
            return
        self.entered.add(f"{path.removeprefix(PROJECT)}: {code.co_qualname}")

    def next_step(self, *_):
        if self.entered is not None:
            self.steps.append(self.entered)
        self.entered = set()

    def check(self, maximum):
        """Fail if a step entered more functions than this."""
        largest = max(self.steps, key=len)
        names = "\n".join(sorted(largest))
        assert len(largest) <= maximum, f"{len(largest)} functions in one step:\n{names}"


def count_training_steps(stage, *args):
    """A StepCounter of a run, from its first optimizer step to its last."""
    counter = StepCounter()
    hook = register_optimizer_step_post_hook(counter.next_step)
    try:
        # the backward pass runs in this thread, on a GPU too
        with torch.autograd.set_multithreading_enabled(False), counter:
            go(stage, *args)
    finally:
        hook.remove()
    return counter


# 60 pairs make 8 batches: the 12 steps cross the end of an epoch and a line of the log
STEPS = ["--steps", "12", "--batch-size", "8"]


@pytest.mark.parametrize("stage, maximum", [(dual, 13), (scit, 12)])
def test_functions_in_a_step_of_stage_1(stage, maximum, tiny, tmp_path):
    source = stage1_source(tiny, tmp_path)
    counter = count_training_steps(stage, *source, *STEPS, "--tokens-per-pass", "600", *CPU)
    assert len(counter.steps) == 11
    counter.check(maximum)


@pytest.mark.parametrize(
    "method, backend", [("scit", "torch"), ("dual", "torch"), ("dual", "triton")]
)
def test_functions_in_a_step_of_align(method, backend, done, tmp_path):
    (tmp_path / method).mkdir()
    (tmp_path / method / "collect").symlink_to(done / method / "collect")
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    # 16 responses make 8 batches; more would take the interpreter minutes
    steps = ["--steps", "12", "--limit", "16", "--batch-size", "2", "--tokens-per-pass", "80"]
    options = ["--out", tmp_path, "--backend", backend, "--device", device]
    counter = count_training_steps(align, *options, *steps)
    assert len(counter.steps) == 11
    loss = {"torch": "torch_loss", "triton": "FusedLoss.backward"}[backend]
    assert f"kernels/representation_loss.py: {loss}" in counter.steps[0]
    counter.check(16)


@pytest.mark.parametrize("method", ["scit", "dual"])
def test_functions_in_a_shard_of_collect(method, done, tmp_path, monkeypatch):
    (tmp_path / method).mkdir()
    for path in (done / method).iterdir():
        if path.name != "collect":
            (tmp_path / method / path.name).symlink_to(path)
    counter = StepCounter()
    record_shard = collect.record_shard

    def counted(*args):
        counter.next_step()
        record_shard(*args)

    monkeypatch.setattr(collect, "record_shard", counted)
    options = ["--shard-mb", "0.2", "--tokens-per-pass", "600", "--layers", "1", "2", *CPU]
    with counter:
        go(collect, "--out", tmp_path, "--method", method, *options)
    assert len(counter.steps) > 5
    counter.check(15)
