"""What one step of each stage costs: the functions that a reader must follow, and how often the
host waits for a GPU.

A function counts once, however often it is called. Lambdas and comprehensions do not count.
"""

import json
import os
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import CPU, ROOT, go, make_model, stage1_source
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import align
import collect
import dual
import scit
from common import training
from common.collection import Collection
from common.data import collate, encode_pairs
from common.pairs import Pair

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


@pytest.mark.parametrize("stage, maximum", [(dual, 19), (scit, 18)])
def test_functions_in_a_step_of_stage_1(stage, maximum, tiny, tmp_path):
    source = stage1_source(tiny, tmp_path)
    counter = count_training_steps(stage, *source, *STEPS, "--tokens-per-pass", "600", *CPU)
    assert len(counter.steps) == 11
    counter.check(maximum)


@pytest.mark.parametrize(
    "method, backend", [("scit", "torch"), ("dual", "torch"), ("dual", "triton")]
)
def test_functions_in_a_step_of_align(method, backend, done, tmp_path, monkeypatch):
    # not of a step, and slow in Triton's interpreter
    monkeypatch.setattr(align, "validation_distances", lambda *_: [1.0])
    (tmp_path / method).mkdir()
    (tmp_path / method / "collect").symlink_to(done / method / "collect")
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    # 16 responses make 8 batches: as above; fewer steps for Triton's interpreter
    n_steps = 4 if backend == "triton" else 12
    steps = ["--limit", "16", "--batch-size", "2", "--tokens-per-pass", "80"]
    steps += ["--steps", str(n_steps)]
    options = ["--out", tmp_path, "--backend", backend, "--device", device]
    counter = count_training_steps(align, *options, *steps)
    assert len(counter.steps) == n_steps - 1
    loss = {"torch": "torch_loss", "triton": "FusedLoss.backward"}[backend]
    assert f"kernel/representation_loss.py: {loss}" in counter.steps[0]
    counter.check(22)


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
        return record_shard(*args)

    monkeypatch.setattr(collect, "record_shard", counted)
    options = ["--shard-mb", "0.2", "--tokens-per-pass", "600", "--layers", "1", "2", *CPU]
    with counter:
        go(collect, "--out", tmp_path, "--method", method, *options)
    assert len(counter.steps) > 5
    counter.check(17)


# ---------------------------------------------------------------- waiting for a GPU

# The host asks the device for a value, or for the size of a result.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "equal", "unique"}


class WaitCounter(TorchDispatchMode):
    """Within the context, notes the operators for which the host would wait for a GPU, from one
    call of next_step() to the next. They are the same ones on a CPU."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.waits = []
        self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (name in WAITING or by_mask) and not self.paused:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))

    def next_step(self, *_):
        self.steps.append(self.waits)
        self.waits = []

    def on_host(self, function):
        """A function that makes its tensors on the CPU, where nobody has to wait."""

        def paused(*args, **kwargs):
            self.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = False

        return paused


@pytest.mark.parametrize("case", ["scit", "dual", "align", "align without b"])
def test_no_step_waits_for_the_gpu(case, tiny, done, tmp_path, monkeypatch):
    """But for those whose loss is looked at: every tenth, which stands in the log, and the last."""
    counter = WaitCounter()
    for module in (scit, dual):
        monkeypatch.setattr(module, "collate", counter.on_host(module.collate))
    monkeypatch.setattr(Collection, "read", counter.on_host(Collection.read))
    options = ["--steps", "12", "--batch-size", "4", *CPU]
    if case in ("scit", "dual"):
        stage = {"scit": scit, "dual": dual}[case]
        options += stage1_source(tiny, tmp_path)
    else:
        stage = align
        (tmp_path / "dual").mkdir()
        for path in (done / "dual").iterdir():
            if path.name not in ("collect", "align"):
                (tmp_path / "dual" / path.name).symlink_to(path)
        without_b = ["--no-store-base"] if case == "align without b" else []
        go(collect, "--out", tmp_path, "--layers", "1", "2", *without_b, *CPU)
        options += ["--out", tmp_path, "--strength", "0.2"]
    hook = register_optimizer_step_post_hook(counter.next_step)
    try:
        with counter:
            go(stage, *options)
    finally:
        hook.remove()
    # the first has the start of the run before it; a step's log line falls to the one after it
    waits = [len(step) for step in counter.steps]
    assert len(waits) == 12
    assert waits[1:10] == [0] * 9, counter.steps
    assert waits[10] > 0
    assert waits[11] == 0


CUDA = torch.device("cuda")


class PinnedMemory:
    """Stands in for a GPU: what would be pinned memory is noted, and every copy to the GPU or from
    it is noted as (from or to pinned memory, without waiting)."""

    def __init__(self, monkeypatch):
        self.pinned, self.copies = set(), []
        empty, to, copy = torch.empty, torch.Tensor.to, torch.Tensor.copy_

        def empty_pinned(*args, pin_memory=False, **kwargs):
            return self.pin(empty(*args, **kwargs)) if pin_memory else empty(*args, **kwargs)

        def to_device(tensor, *args, non_blocking=False, **kwargs):
            if args and args[0] is CUDA:
                self.copies.append((self.is_pinned(tensor), non_blocking))
                return tensor
            return to(tensor, *args, **kwargs)

        def copy_from_device(tensor, source, non_blocking=False):
            self.copies.append((self.is_pinned(tensor), non_blocking))
            return copy(tensor, source)

        def pin_memory(tensor):
            return self.pin(tensor)

        monkeypatch.setattr(torch, "empty", empty_pinned)
        monkeypatch.setattr(torch.Tensor, "to", to_device)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_from_device)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)

    def pin(self, tensor):
        self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.pinned


@pytest.fixture
def pinned_memory(monkeypatch):
    return PinnedMemory(monkeypatch)


def test_states_are_read_into_pinned_memory_and_copied_without_waiting(done, pinned_memory):
    """align: the states of a batch are put into pinned memory directly."""
    manifest = json.loads((done / "dual" / "collect" / "stage.json").read_text())
    paths = [done / "dual" / "collect" / name for name in manifest["shards"]]
    collection = Collection(paths, manifest["settings"]["layers"], "full", 1)
    batch = collection.read([0, 1, 2], CUDA)
    # b, h+ and h- of each layer; ids and positions
    assert pinned_memory.copies == [(True, True)] * (3 * len(collection.layers) + 2)
    assert len(batch.plus) == len(collection.layers)


def test_a_batch_is_copied_from_pinned_memory_without_waiting(pinned_memory):
    collate([([3, 4, 5], 1), ([6, 7], 1)], 0, CUDA)
    # ids, attention, response and positions
    assert pinned_memory.copies == [(True, True)] * 4


def test_states_are_recorded_into_pinned_memory_without_waiting(
    done, tiny, tokenizer, pinned_memory, monkeypatch
):
    """collect: nothing waits until a shard is written, which begins when all copies have ended."""
    pairs = encode_pairs(tokenizer, [Pair((("user", "Hi"),), "yes, I do", "no", "train")] * 3)
    examples = collect.examples_of(pairs)
    config = collect.Config(layers=[1, 2], states_dtype="bfloat16")
    counter, events = WaitCounter(), []

    class Event:
        def record(self):
            events.append(("recorded", len(pinned_memory.copies)))

        def synchronize(self):
            events.append("waited for")

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def run_pass(part):
        tokens = collect.count_recorded(part, config)
        return [[torch.ones(tokens, 8) * k for _ in range(2)] for k in (3, 2, 1)]

    with counter:
        shard = collect.record_shard([examples[:2], examples[2:]], run_pass, config, 8, CUDA)
    assert counter.waits == []
    # of two passes b, h+ and h- of two layers, and the norms
    assert pinned_memory.copies == [(True, True)] * 2 * (3 * 2 + 1)
    assert events == [("recorded", 14)]
    written = {}
    monkeypatch.setattr(collect, "save_file", lambda tensors, path: written.update(tensors))
    monkeypatch.setattr(collect, "atomic_write", nullcontext)
    collect.write_shard("shard", shard, config)
    assert events[1:] == ["waited for"]
    assert written["base.1"].dtype == torch.bfloat16 and (written["base.2"] == 3).all()
    tokens = collect.count_recorded(examples, config)
    # |v|, |b| and their ratio, where v is 1 and b is 3 in all 8 dimensions
    expected = torch.tensor([8**0.5, 3 * 8**0.5, 1 / 3], dtype=torch.float64)[:, None] * tokens
    assert torch.allclose(written["statistics"], expected.expand(3, 2))


# ---------------------------------------------------------------- speed


def test_attention_and_optimizer_are_those_that_suit_a_gpu(tiny, tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    fused = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: fused.append(optimizer.param_groups[0]["fused"])
    )
    try:
        go(dual, *stage1_source(tiny, tmp_path), "--steps", "1", *CPU)
        go(collect, "--out", tmp_path, "--layers", "1", *CPU)
        go(align, "--out", tmp_path, "--steps", "1", "--strength", "0.1", *CPU)
    finally:
        hook.remove()
    assert fused == [True, True]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    # collect leaves it as it was
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_log_tells_rate_and_norms_and_the_run_its_speed(tiny, tmp_path, capfd):
    """Each line of the log counts the tokens of all inputs, without padding."""
    output = go(dual, *stage1_source(tiny, tmp_path), "--steps", "12", "--batch-size", "60", *CPU)
    lines = map(json.loads, (tmp_path / "dual" / "dual.log").read_text().splitlines())
    header, *lines, rewards = lines
    assert "torch" in header
    names = ["rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"]
    assert list(rewards) == ["step", *names]
    assert [line["step"] for line in lines] == [10, 12]
    names = {"loss", "contrast", "lr", "grad_norm/good", "grad_norm/bad", "num_tokens", "seconds"}
    assert names | {"step", "tokens_per_second"} == set(lines[0])
    # each batch is all 60 pairs
    assert lines[0]["num_tokens"] / 10 == lines[1]["num_tokens"] / 12
    rate = (lines[1]["num_tokens"] - lines[0]["num_tokens"]) / (
        lines[1]["seconds"] - lines[0]["seconds"]
    )
    assert lines[1]["tokens_per_second"] == pytest.approx(rate, rel=0.05)
    assert f"{lines[1]['num_tokens']:,} tokens in " in output


def test_model_flop_utilisation_by_hand(monkeypatch):
    """1,000 tokens a second, 4 FLOPs for each of 8e9 parameters, of 989e12: 0.032."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    summary = training.speed_summary(5000, 5.0, 4 * 8e9, CUDA)
    assert summary == "5,000 tokens in 5.0 s, 1,000 tokens/s, MFU 0.03"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert "MFU" not in training.speed_summary(5000, 5.0, 4 * 8e9, CUDA)
    model = make_model("llama")
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert training.parameters_run(model) == total - embedding
    head = model.get_output_embeddings().weight.numel()
    assert training.parameters_run(model.base_model) == total - embedding - head
