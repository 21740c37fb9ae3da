"""The alignment loss, both backends, against a plain formula in float64. Triton runs natively on a GPU and in its interpreter without one."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import align
from conftest import ROOT, go
from kernels import representation_loss, response_index
from kernels.representation_loss import FusedLoss, bytes_moved

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3 if NATIVE else 8e-3}    # the interpreter truncates to bf16
KINDS, BACKENDS = ("l2", "mse"), ("torch", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)


def case(L=2, B=3, S=5, D=7, dtype=torch.float64, mask=None, seed=0):
    """Random hidden states, packed states, and a mask of about half of the positions."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, S, generator=g) < 0.5 if mask is None else mask

    def random(*shape):
        return torch.randn(shape, generator=g).to(DEVICE, dtype)
    hidden = [random(*mask.shape, D).requires_grad_() for _ in range(L)]
    return hidden, *[[random(int(mask.sum()), D) for _ in range(L)] for _ in range(3)], mask.to(DEVICE)


def formula(hidden, base, plus, minus, mask, alpha, kind):
    """Loss, norms and gradients in float64, written token by token as in the paper."""
    leaves, norms, total = [h.detach().double().cpu().requires_grad_() for h in hidden], [], 0.0
    for h, *packed in zip(leaves, base, plus, minus):
        b, p, m = (state.double().cpu() for state in packed)
        tokens = enumerate(mask.nonzero().tolist())
        r = torch.stack([h[i, j] - (b[row] + alpha * (p[row] - m[row])) for row, (i, j) in tokens]) if mask.any() else h[0, :0]
        square = r.square().sum(-1)
        norm = torch.where(square > 0, square.clamp(min=1e-300).sqrt(), square)
        norms.append(norm.detach())
        total = total + (norm.sum() if kind == "l2" else square.sum() / h.shape[-1])
    loss = total / max(1, len(hidden) * int(mask.sum()))
    return loss.detach(), torch.stack(norms), torch.autograd.grad(loss, leaves)


def distance(ours, theirs):
    """||ours - theirs|| / ||theirs||, so that a gradient of zeros does not pass."""
    error, size = (ours.detach().double().cpu() - theirs).norm(), theirs.norm()
    return (error / size if size > 0 else error).item()


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN: what the kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(states, alpha=0.5, kind="l2", backend="triton", **options):
    hidden, base, plus, minus, mask = states
    loss, norms = representation_loss(hidden, base, plus, minus, response_index(mask), alpha, kind=kind, backend=backend, **options)
    expected, expected_norms, gradients = formula(hidden, base, plus, minus, mask, alpha, kind)
    bound, exact = BOUND[hidden[0].dtype], min(1e-6, BOUND[hidden[0].dtype])
    assert distance(loss, expected) <= exact and distance(norms, expected_norms) <= exact      # these are never rounded to bf16
    assert not norms.requires_grad and loss.dtype == norms.dtype == torch.promote_types(hidden[0].dtype, torch.float32)
    up = 2.0**12 if hidden[0].dtype == torch.float16 else 1.0                                   # fp16 is trained with a scaled loss
    for ours, theirs in zip(torch.autograd.grad(loss * up, hidden), gradients):
        assert ours.dtype == hidden[0].dtype and distance(ours, theirs * up) <= bound
        assert (ours[~mask] == 0).all()


# ---------------------------------------------------------------- the numbers

@both
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("D", [1, 64, 100, 896, 2304, 4096, 5120, 16384])
def test_widths_and_types(D, dtype, backend):
    for kind in KINDS:
        compare(case(D=D, dtype=dtype), kind=kind, backend=backend)


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7, 5.0, -1.0])
def test_strengths(alpha, kind, backend):
    for dtype in (torch.float64, torch.float32):
        compare(case(D=100, dtype=dtype), alpha, kind, backend)


@both
@pytest.mark.parametrize("L", [1, 8])
def test_one_layer_and_eight(L, backend):
    compare(case(L=L, D=64, dtype=torch.float32), backend=backend)


@both
@pytest.mark.parametrize("rows", [[], [0], [14], range(15), [1, 2, 7, 13]])
def test_which_rows_are_responses(rows, backend):
    mask = torch.zeros(15, dtype=torch.bool)
    mask[list(rows)] = True
    for kind in KINDS:
        compare(case(D=100, dtype=torch.float32, mask=mask.view(3, 5)), kind=kind, backend=backend)


@both
def test_strided_hidden_states(backend):
    """Slices, a transposed batch, and columns that are not adjacent."""
    hidden, *packed, mask = case(B=6, D=14, mask=torch.ones(6, 5, dtype=torch.bool))
    for view in (lambda h: h[::2, 1:, :7], lambda h: h[:, :, 7:].transpose(0, 1), lambda h: h[:, :, ::2]):
        views = [view(h.detach()).requires_grad_() for h in hidden]
        T = views[0].shape[:2].numel()
        wide = torch.tensor([[0.5, 9.0], [0.5, 9.0]], dtype=torch.float64, device=DEVICE)
        mask_of = torch.ones(views[0].shape[:2], dtype=torch.bool, device=DEVICE)
        packed_of = [[s[:T, 3:10] for s in states] for states in packed]
        strided = representation_loss(views, *packed_of, torch.stack([response_index(mask_of)] * 2, 1)[:, 0], wide[:, 0], backend=backend)[0]
        expanded = representation_loss(views, *packed_of, response_index(mask_of), wide[0, 0].expand(2), backend=backend)[0]
        assert strided.item() == expanded.item() == pytest.approx(formula(views, *packed_of, mask_of, 0.5, "l2")[0].item(), rel=1e-12)
        compare((views, *[[s[:T, 3:10] for s in states] for states in packed], torch.ones(views[0].shape[:2], dtype=torch.bool, device=DEVICE)), backend=backend)


@both
def test_packed_states_of_other_types(backend):
    hidden, base, plus, minus, mask = case(D=64, dtype=torch.bfloat16)
    compare((hidden, [b.float() for b in base], [p.half() for p in plus], minus, mask), backend=backend)


@both
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("D, k", [(1, 1), (64, 8), (100, 20), (2304, 8), (4096, 16)])
def test_low_rank_form(D, k, dtype, backend):
    """Coefficients on k directions against the plain form of the difference that they stand for; an incoming gradient, too."""
    hidden, base, _, _, mask = case(D=D, dtype=dtype)
    coefficients, _, _, _, _ = case(L=2, B=1, S=int(mask.sum()), D=k, dtype=dtype, seed=1)
    c, U = [x.detach()[0] for x in coefficients], [x.detach()[0] / k**0.5 for x in case(L=2, B=1, S=k, D=D, dtype=dtype, seed=2)[0]]
    v = [(a.double() @ b.double()) for a, b in zip(c, U)]
    up = 2.0**12 if dtype == torch.float16 else 1.0
    for kind in KINDS:
        loss, norms = representation_loss(hidden, base, c, None, response_index(mask), 0.7, kind=kind, directions=U, backend=backend)
        expected, expected_norms, gradients = formula(hidden, base, v, [0 * x for x in v], mask, 0.7, kind)
        assert distance(loss, expected) <= min(1e-6, BOUND[dtype]) and distance(norms, expected_norms) <= min(1e-6, BOUND[dtype])
        for ours, theirs in zip(torch.autograd.grad(loss * up, hidden, retain_graph=True), gradients):
            assert distance(ours, theirs * up) <= BOUND[dtype] and (ours[~mask] == 0).all()
        for ours, theirs in zip(torch.autograd.grad(loss * up * 3, hidden), gradients):     # a second backward computes afresh
            assert distance(ours, theirs * up * 3) <= 2 * BOUND[dtype]


@both
def test_one_alpha_a_layer(backend):
    hidden, base, plus, minus, mask = case(L=3)
    alphas, index = torch.tensor([0.7, -2.0, 0.0], dtype=torch.float64, device=DEVICE), response_index(mask)
    loss, norms = representation_loss(hidden, base, plus, minus, index, alphas, backend=backend)
    alone = [representation_loss(hidden[i:i + 1], base[i:i + 1], plus[i:i + 1], minus[i:i + 1], index, alpha, backend=backend) for i, alpha in enumerate(alphas.tolist())]
    assert loss.item() == pytest.approx(sum(x.item() for x, _ in alone) / 3, rel=1e-12) and torch.allclose(norms, torch.cat([n for _, n in alone]), rtol=1e-12)


@both
def test_zero_residual_has_zero_gradient_and_nan_shows(backend):
    for kind in KINDS:
        hidden, base, plus, minus, mask = case()
        for h, b, p, m in zip(hidden, base, plus, minus):
            h.data[mask] = b + 0.5 * (p - m)
        index = response_index(mask)
        loss, norms = representation_loss(hidden, base, plus, minus, index, 0.5, kind=kind, backend=backend)
        assert loss.item() == 0 and (norms == 0).all() and all((g == 0).all() for g in torch.autograd.grad(loss, hidden))
        base[1][0, 0] = float("nan")
        loss, norms = representation_loss(hidden, base, plus, minus, index, 0.5, kind=kind, backend=backend)
        assert loss.isnan() and norms.isnan().sum() == 1
        row = torch.autograd.grad(loss, hidden)[1][mask][0].isnan()
        assert row.all() if kind == "l2" else row[0]


@both
def test_gradcheck_scale_denom_and_difference(backend):
    hidden, base, plus, minus, mask = case(D=3, mask=torch.tensor([[False, True, False, True]]))
    index = response_index(mask)
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda *h: representation_loss(list(h), base, plus, minus, index, 0.7, kind=kind, backend=backend)[0], hidden)
    whole, _ = representation_loss(hidden, base, plus, minus, index, 0.7, backend=backend)
    v = [p - m for p, m in zip(plus, minus)]
    assert representation_loss(hidden, base, v, None, index, 0.7, backend=backend)[0].item() == pytest.approx(whole.item(), rel=1e-12)
    part, _ = representation_loss(hidden, base, plus, minus, index, 0.7, denom=10, scale=0.5, backend=backend)
    assert part.item() == pytest.approx(whole.item() * 2 * int(mask.sum()) / 10 * 0.5, rel=1e-12)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_incoming_gradient_and_a_second_backward(dtype, backend):
    """The first backward scales a buffer in place; the second must not find it scaled."""
    hidden, base, plus, minus, mask = case(D=64, dtype=dtype)
    for kind in KINDS:
        _, _, gradients = formula(hidden, base, plus, minus, mask, 0.5, kind)
        loss, _ = representation_loss(hidden, base, plus, minus, response_index(mask), 0.5, kind=kind, backend=backend)
        for by in (0.37, 3.0, 1.0):
            for ours, theirs in zip(torch.autograd.grad(loss * by, hidden, retain_graph=True), gradients):
                assert distance(ours / by, theirs) <= 2 * BOUND[dtype]


def test_small_fp16_gradients_survive():
    """A mean over very many tokens: each gradient is below what fp16 holds, until the loss is scaled up as for mixed precision."""
    hidden, base, plus, minus, mask = case(D=64, dtype=torch.float16)
    index, denom = response_index(mask), 2**22
    loss, _ = representation_loss(hidden, base, plus, minus, index, 0.5, denom=denom, backend="triton")
    _, _, gradients = formula(hidden, base, plus, minus, mask, 0.5, "l2")
    by = 2.0**16
    for ours, theirs in zip(torch.autograd.grad(loss * by, hidden), gradients):
        assert distance(ours, theirs * 2 * int(mask.sum()) / denom * by) <= BOUND[torch.float16]


def test_gradient_of_the_forward_is_that_of_the_backward():
    """Written ahead, or computed when the backward asks: bit for bit the same."""
    hidden, base, plus, minus, mask = case(D=100, dtype=torch.bfloat16)
    found, alpha = [], torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE)
    for in_forward in (True, False):
        loss, _ = FusedLoss.apply(base, plus, minus, [], response_index(mask), alpha, 1 / 30, False, in_forward, *hidden)
        found.append(torch.autograd.grad(loss, hidden))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@both
def test_accumulation_and_checkpointing(backend):
    """Two halves with scale 1/2 add up to the whole; a checkpointed head below the loss changes nothing."""
    hidden, base, plus, minus, mask = case(B=4, D=64, dtype=torch.float32, mask=torch.ones(4, 5, dtype=torch.bool))
    head = torch.nn.Linear(64, 64).to(DEVICE)

    def gradient(rows, scale, wrap):
        at = slice(rows.start * 5, rows.stop * 5)
        states = [wrap(h[rows]) for h in hidden]
        loss, _ = representation_loss(states, *[[s[at] for s in packed] for packed in (base, plus, minus)], response_index(mask[rows]), 0.5, scale=scale, backend=backend)
        return torch.autograd.grad(loss, head.weight)[0]
    whole = gradient(slice(0, 4), 1.0, head)
    halves = gradient(slice(0, 2), 0.5, head) + gradient(slice(2, 4), 0.5, head)
    assert torch.allclose(whole, halves, rtol=1e-4, atol=1e-7)
    assert torch.allclose(whole, gradient(slice(0, 4), 1.0, lambda h: checkpoint(head, h, use_reentrant=False)), rtol=1e-4, atol=1e-7)


@both
def test_composes_with_compile(backend):
    """As one graph (the torch backend's number of rows depends on the data, which breaks a graph)."""
    hidden, base, plus, minus, mask = case(D=64, dtype=torch.float32)
    index = response_index(mask)

    def loss(*h):
        return representation_loss([2 * x for x in h], base, plus, minus, index, 0.5, backend=backend)[0] * 0.37
    compiled = torch.compile(loss, fullgraph=backend == "triton", backend="inductor" if NATIVE else "aot_eager")
    eager = loss(*hidden)
    assert compiled(*hidden).item() == pytest.approx(eager.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(compiled(*hidden), hidden), torch.autograd.grad(eager, hidden)):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_same_bits_every_time():
    hidden, base, plus, minus, mask = case(L=3, B=4, S=50, D=100, dtype=torch.bfloat16)
    def once():
        loss, norms = representation_loss(hidden, base, plus, minus, response_index(mask), 0.5, backend="triton")
        return loss, norms, *torch.autograd.grad(loss, hidden)
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_more_than_2_to_the_31_elements():
    """Rows on both sides of 2^31 elements, packed and strided; most of the memory is never touched."""
    rows, D = 530_000, 4096
    torch.utils.deterministic.fill_uninitialized_memory = False
    big = torch.empty(rows, D, dtype=torch.bfloat16, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = True
    view = big.view(rows // 2, 2, D)[:: rows // 2 - 1]                          # [2, 2, D]: rows 0, 1, -2 and -1 of big
    view.copy_(torch.randn(2, 2, D))
    index = torch.tensor([rows - 1, -1, 0, rows - 2], dtype=torch.int32, device=DEVICE)
    hidden = [view.detach().requires_grad_()]
    loss, norms = representation_loss(hidden, [big], [big], None, index, 0.5, backend="triton", denom=3)
    r = view.double().flatten(0, 1)[[0, 2, 3]] - 1.5 * big[[rows - 1, 0, rows - 2]].double()
    assert loss.item() == pytest.approx(r.norm(dim=1).mean().item(), rel=1e-6)
    assert norms[0, [rows - 1, 0, rows - 2]].tolist() == pytest.approx(r.norm(dim=1).tolist(), rel=1e-6)
    gradient = torch.autograd.grad(loss, hidden)[0].flatten(0, 1)
    assert distance(gradient[[0, 2, 3]], (r / r.norm(dim=1, keepdim=True) / 3).cpu()) <= BOUND[torch.bfloat16] and (gradient[1] == 0).all()


@pytest.mark.skipif(not NATIVE, reason="writes 4 GB of gradient")
def test_gradient_of_more_than_2_to_the_31_elements():
    rows, D = 530_000, 4096
    hidden = [torch.ones(1, rows, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)]
    index = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    index[-1] = 0
    one = [torch.zeros(1, D, dtype=torch.bfloat16, device=DEVICE)]
    gradient = torch.autograd.grad(representation_loss(hidden, one, one, None, index, 1.0, backend="triton")[0], hidden)[0][0]
    assert (gradient[-1] == 1 / 64).all() and gradient[:-1].abs().max() == 0


def test_bytes_by_hand():
    """T = 3 of 10 rows, D = 8, two layers, bf16: 4 states of 3 rows read, 10 rows of gradient written."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :3] = True
    hidden, base, plus, minus, _ = case(D=8, dtype=torch.bfloat16, mask=mask)
    assert bytes_moved(hidden, base, plus, minus) == 2 * (4 * 3 + 10) * 8 * 2
    assert bytes_moved(hidden, base, plus, None) == 2 * (3 * 3 + 10) * 8 * 2
    c, U = [torch.zeros(3, 4, dtype=torch.bfloat16)] * 2, [torch.zeros(4, 8, dtype=torch.bfloat16)] * 2
    assert bytes_moved(hidden, base, c, None, U) == 2 * ((2 * 3 + 10) * 8 + 3 * 4 + 4 * 8) * 2


# ---------------------------------------------------------------- compiling, refusing, training

def without_interpreter(*command):
    """Run Python as on a machine whose GPU is not there and where TRITON_INTERPRET is unset."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_compiles_without_spills_and_with_16_byte_loads():
    """For sm_90 and sm_80, by ptxas, offline: 128-bit loads and stores alone for bf16 rows of a multiple of 16; D = 100 cannot have them."""
    for kernel in json.loads(without_interpreter("tests/compile_kernels.py")):
        assert kernel["stack"] == kernel["local"] == 0 and kernel["registers"] <= 96, kernel
        assert kernel["offsets_32"] == 0, kernel                                # every product of sizes is 64-bit
        if kernel["D"] % 16 == 0:
            each = 2 if kernel["D"] <= 4096 else 4                              # 16-byte loads of a state by one thread
            assert kernel["wide_loads"] == each * (3 if kernel.get("differenced") or kernel.get("low_rank") else 4) and kernel["narrow"] == kernel.get("low_rank", 0), kernel     # a coefficient is one number
            assert kernel["wide_stores"] == 2 * each, kernel                    # of a gradient row, or of its zeros


@both
def test_what_does_not_fit_is_refused(backend):
    hidden, base, plus, minus, mask = case()
    index = response_index(mask)
    wide = dict(hidden=[torch.zeros(1, 1, 16385, device=DEVICE)], index=index[:1], base=(w := [torch.zeros(1, 16385, device=DEVICE)]), plus=w, minus=w)
    for change, words in [(dict(base=base[:1]), "layers"), (dict(plus=[p[:, :3] for p in plus]), r"plus\[0\] has shape"), (dict(minus=[m[:-1] for m in minus]), "minus"),
                          (dict(index=index.long()), "int32"), (dict(index=index[:-1]), "index"), (dict(kind="l1"), "l1"), (dict(backend="cuda"), "cuda"),
                          (dict(alpha=torch.ones(3, device=DEVICE)), "alpha is"), (dict(hidden=[h[0] for h in hidden]), r"expected \[B, S, D\]"), (dict(directions=base), "minus None"),
                          (dict(minus=None, directions=[b[:2] for b in base]), r"plus\[0\] has shape"), (dict(base=[base[0], base[1].float()]), r"base\[1\]"), (dict(plus=[p.long() for p in plus]), "int64"),
                          (dict(hidden=[hidden[0], hidden[1].to("meta")]), r"hidden\[1\] is on meta"), (wide if backend == "triton" else dict(kind=""), "16385 is over 16384|kind")]:
        arguments = {**dict(hidden=hidden, base=base, plus=plus, minus=minus, index=index, alpha=1.0, backend=backend), **change}
        with pytest.raises(ValueError, match=words):
            representation_loss(**arguments)


def test_triton_on_the_cpu_says_why_not_and_auto_takes_torch():
    said = without_interpreter("-c", """
import torch
from kernels import representation_loss
h, s, index = [torch.ones(1, 1, 4, requires_grad=True)], [torch.zeros(1, 4)], torch.zeros(1, dtype=torch.int32)
print(representation_loss(h, s, s, s, index, 1.0)[0].item())
try:
    representation_loss(h, s, s, s, index, 1.0, backend="triton")
except ValueError as error:
    print(error)
""")
    value, error = said.splitlines()
    assert value == "2.0" and "not on cpu" in error and "TRITON_INTERPRET=1" in error


def test_align_trains_the_same_adapter_with_either_backend(tiny, tmp_path, monkeypatch):
    import collect
    import dual
    go(dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "20", "--device", DEVICE, "--dtype", "float32")
    go(collect, "--out", tmp_path, "--device", DEVICE)
    adapters = []
    for backend in BACKENDS:
        monkeypatch.setattr(align, "representation_loss", lambda *args, backend=backend, **options: representation_loss(*args, backend=backend, **options))
        go(align, "--out", tmp_path, "--steps", "8", "--batch-size", "4", "--device", DEVICE)
        adapters.append(load_file(tmp_path / "dual" / "align" / "adapter_model.safetensors"))
    assert any(tensor.abs().max() > 0 for name, tensor in adapters[0].items() if "lora_B" in name)
    for name, tensor in adapters[0].items():
        assert (adapters[1][name] - tensor).norm() <= 1e-4 * tensor.norm(), name
