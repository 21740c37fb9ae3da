"""RAHF's alignment loss (paper section 3.3) over L target layers and T recorded positions:

    e = h - (b + α (h+ - h-))            the residual, per layer and recorded position
    l2:   loss = Σ ||e||_2 / denom       grad = e / ||e|| / denom, 0 where e = 0   (authors' code)
    mse:  loss = Σ ||e||² / D / denom    grad = 2 e / D / denom                    (the paper)

h is the trained model's own hidden state, dense [B, S, D] per layer. b, h+ and h- were recorded at
T of the B * S positions (the response's tokens and the last prompt token) and are packed: [T, D]
per layer. positions [T] says where in [B * S] each packed row belongs.

This file has the loss twice, in plain PyTorch (torch_loss) and as a Triton kernel (loss_kernel).
It does next to no arithmetic, so on a GPU it costs the bytes that it moves. PyTorch passes over
the states many times: gather, subtract, scale, add, subtract, square, sum, and all of it
backwards. The kernel passes over them once. One program holds one row of [B, S] in registers;
when it knows ||e|| it still has e, and writes the gradient during the forward pass, zeros for
the other positions included. Hence no atomics, no zero fill, no synchronisation, and the same bits
every time. Counted in bytes per element of a recorded position, bf16, where a share f of the rows
of [B, S] is recorded:

    fused             8 + 2/f     read h, b, h+, h-; write the gradient of every row
    eager, packed    62 + 2/f     the same loss as separate PyTorch operations
"""

# Triton's annotations must not be evaluated where Triton is missing.
from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    # Triton has no wheels for macOS and Windows: there the torch backend does the work.
    triton = None

# A program holds a whole row in registers: up to this hidden size it compiles without spills.
MAX_HIDDEN_SIZE = 16384

# Enough programs of 8 warps to fill any GPU with the scaling of a gradient.
MAX_SCALE_PROGRAMS = 1024


def missing_for_launchers():
    """What Triton lacks to build its launchers, which it does with a C compiler at run time."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return "Triton needs a C compiler: install gcc or clang, or set the variable CC"
    # Debian's own scheme names a folder without headers; Triton does not look there either
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers, such as {header}: install python3-dev"
    return ""


MISSING = missing_for_launchers()

# Types of device that the kernel runs on. With TRITON_INTERPRET=1, Triton interprets it anywhere.
if triton is None:
    TRITON_DEVICES = ()
elif triton.knobs.runtime.interpret:
    TRITON_DEVICES = ("cpu", "cuda")
else:
    TRITON_DEVICES = () if MISSING else ("cuda",)


def representation_loss(
    hidden, base, plus, minus, positions, alpha, kind="l2", denom=None, backend="auto"
):
    """The alignment loss and the norms of its residuals.

    hidden: list of L tensors [B, S, D], bf16, fp32 or fp64, that need a gradient
    base, plus, minus: lists of L tensors [T, D] of any floating-point dtype: b, h+, h-;
        with minus None, plus holds the difference v = h+ - h-
    positions: int64 [T], where in [B * S] each packed row was recorded; no two are the same
    alpha: α, a float
    kind: "l2" or "mse"
    denom: what the sum is divided by, by default L*T
    backend: "torch", "triton", or "auto": Triton on a GPU where it is available

    Returns (loss, norms): a scalar, and detached [L, T] = ||e||_2 in packed order, both in fp32
    (fp64 where hidden is fp64). The Triton backend allows one backward pass per loss.
    Raises ValueError if shapes, dtypes, devices or the backend do not fit.
    """
    check_inputs(hidden, base, plus, minus, positions, kind, backend)
    device = hidden[0].device
    if denom is None:
        denom = max(1, len(base) * len(base[0]))
    if backend == "auto":
        reason = triton_unavailable_reason(hidden[0].shape[-1], device)
        backend = "triton" if device.type == "cuda" and not reason else "torch"
    if backend == "torch":
        return torch_loss(hidden, base, plus, minus, positions, alpha, kind, denom)
    # The kernel goes the other way: its programs are the positions [B * S], and each looks up its
    # packed row here; -1 is none.
    B, S, _ = hidden[0].shape
    rows = torch.full((B * S,), -1, dtype=torch.int32, device=device)
    rows[positions] = torch.arange(len(positions), dtype=torch.int32, device=device)
    squared = kind == "mse"
    # grad mode is always off inside FusedLoss.forward
    grad_enabled = torch.is_grad_enabled()
    return FusedLoss.apply(
        base, plus, minus or [], rows, alpha, 1 / denom, squared, grad_enabled, *hidden
    )


def check_inputs(hidden, base, plus, minus, positions, kind, backend):
    """Raise ValueError unless the arguments fit together.

    One function without helpers: it runs at every step, and the GPU waits for the host.
    """
    if kind not in ("l2", "mse"):
        raise ValueError(f"kind {kind!r}: must be 'l2' or 'mse'")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: must be 'auto', 'torch' or 'triton'")
    if not hidden or hidden[0].dim() != 3:
        raise ValueError("hidden: expected a list of tensors of shape [B, S, D]")
    # the gradient is divided by denom before it is rounded to hidden's dtype: fp16 would underflow
    if hidden[0].dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"hidden is {hidden[0].dtype}: must be bfloat16, float32 or float64")

    B, S, D = hidden[0].shape
    T = len(base[0]) if base else 0
    device = hidden[0].device
    expected_shapes = [
        ("hidden", hidden, (B, S, D)),
        ("base", base, (T, D)),
        ("plus", plus, (T, D)),
    ]
    if minus is not None:
        expected_shapes.append(("minus", minus, (T, D)))
    for name, layers, shape in expected_shapes:
        if len(layers) != len(hidden):
            raise ValueError(f"{name} has {len(layers)} layers, hidden has {len(hidden)}")
        dtype = layers[0].dtype
        if not dtype.is_floating_point:
            raise ValueError(f"{name} is {dtype}: must be a floating-point dtype")
        for layer, state in enumerate(layers):
            if (state.shape, state.dtype, state.device) != (shape, dtype, device):
                raise ValueError(
                    f"{name}[{layer}] is {state.dtype} {tuple(state.shape)} on {state.device}, "
                    f"expected {dtype} {shape} on {device}"
                )

    if (positions.shape, positions.dtype, positions.device) != ((T,), torch.int64, device):
        raise ValueError(
            f"positions is {positions.dtype} {tuple(positions.shape)} on {positions.device}, "
            f"expected torch.int64 {(T,)} on {device}"
        )
    if backend == "triton" and (D > MAX_HIDDEN_SIZE or device.type not in TRITON_DEVICES):
        reason = triton_unavailable_reason(D, device)
        raise ValueError(f"backend 'triton': {reason}; use backend='torch'")


def triton_unavailable_reason(hidden_size, device):
    """Why the Triton kernel cannot run on states of this size on this torch.device, or ""."""
    if hidden_size > MAX_HIDDEN_SIZE:
        return f"hidden size {hidden_size} is over {MAX_HIDDEN_SIZE}"
    if device.type in TRITON_DEVICES:
        return ""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"it runs on a GPU, not on {device}, unless TRITON_INTERPRET=1 is set at the start"
    return MISSING


def bytes_moved(hidden, base, plus, minus):
    """The minimum number of bytes that loss and gradient must move.

    Read: every state of a recorded position. Written: the gradient of every row.
    """
    total = 0
    for states in (base, plus, minus or []):
        total += sum(state.nbytes for state in states)
    for h in hidden:
        total += len(base[0]) * h.shape[-1] * h.itemsize
        total += h.nbytes
    return total


# ---------------------------------------------------------------- plain PyTorch


def torch_loss(hidden, base, plus, minus, positions, alpha, kind, denom):
    """The loss in plain PyTorch, differentiated by autograd. Edit this for another loss."""
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    D = hidden[0].shape[-1]
    total = 0.0
    norms = []
    for layer, h in enumerate(hidden):
        v = plus[layer].to(dtype)
        if minus is not None:
            v = v - minus[layer].to(dtype)  # h+ - h-
        target = base[layer].to(dtype) + alpha * v  # b + α (h+ - h-)
        e = h.flatten(0, 1).index_select(0, positions).to(dtype) - target  # [T, D]
        norm = torch.linalg.vector_norm(e, dim=-1)  # [T]; its gradient is 0 where e = 0
        if kind == "l2":
            total = total + norm.sum()
        else:
            total = total + e.square().sum() / D
        norms.append(norm.detach())
    # as the kernel does it, so that both round alike
    return total * (1 / denom), torch.stack(norms)


# ---------------------------------------------------------------- Triton


def jit(**options):
    """triton.jit; without Triton, a decorator that leaves the kernels below as they are."""

    def keep(function):
        return function

    return triton.jit(**options) if triton else keep


@jit()
def pick(pointers, layer, L: tl.constexpr):
    """pointers[layer] of a tuple of L pointers, for a layer that is known only at run time."""
    pointer = pointers[0]
    for i in tl.static_range(1, L):
        pointer = tl.where(layer == i, pointers[i], pointer)
    return pointer


# S, N and T change with every batch: specialising on them would compile the kernel anew
@jit(do_not_specialize=["S", "N", "T"])
def loss_kernel(
    hidden,  # L pointers to [B, S, D]: h, with columns adjacent
    base,  # L pointers to [T, D]: b
    plus,  # L pointers to [T, D]: h+, or v if DIFFERENCED
    minus,  # L pointers to [T, D]: h-, not read if DIFFERENCED
    rows,  # [N] int32: each position's packed row, or -1
    grad,  # [L, N, D], written if GRADIENT: d loss / d h
    terms,  # [L, N], written: what each position adds to the loss
    norms,  # [L, T], written: ||e||
    # as plain floats these would arrive in fp32
    alpha: tl.float64,  # α
    inverse_denom: tl.float64,  # 1 / denom
    stride_b,  # elements from one sequence of h to the next
    stride_s,  # elements from one token of h to the next
    S,  # tokens in a sequence
    N,  # positions, B * S
    T,  # packed rows
    D,  # hidden size
    L: tl.constexpr,  # layers
    BLOCK: tl.constexpr,  # D rounded up to a power of 2
    ACC: tl.constexpr,  # dtype of the arithmetic, of terms and of norms
    SQUARED: tl.constexpr,  # kind is "mse", not "l2"
    DIFFERENCED: tl.constexpr,  # plus holds v = h+ - h-
    GRADIENT: tl.constexpr,  # whether to write grad
):
    """One program handles one position of one layer: its term, its norm, its row of grad.

    All offsets are 64-bit, because L * N * D passes 2^31 in real use. The programs lie on grid
    axis 0, the only one that is not limited to 65,535.
    """
    program = tl.program_id(0)  # layer * N + position
    layer = program // N
    position = program % N
    row = tl.load(rows + position).to(tl.int64)
    grad_row = grad + program.to(tl.int64) * D
    columns = tl.arange(0, BLOCK)
    inside = columns < D

    if row < 0:  # not recorded: its gradient is 0
        tl.store(terms + program, tl.zeros([], ACC))
        if GRADIENT:
            zeros = tl.zeros([BLOCK], grad.dtype.element_ty)
            tl.store(grad_row + columns, zeros, mask=inside)
    else:
        start = (position // S).to(tl.int64) * stride_b + (position % S).to(tl.int64) * stride_s
        h_row = pick(hidden, layer, L) + start
        b_row = pick(base, layer, L) + row * D
        v_row = pick(plus, layer, L) + row * D
        h = tl.load(h_row + columns, mask=inside, other=0.0).to(ACC)
        b = tl.load(b_row + columns, mask=inside, other=0.0).to(ACC)
        v = tl.load(v_row + columns, mask=inside, other=0.0).to(ACC)
        if not DIFFERENCED:
            minus_row = pick(minus, layer, L) + row * D
            v -= tl.load(minus_row + columns, mask=inside, other=0.0).to(ACC)  # h+ - h-

        e = h - (b + tl.full([], alpha, ACC) * v)  # h - (b + α (h+ - h-))
        square = tl.sum(e * e)
        norm = tl.sqrt(square)
        scale = tl.full([], inverse_denom, ACC)
        tl.store(norms + layer.to(tl.int64) * T + row, norm)
        if SQUARED:
            tl.store(terms + program, scale * square / D)
        else:
            tl.store(terms + program, scale * norm)

        if GRADIENT:
            if SQUARED:
                scale = 2.0 * scale / D  # d ||e||² / D = 2 e / D
            else:
                scale = tl.where(norm == 0, 0.0, scale / norm)  # d ||e|| = e / ||e||; NaN stays NaN
            tl.store(grad_row + columns, (scale * e).to(grad.dtype.element_ty), mask=inside)


@jit()
def scale_kernel(
    grad,  # [n], scaled in place
    scale,  # []: the gradient of the loss that backward() receives
    n,  # elements of grad
    BLOCK: tl.constexpr,  # elements at a time
):
    """grad *= scale. After a plain loss.backward() scale is 1 and nothing is read: so there are few
    programs, which loop over their blocks where scale is another number."""
    value = tl.load(scale)
    if value != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < n:
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(grad + offsets, mask=offsets < n)
            tl.store(grad + offsets, (x.to(value.dtype) * value).to(x.dtype), mask=offsets < n)
            start += tl.num_programs(0) * BLOCK


# Custom operators, so that torch.compile takes the two launches as they are.


@torch.library.custom_op("rahf::loss_and_gradient", mutates_args=())
def loss_and_gradient(
    hidden: list[torch.Tensor],
    base: list[torch.Tensor],
    plus: list[torch.Tensor],
    minus: list[torch.Tensor],
    rows: torch.Tensor,
    alpha: float,
    inverse_denom: float,
    squared: bool,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch loss_kernel: (loss [], norms [L, T], gradient [L, B, S, D] or, unasked for, [0])."""
    L = len(hidden)
    T = len(base[0])
    B, S, D = hidden[0].shape
    N = B * S
    if len(set(map(torch.Tensor.stride, hidden))) > 1 or hidden[0].stride(-1) != 1:
        hidden = map(torch.Tensor.contiguous, hidden)
    hidden = tuple(hidden)
    stride_b, stride_s, _ = hidden[0].stride()
    base = tuple(map(torch.Tensor.contiguous, base))
    plus = tuple(map(torch.Tensor.contiguous, plus))
    minus = tuple(map(torch.Tensor.contiguous, minus))

    x = hidden[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad = x.new_empty(L, B, S, D) if gradient else x.new_empty(0)
    terms = x.new_empty(L, N, dtype=dtype)
    norms = x.new_empty(L, T, dtype=dtype)
    block = triton.next_power_of_2(D)
    with torch.cuda.device_of(x):
        loss_kernel[(L * N,)](
            hidden,
            base,
            plus,
            minus or plus,  # Triton needs some pointer here
            rows,
            grad,
            terms,
            norms,
            alpha,
            inverse_denom,
            stride_b,
            stride_s,
            S,
            N,
            T,
            D,
            L=L,
            BLOCK=block,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            SQUARED=squared,
            DIFFERENCED=not minus,
            GRADIENT=gradient,
            # up to width 4,096 a thread holds 8 elements of each state, in bf16 one load of 16
            # bytes: nearly all loads of a row are under way together (of 32 kB in flight at width
            # 4,096, compiled for an H100, 32 by Triton 3.9 and 24 by 3.6)
            num_warps=min(16, max(1, block // 256)),
        )
    return terms.sum(), norms, grad


@loss_and_gradient.register_fake
def _(hidden, base, plus, minus, rows, alpha, inverse_denom, squared, gradient):
    """The shapes and dtypes of the outputs, for torch.compile."""
    x = hidden[0]
    L = len(hidden)
    T = len(base[0])
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad = x.new_empty(L, *x.shape) if gradient else x.new_empty(0)
    return x.new_empty((), dtype=dtype), x.new_empty(L, T, dtype=dtype), grad


@torch.library.custom_op("rahf::scale_", mutates_args=("grad",))
def scale_(grad: torch.Tensor, scale: torch.Tensor) -> None:
    """grad *= scale, decided on the device: to ask here whether scale is 1 would wait for it."""
    n = grad.numel()
    with torch.cuda.device_of(grad):
        programs = min(triton.cdiv(n, 4096), MAX_SCALE_PROGRAMS)
        scale_kernel[(programs,)](grad, scale, n, BLOCK=4096, num_warps=8)


class FusedLoss(torch.autograd.Function):
    """The kernel as a differentiable function of the hidden states."""

    @staticmethod
    def forward(ctx, base, plus, minus, rows, alpha, inverse_denom, squared, grad_enabled, *hidden):
        gradient = grad_enabled and any(ctx.needs_input_grad)
        loss, norms, grad = loss_and_gradient(
            hidden, base, plus, minus, rows, alpha, inverse_denom, squared, gradient
        )
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(grad)
        ctx.handed_out = False
        return loss, norms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        if ctx.handed_out:
            raise RuntimeError(
                "second backward pass through one loss: its gradient was computed in the forward "
                "pass and has been handed out; call representation_loss again"
            )
        ctx.handed_out = True
        # in place: nobody else has seen this buffer
        (grad,) = ctx.saved_tensors
        scale_(grad, upstream)
        return (None,) * 8 + grad.unbind(0)
