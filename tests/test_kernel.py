"""The alignment loss: both backends against a plain formula in float64.

Triton compiles for the GPU where there is one; without a GPU its interpreter runs the kernel.
"""

import importlib
import json
import operator
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, go
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import align
import collect
import dual
from kernel import bytes_moved, representation_loss, triton_unavailable_reason
from kernel.bench_variants import VARIANTS, variant
from kernel.representation_loss import loss_and_gradient

# in the package, the name of the module is that of the function
module = importlib.import_module("kernel.representation_loss")

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
KINDS = ("l2", "mse")
BACKENDS = ("torch", "triton")

# Upper bounds of ||error|| / ||reference||. The interpreter truncates to bf16, a GPU rounds.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3 if NATIVE else 8e-3,
}

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so that what the kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_case(L=2, B=3, S=5, D=7, dtype=torch.float64, mask=None):
    """(hidden, base, plus, minus, mask): about half of the positions are response tokens."""
    generator = torch.Generator().manual_seed(0)
    if mask is None:
        mask = torch.rand(B, S, generator=generator) < 0.5
    T = int(mask.sum())

    def random_layers(*shape):
        return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(L)]

    hidden = [h.requires_grad_() for h in random_layers(*mask.shape, D)]
    base, plus, minus = random_layers(T, D), random_layers(T, D), random_layers(T, D)
    return hidden, base, plus, minus, mask.to(DEVICE)


def all_responses(B, S):
    return torch.ones(B, S, dtype=torch.bool, device=DEVICE)


def positions_of(mask):
    """Where in [B * S] a mask [B, S] is set."""
    return mask.flatten().nonzero()[:, 0]


def take(rows, *packed):
    """The given rows of packed states: for each of base, plus, minus a list of L tensors."""
    return [list(map(operator.itemgetter(rows), states)) for states in packed]


def formula(hidden, base, plus, minus, mask, alpha, kind):
    """Loss, norms and gradients in float64, written token by token as in the paper."""
    leaves = [h.detach().double().cpu().requires_grad_() for h in hidden]
    tokens = mask.nonzero().tolist()
    D = hidden[0].shape[-1]
    norms = []
    total = 0.0
    for h, *packed in zip(leaves, base, plus, minus):
        b, p, m = (state.double().cpu() for state in packed)
        # a first row that is dropped: torch.stack refuses an empty list
        residuals = [h[0, 0]]
        for row, (i, j) in enumerate(tokens):
            residuals.append(h[i, j] - (b[row] + alpha * (p[row] - m[row])))
        square = torch.stack(residuals)[1:].square().sum(-1)
        # the gradient of the square root is infinite at 0
        norm = torch.where(square > 0, square.clamp(min=1e-300).sqrt(), square)
        norms.append(norm.detach())
        total = total + (norm.sum() if kind == "l2" else square.sum() / D)
    loss = total / max(1, len(hidden) * len(tokens))
    return loss.detach(), torch.stack(norms), torch.autograd.grad(loss, leaves)


def relative_error(value, reference):
    """||value - reference|| / ||reference||: an absolute bound would accept a gradient of zeros."""
    error = (value.detach().double().cpu() - reference).norm()
    size = reference.norm()
    return (error / size if size > 0 else error).item()


def compare_with_formula(case, alpha=0.5, kind="l2", backend="triton"):
    hidden, base, plus, minus, mask = case
    dtype = hidden[0].dtype
    positions = positions_of(mask)
    loss, norms = representation_loss(
        hidden, base, plus, minus, positions, alpha, kind=kind, backend=backend
    )
    expected_loss, expected_norms, expected_gradients = formula(*case, alpha, kind)
    # loss and norms are never rounded to bf16
    tolerance = min(1e-6, TOLERANCE[dtype])
    assert relative_error(loss, expected_loss) <= tolerance
    assert relative_error(norms, expected_norms) <= tolerance
    assert not norms.requires_grad
    assert loss.dtype == norms.dtype == torch.promote_types(dtype, torch.float32)
    gradients = torch.autograd.grad(loss, hidden)
    for gradient, expected in zip(gradients, expected_gradients):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) <= TOLERANCE[dtype]
        assert (gradient[~mask] == 0).all()


# ---------------------------------------------------------------- the numbers


@both_backends
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("D", [1, 64, 100, 896, 2304, 4096, 5120, 16384])
def test_hidden_sizes_and_dtypes(D, dtype, backend):
    for kind in KINDS:
        compare_with_formula(random_case(D=D, dtype=dtype), kind=kind, backend=backend)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_benchmark(name):
    for D, dtype in ((100, torch.float32), (896, torch.bfloat16)):
        for kind in KINDS:
            with variant(name):
                compare_with_formula(random_case(D=D, dtype=dtype), kind=kind)


def test_few_programs_scale_a_large_gradient(monkeypatch):
    """Each has many blocks, the last one not full. At the headline there are 1,024 programs."""
    monkeypatch.setattr(module, "MAX_SCALE_PROGRAMS", 3)
    gradient = torch.randn(9, 4000, device=DEVICE)
    expected = 0.37 * gradient
    torch.ops.rahf.scale_(gradient, torch.tensor(0.37, device=DEVICE))
    assert torch.allclose(gradient, expected, rtol=1e-6)

    grids = []

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.undo()
    monkeypatch.setattr(module, "scale_kernel", Launcher())
    # the headline's gradient: 5 layers, 32,768 positions, width 4,096
    torch.ops.rahf.scale_(torch.empty(1).expand(5, 32768, 4096), torch.ones(()))
    assert grids == [(1024,)]


@both_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7, 5.0, -1.0])
def test_strengths(alpha, kind, backend):
    for dtype in (torch.float64, torch.float32):
        compare_with_formula(random_case(D=100, dtype=dtype), alpha, kind, backend)


@both_backends
@pytest.mark.parametrize("L", [1, 8])
def test_one_layer_and_eight(L, backend):
    compare_with_formula(random_case(L=L, D=64, dtype=torch.float32), backend=backend)


@both_backends
@pytest.mark.parametrize("positions", [[], [0], [14], range(15), [1, 2, 7, 13]])
def test_which_positions_are_responses(positions, backend):
    mask = torch.zeros(15, dtype=torch.bool)
    mask[list(positions)] = True
    case = random_case(D=100, dtype=torch.float32, mask=mask.view(3, 5))
    for kind in KINDS:
        compare_with_formula(case, kind=kind, backend=backend)


def slice_of(h):
    return h[::2, 1:, :7]


def transposed_batch(h):
    return h[:, :, 7:].transpose(0, 1)


def every_second_column(h):
    return h[:, :, ::2]


@both_backends
@pytest.mark.parametrize("view", [slice_of, transposed_batch, every_second_column])
def test_strided_states(view, backend):
    hidden, *packed, _ = random_case(B=6, D=14, mask=torch.ones(6, 5, dtype=torch.bool))
    views = [view(h.detach()).requires_grad_() for h in hidden]
    mask = all_responses(*views[0].shape[:2])
    base, plus, minus = take((slice(mask.numel()), slice(3, 10)), *packed)
    case = (views, base, plus, minus, mask)
    compare_with_formula(case, backend=backend)

    # the positions need not be contiguous either
    positions = positions_of(mask)
    positions = torch.stack([positions, positions], 1)[:, 0]
    expected, _, _ = formula(*case, 0.5, "l2")
    loss, _ = representation_loss(views, base, plus, minus, positions, 0.5, backend=backend)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@both_backends
def test_layers_with_different_strides(backend):
    hidden, *packed, mask = random_case(L=3, D=64, dtype=torch.float32)
    wide = torch.zeros(3, 5, 100, device=DEVICE)
    wide[:, :, :64] = hidden[1].detach()
    mixed = [hidden[0], wide[:, :, :64].requires_grad_(), hidden[2]]
    compare_with_formula((mixed, *packed, mask), backend=backend)


@both_backends
def test_packed_rows_in_any_order(backend):
    hidden, base, plus, minus, mask = random_case(D=64)
    T = int(mask.sum())
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    positions = positions_of(mask)
    shuffled = take(order, base, plus, minus)
    loss, norms = representation_loss(hidden, base, plus, minus, positions, 0.5, backend=backend)
    other, other_norms = representation_loss(
        hidden, *shuffled, positions[order], 0.5, backend=backend
    )
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.equal(other_norms, norms[:, order])


@both_backends
def test_packed_states_of_other_dtypes(backend):
    hidden, base, plus, minus, mask = random_case(D=64, dtype=torch.bfloat16)
    base = [b.float() for b in base]
    plus = [p.half() for p in plus]
    compare_with_formula((hidden, base, plus, minus, mask), backend=backend)


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_zero_residual_has_zero_gradient(kind, backend):
    hidden, base, plus, minus, mask = random_case()
    for h, b, p, m in zip(hidden, base, plus, minus):
        h.data[mask] = b + 0.5 * (p - m)
    positions = positions_of(mask)
    loss, norms = representation_loss(
        hidden, base, plus, minus, positions, 0.5, kind=kind, backend=backend
    )
    assert loss.item() == 0
    assert (norms == 0).all()
    for gradient in torch.autograd.grad(loss, hidden):
        assert (gradient == 0).all()


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows(kind, backend):
    hidden, base, plus, minus, mask = random_case()
    base[1][0, 0] = float("nan")
    positions = positions_of(mask)
    loss, norms = representation_loss(
        hidden, base, plus, minus, positions, 0.5, kind=kind, backend=backend
    )
    assert loss.isnan()
    assert norms.isnan().sum() == 1
    is_nan = torch.autograd.grad(loss, hidden)[1][mask][0].isnan()
    # the norm carries it to the whole row, the square to its own element
    assert is_nan.all() if kind == "l2" else is_nan[0]


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind, backend):
    mask = torch.tensor([[False, True, False, True]])
    hidden, base, plus, minus, mask = random_case(D=3, mask=mask)
    positions = positions_of(mask)

    def loss():
        options = {"kind": kind, "backend": backend}
        return representation_loss(hidden, base, plus, minus, positions, 0.7, **options)[0]

    gradients = torch.autograd.grad(loss(), hidden)
    epsilon = 1e-6
    for h, gradient in zip(hidden, gradients):
        elements = h.data.view(-1)
        differences = torch.empty_like(elements)
        for i, value in enumerate(elements.tolist()):
            elements[i] = value + epsilon
            above = loss().detach()
            elements[i] = value - epsilon
            below = loss().detach()
            elements[i] = value
            differences[i] = (above - below) / (2 * epsilon)
        assert relative_error(gradient.flatten(), differences.cpu()) <= 1e-8


@both_backends
def test_denom_and_difference(backend):
    hidden, base, plus, minus, mask = random_case()
    positions = positions_of(mask)
    loss, _ = representation_loss(hidden, base, plus, minus, positions, 0.7, backend=backend)
    v = [p - m for p, m in zip(plus, minus)]
    differenced, _ = representation_loss(hidden, base, v, None, positions, 0.7, backend=backend)
    assert differenced.item() == pytest.approx(loss.item(), rel=1e-12)
    for one, other in zip(
        torch.autograd.grad(differenced, hidden), torch.autograd.grad(loss, hidden)
    ):
        assert torch.allclose(one, other, rtol=1e-12)
    tenth, _ = representation_loss(
        hidden, base, plus, minus, positions, 0.7, denom=10, backend=backend
    )
    assert tenth.item() == pytest.approx(loss.item() * 2 * int(mask.sum()) / 10, rel=1e-12)


# ---------------------------------------------------------------- autograd and torch.compile


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [0.37, 3.0, 1.0, 0.0])
def test_incoming_gradient(upstream, dtype, backend):
    case = random_case(D=64, dtype=dtype)
    hidden, base, plus, minus, mask = case
    positions = positions_of(mask)
    for kind in KINDS:
        _, _, expected_gradients = formula(*case, 0.5, kind)
        loss, _ = representation_loss(
            hidden, base, plus, minus, positions, 0.5, kind=kind, backend=backend
        )
        gradients = torch.autograd.grad(loss * upstream, hidden)
        for gradient, expected in zip(gradients, expected_gradients):
            assert relative_error(gradient, expected * upstream) <= 2 * TOLERANCE[dtype]


def test_second_backward_is_refused():
    """The buffer with the gradient is handed out once; the gradient that was got stays right."""
    hidden, base, plus, minus, mask = random_case(D=64, dtype=torch.float32)
    positions = positions_of(mask)
    loss, _ = representation_loss(hidden, base, plus, minus, positions, 0.5, backend="triton")
    gradients = torch.autograd.grad(loss * 0.37, hidden, retain_graph=True)
    copies = [gradient.clone() for gradient in gradients]
    with pytest.raises(RuntimeError, match="second backward pass"):
        torch.autograd.grad(loss, hidden)
    for gradient, copy in zip(gradients, copies):
        assert torch.equal(gradient, copy)


@both_backends
def test_no_gradient_where_none_is_needed(backend):
    hidden, base, plus, minus, mask = random_case(D=64, dtype=torch.float32)
    positions = positions_of(mask)
    expected, _ = representation_loss(hidden, base, plus, minus, positions, 0.5, backend=backend)
    with torch.no_grad():
        loss, _ = representation_loss(hidden, base, plus, minus, positions, 0.5, backend=backend)
    assert not loss.requires_grad
    assert loss.item() == expected.item()

    # one layer that needs a gradient is enough
    mixed = [hidden[0].detach(), hidden[1]]
    loss, _ = representation_loss(mixed, base, plus, minus, positions, 0.5, backend=backend)
    (gradient,) = torch.autograd.grad(loss, mixed[1:])
    _, whole = torch.autograd.grad(expected, hidden)
    assert torch.equal(gradient, whole)


@both_backends
def test_gradient_accumulation(backend):
    """Two halves of a batch add up to the whole."""
    hidden, base, plus, minus, mask = random_case(
        B=4, D=64, dtype=torch.float32, mask=torch.ones(4, 5, dtype=torch.bool)
    )
    head = torch.nn.Linear(64, 64).to(DEVICE)
    denom = 2 * mask.numel()

    def gradient(first, last):
        states = [head(h[first:last]) for h in hidden]
        packed = take(slice(first * 5, last * 5), base, plus, minus)
        positions = positions_of(mask[first:last])
        loss, _ = representation_loss(states, *packed, positions, 0.5, denom=denom, backend=backend)
        return torch.autograd.grad(loss, head.weight)[0]

    halves = gradient(0, 2) + gradient(2, 4)
    assert torch.allclose(gradient(0, 4), halves, rtol=1e-4, atol=1e-7)


@both_backends
def test_gradient_checkpointing(backend):
    """Recomputing the module below the loss changes nothing."""
    hidden, base, plus, minus, mask = random_case(D=64, dtype=torch.float32)
    head = torch.nn.Linear(64, 64).to(DEVICE)
    positions = positions_of(mask)

    def gradient(states):
        loss, _ = representation_loss(states, base, plus, minus, positions, 0.5, backend=backend)
        return torch.autograd.grad(loss, head.weight)[0]

    plain = gradient([head(h) for h in hidden])
    recomputed = gradient([checkpoint(head, h, use_reentrant=False) for h in hidden])
    assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-7)


@both_backends
def test_composes_with_compile(backend):
    hidden, base, plus, minus, mask = random_case(D=64, dtype=torch.float32)
    positions = positions_of(mask)

    def loss(*hidden):
        doubled = [2 * h for h in hidden]
        return (
            0.37
            * representation_loss(doubled, base, plus, minus, positions, 0.5, backend=backend)[0]
        )

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    expected = loss(*hidden)
    result = compiled(*hidden)
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)
    expected_gradients = torch.autograd.grad(expected, hidden)
    for gradient, other in zip(torch.autograd.grad(result, hidden), expected_gradients):
        assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-8)


def test_same_bits_every_time():
    hidden, base, plus, minus, mask = random_case(L=3, B=4, S=50, D=100, dtype=torch.bfloat16)
    positions = positions_of(mask)

    def everything():
        loss, norms = representation_loss(
            hidden, base, plus, minus, positions, 0.5, backend="triton"
        )
        return loss, norms, *torch.autograd.grad(loss, hidden)

    for first, second in zip(everything(), everything()):
        assert torch.equal(first, second)


# ---------------------------------------------------------------- sizes and costs


def test_more_than_2_to_the_31_elements():
    """Rows on both sides of 2^31 elements, packed and strided; most memory is never touched."""
    n_rows, D = 530_000, 4096
    torch.utils.deterministic.fill_uninitialized_memory = False
    big = torch.empty(n_rows, D, dtype=torch.bfloat16, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # [2, 2, D]: the rows 0, 1, -2 and -1 of big
    view = big.view(n_rows // 2, 2, D)[:: n_rows // 2 - 1]
    view.copy_(torch.randn(2, 2, D))
    rows = [n_rows - 1, 0, n_rows - 2]
    # not by positions, of which there would be as many as packed rows
    row_of_position = [rows[0], -1, rows[1], rows[2]]
    row_of_position = torch.tensor(row_of_position, dtype=torch.int32, device=DEVICE)
    loss, norms, gradient = loss_and_gradient(
        [view], [big], [big], [], row_of_position, 0.5, 1 / 3, squared=False, gradient=True
    )

    positions = [0, 2, 3]
    e = view.double().flatten(0, 1)[positions] - 1.5 * big[rows].double()
    expected_norms = e.norm(dim=1)
    assert loss.item() == pytest.approx(expected_norms.mean().item(), rel=1e-6)
    assert norms[0, rows].tolist() == pytest.approx(expected_norms.tolist(), rel=1e-6)
    gradient = gradient[0].flatten(0, 1)
    expected = (e / expected_norms[:, None] / 3).cpu()
    assert relative_error(gradient[positions], expected) <= TOLERANCE[torch.bfloat16]
    assert (gradient[1] == 0).all()


@pytest.mark.skipif(not NATIVE, reason="writes 4 GB of gradient")
def test_gradient_of_more_than_2_to_the_31_elements():
    n_rows, D = 530_000, 4096
    h = torch.ones(1, n_rows, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    positions = torch.tensor([n_rows - 1], device=DEVICE)
    zeros = [torch.zeros(1, D, dtype=torch.bfloat16, device=DEVICE)]
    loss, _ = representation_loss([h], zeros, zeros, None, positions, 1.0, backend="triton")
    gradient = torch.autograd.grad(loss, h)[0][0]
    assert (gradient[-1] == 1 / 64).all()
    assert gradient[:-1].abs().max() == 0


def test_bytes_by_hand():
    """T = 3 of 10 rows, D = 8, two layers, bf16: 3 rows of 4 states read, 10 rows written."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :3] = True
    hidden, base, plus, minus, _ = random_case(D=8, dtype=torch.bfloat16, mask=mask)
    assert bytes_moved(hidden, base, plus, minus) == 2 * (4 * 3 + 10) * 8 * 2
    assert bytes_moved(hidden, base, plus, None) == 2 * (3 * 3 + 10) * 8 * 2


FUNCTIONS_OF_A_STEP = {
    "torch": {"representation_loss", "check_inputs", "torch_loss"},
    "triton": {
        "representation_loss",
        "check_inputs",
        "FusedLoss.forward",
        "loss_and_gradient",
        "FusedLoss.backward",
        "scale_",
    },
}
# The interpreter runs the kernels as Python, and their file once more to read their source.
INTERPRETED = {"loss_kernel", "pick", "scale_kernel", "<module>"}


@both_backends
def test_few_python_functions_per_step(backend):
    """A step enters each of these functions at most once, and no other of kernel/."""
    hidden, base, plus, minus, mask = random_case(L=5, D=64, dtype=torch.float32)
    positions = positions_of(mask)
    entered = []

    def record_call(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT / "kernel")):
            entered.append(code.co_qualname)

    sys.setprofile(record_call)
    try:
        loss, _ = representation_loss(hidden, base, plus, minus, positions, 0.5, backend=backend)
        loss.backward()
    finally:
        sys.setprofile(None)
    if not NATIVE:
        entered = [name for name in entered if name not in INTERPRETED]
    assert "representation_loss" in entered
    assert len(entered) == len(set(entered))
    assert set(entered) <= FUNCTIONS_OF_A_STEP[backend]


# ---------------------------------------------------------------- compiling, refusing, training


def run_without_interpreter(*command):
    """The output of Python on a machine without a GPU and without TRITON_INTERPRET."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_compiles_without_spills_and_with_16_byte_loads():
    """For sm_90 and sm_80, by ptxas, offline.

    All loads and stores of bf16 rows are 128 bits wide where D is a multiple of 16.
    """
    for kernel in json.loads(run_without_interpreter("tests/compile_kernels.py")):
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["registers"] <= 96, kernel
        # every product of sizes is 64-bit, but for the number of positions in all layers
        of_sizes = kernel["kernel"] == "persistent_kernel"
        if kernel["kernel"] == "scale_kernel":
            assert kernel["wide_loads"] == kernel["wide_stores"] == 2, kernel
            continue
        if kernel.get("warps"):
            # what 16 warps are compared with
            assert kernel["bytes_in_flight"] < 24 * 1024, kernel
            continue
        assert kernel["offsets_32"] == of_sizes, kernel
        if kernel["kernel"] == "persistent_kernel":
            # its loads of the next position are copies to shared memory
            assert kernel["copies_to_shared"] >= 4, kernel
            continue
        if (kernel["capability"], kernel["D"]) == (90, 4096) and not kernel.get("differenced"):
            # of four rows of 8 kB, asked for at once: all by Triton 3.9, 24 kB by 3.6
            assert kernel["bytes_in_flight"] >= 24 * 1024, kernel
        if kernel["D"] % 16 == 0:
            # 16-byte accesses of a thread to one row
            accesses = 1 if kernel["D"] <= 4096 else 4
            states = 3 if kernel.get("differenced") else 4
            assert kernel["wide_loads"] == states * accesses, kernel
            assert kernel["narrow_loads"] == 0, kernel
            # one row of the gradient, or of its zeros
            assert kernel["wide_stores"] == 2 * accesses, kernel


@both_backends
def test_invalid_inputs_are_refused(backend):
    hidden, base, plus, minus, mask = random_case()
    positions = positions_of(mask)
    arguments = {
        "hidden": hidden,
        "base": base,
        "plus": plus,
        "minus": minus,
        "positions": positions,
        "alpha": 1.0,
        "backend": backend,
    }
    invalid = [
        ({"hidden": []}, r"expected a list of tensors of shape \[B, S, D\]"),
        ({"hidden": [h[0] for h in hidden]}, r"expected a list of tensors of shape \[B, S, D\]"),
        ({"hidden": [h.half() for h in hidden]}, "hidden is torch.float16"),
        ({"hidden": [hidden[0], hidden[1].to("meta")]}, r"hidden\[1\] is .* on meta"),
        ({"base": []}, "base has 0 layers, hidden has 2"),
        ({"base": base[:1]}, "base has 1 layers, hidden has 2"),
        ({"base": [base[0], base[1].float()]}, r"base\[1\] is torch.float32"),
        ({"plus": [p[:, :3] for p in plus]}, r"plus\[0\] is .*, 3\) on"),
        ({"plus": [p.long() for p in plus]}, "plus is torch.int64"),
        ({"minus": [m[:-1] for m in minus]}, r"minus\[0\] is"),
        ({"positions": positions.int()}, "expected torch.int64"),
        ({"positions": positions[:-1]}, "positions is"),
        ({"kind": "l1"}, "kind 'l1'"),
        ({"backend": "cuda"}, "backend 'cuda'"),
    ]
    for change, message in invalid:
        with pytest.raises(ValueError, match=message):
            representation_loss(**{**arguments, **change})


def test_too_large_hidden_size_is_refused():
    h = [torch.zeros(1, 1, 16385, device=DEVICE)]
    state = [torch.zeros(1, 16385, device=DEVICE)]
    positions = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="16385 is over 16384; use backend='torch'"):
        representation_loss(h, state, state, state, positions, 1.0, backend="triton")
    assert triton_unavailable_reason(16384, h[0].device) == ""
    loss, _ = representation_loss(h, state, state, state, positions, 1.0, backend="auto")
    assert loss.item() == 0


ON_THE_CPU = """
import torch
from kernel import representation_loss, triton_unavailable_reason

h = [torch.ones(1, 1, 4, requires_grad=True)]
state = [torch.zeros(1, 4)]
positions = torch.zeros(1, dtype=torch.int64)
print(representation_loss(h, state, state, state, positions, 1.0)[0].item())
print(triton_unavailable_reason(4, torch.device("cpu")))
try:
    representation_loss(h, state, state, state, positions, 1.0, backend="triton")
except ValueError as error:
    print(error)
"""


def test_on_the_cpu_auto_takes_torch_and_triton_is_refused():
    value, reason, error = run_without_interpreter("-c", ON_THE_CPU).splitlines()
    assert value == "2.0"
    assert "not on cpu" in reason
    assert "TRITON_INTERPRET=1" in reason
    assert reason in error


def test_what_the_launchers_lack_is_named(monkeypatch, tmp_path):
    """Without compiler or headers a GPU falls back to PyTorch, with a line that says what to do."""
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "install python3-dev" in module.missing_for_launchers()
    (tmp_path / "Python.h").touch()
    assert module.missing_for_launchers() == ""
    monkeypatch.setenv("CC", "mycc")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert "install gcc" in module.missing_for_launchers()
    # what the module does with it
    monkeypatch.setattr(module, "TRITON_DEVICES", ())
    monkeypatch.setattr(module, "MISSING", "Triton needs something")
    if module.triton:
        reason = triton_unavailable_reason(4, torch.device("cuda"))
        assert reason == "Triton needs something"


def test_align_trains_the_same_adapter_with_either_backend(tiny, tmp_path):
    source = ("--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path)
    go(dual, *source, "--steps", "20", "--device", DEVICE, "--dtype", "float32")
    go(collect, "--out", tmp_path, "--layers", "1", "3", "--device", DEVICE)
    options = ("--out", tmp_path, "--steps", "4", "--batch-size", "2", "--device", DEVICE)
    options += ("--limit", "16")
    adapters = []
    for backend in BACKENDS:
        go(align, *options, "--backend", backend)
        adapters.append(load_file(tmp_path / "dual" / "align" / "adapter_model.safetensors"))
    by_torch, by_triton = adapters
    trained = [tensor for name, tensor in by_torch.items() if "lora_B" in name]
    assert any(tensor.abs().max() > 0 for tensor in trained)
    for name, tensor in by_torch.items():
        assert (by_triton[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
