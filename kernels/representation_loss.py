"""RAHF's alignment loss (paper section 3.3) over L target layers and T packed response tokens:

    r    = h - (b + α (h+ - h-))                per layer, per response token
    l2:    loss = Σ ||r||_2 / denom             grad = r / ||r|| / denom, 0 where r = 0       (the authors' code)
    mse:   loss = Σ ||r||² / D / denom          grad = 2 r / D / denom                        (the paper's square)

h is the trained model's own hidden state, dense [B, S, D]; b, h+ and h- were collected and are packed [T, D].
A row map joins the two: index[b * S + s] is the packed row of that token, or -1. Beyond the paper, h+ - h- may come as
its low-rank form c U: coefficients c [T, k] on k directions U [k, D] of the layer.

There is next to no arithmetic in it, so what a GPU takes is the bytes it moves. Plain PyTorch goes over the states again
and again: gather, difference, scale, add, subtract, square, sum, and all of it backwards. The Triton kernel goes over
them once. One program has one row of [B, S] in registers, so that when it knows ||r|| it still holds r and writes the
gradient in the forward pass already, zeros for rows that are no response included. In bytes per element of a response
token, in bf16, where a share f of the rows are responses (Σ over L·T·D elements; counted, not measured):

    read h, b, h+, h-  8    write the gradient of every row  2 / f      fused:  8 + 2/f   (10 at f = 1)
    low rank: read h, b  4 (c is k numbers a token; if U stays in cache)        4 + 2/f
                                                                        eager, packed: 62 + 2/f
"""
from __future__ import annotations            # the kernels' annotations are then no need of Triton

import os
import shutil

import torch

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                           # there is none for macOS and Windows: the torch backend serves
    triton, jit = None, lambda **options: lambda function: function

COMPILER = shutil.which(os.environ["CC"]) if "CC" in os.environ else shutil.which("gcc") or shutil.which("clang")         # of Triton's launchers
MAX_WIDTH = 16384                             # of a row in one program's registers


def response_index(mask):
    """Row map of a mask: bool [B, S] -> int32 [B*S], the marked tokens numbered in order, -1 elsewhere."""
    flat = mask.flatten()
    return torch.where(flat, flat.cumsum(0) - 1, -1).to(torch.int32)


def representation_loss(hidden, base, plus, minus, index, alpha, kind="l2", denom=None, scale=1.0, directions=None, backend="auto"):
    """The alignment loss and its per-token residual norms.

    hidden: list of L tensors [B, S, D] (float, need a gradient); base, plus, minus: lists of L tensors [T, D] of any
    float dtype (minus None: plus already holds v = h+ - h-); index: int32 [B*S], in which each packed row occurs once,
    see response_index; alpha: α, a float or a tensor [L] on the states' device with one a layer; kind: "l2" or "mse";
    denom: default L*T; scale: a factor on the loss, such as 1 / accumulation steps; directions: list of L tensors [k, D],
    then plus holds the coefficients [T, k] of v and minus is None; backend: "torch", "triton" (a GPU, or
    TRITON_INTERPRET=1), or "auto": Triton on a GPU.
    Returns (loss, norms): scalar and detached [L, T] = ||r||_2, in fp32 (fp64 where hidden is fp64).
    Raises ValueError where shapes, types or the backend don't fit.
    """
    check(hidden, base, plus, minus, index, alpha, directions, kind, backend)
    if not isinstance(alpha, torch.Tensor):
        alpha = torch.full((len(hidden),), alpha, dtype=torch.promote_types(hidden[0].dtype, torch.float32), device=index.device)
    denom = max(1, len(base) * len(base[0])) if denom is None else denom
    if backend == "auto":
        backend = "triton" if hidden[0].is_cuda and not why_not_triton(hidden[0]) else "torch"
    if backend == "torch":
        return torch_loss(hidden, base, plus, minus, index, alpha, kind, denom, scale, directions)
    need_gradient = torch.is_grad_enabled() and any(h.requires_grad for h in hidden)
    # fp16 would lose the small gradients of a mean over many tokens: there the backward computes them, times what comes in
    in_forward = need_gradient and hidden[0].dtype != torch.float16
    return FusedLoss.apply(base, plus, minus or [], directions or [], index, alpha, scale / denom, kind == "mse", in_forward, *hidden)


def check(hidden, base, plus, minus, index, alpha, directions, kind, backend):
    """Refuse what does not fit, before any arithmetic."""
    if kind not in ("l2", "mse"):
        raise ValueError(f"kind {kind!r}: must be 'l2' or 'mse'")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: must be 'auto', 'torch' or 'triton'")
    packed = {"base": base, "plus": plus, **({} if minus is None else {"minus": minus}), **({} if directions is None else {"directions": directions})}
    if directions is not None and minus is not None:
        raise ValueError("directions go with minus None: plus then holds coefficients on them")
    if hidden and hidden[0].dim() != 3:
        raise ValueError(f"hidden[0] has shape {tuple(hidden[0].shape)}, expected [B, S, D]")
    if not hidden or any(len(states) != len(hidden) for states in packed.values()):
        raise ValueError(f"hidden has {len(hidden)} layers, " + ", ".join(f"{name} {len(states)}" for name, states in packed.items()))
    B, S, D = hidden[0].shape
    T, k = len(base[0]), D if directions is None else len(directions[0])
    shapes = {"hidden": (B, S, D), "base": (T, D), "plus": (T, k), "minus": (T, D), "directions": (k, D)}
    for name, states in {"hidden": hidden, **packed}.items():
        wanted = shapes[name]
        for layer, state in enumerate(states):
            if tuple(state.shape) != wanted:
                raise ValueError(f"{name}[{layer}] has shape {tuple(state.shape)}, expected {wanted}")
            if state.device != hidden[0].device:
                raise ValueError(f"{name}[{layer}] is on {state.device}, hidden[0] on {hidden[0].device}")
            if state.dtype != states[0].dtype or not state.is_floating_point():
                raise ValueError(f"{name}[{layer}] is {state.dtype}, {name}[0] {states[0].dtype}: expected one float type")
    if index.dtype != torch.int32 or index.shape != (B * S,) or index.device != hidden[0].device:
        raise ValueError(f"index is {index.dtype} {tuple(index.shape)} on {index.device}, expected torch.int32 {(B * S,)} on {hidden[0].device}")
    if isinstance(alpha, torch.Tensor) and (alpha.shape != (len(hidden),) or alpha.device != hidden[0].device):
        raise ValueError(f"alpha is {tuple(alpha.shape)} on {alpha.device}, expected a float or {(len(hidden),)} on {hidden[0].device}")
    if backend == "triton" and (reason := why_not_triton(hidden[0])):
        raise ValueError(f"backend 'triton': {reason}; use backend='torch'")


def why_not_triton(h):
    """Why the Triton kernel cannot run on states like h, or ""."""
    if triton is None:
        return "Triton is not installed"
    if isinstance(loss_kernel, triton.JITFunction):                      # not the interpreter
        if not h.is_cuda:
            return f"it runs on a GPU, not on {h.device}, unless TRITON_INTERPRET=1 is set before the start"
        if not COMPILER:
            return "Triton needs a C compiler: gcc, clang or what the variable CC names"
    return f"hidden size {h.shape[-1]} is over {MAX_WIDTH}" if h.shape[-1] > MAX_WIDTH else ""


def bytes_moved(hidden, base, plus, minus, directions=None):
    """The fewest bytes that loss and gradient take: every state of a response token is read, every row's gradient written."""
    packed = sum(state.nbytes for states in (base, plus, minus or [], directions or []) for state in states)
    return packed + sum(len(base[0]) * h.shape[-1] * h.itemsize + h.nbytes for h in hidden)


# ---------------------------------------------------------------- plain PyTorch

def torch_loss(hidden, base, plus, minus, index, alpha, kind, denom, scale, directions):
    """The loss in plain PyTorch, differentiated by autograd: the reference, and the backend without a GPU."""
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    rows = (index >= 0).nonzero()[:, 0]
    rows = rows[index[rows].argsort()]                                   # [T] position in B*S of each packed row
    D, total, norms = hidden[0].shape[-1], 0.0, []
    for layer, h in enumerate(hidden):
        v = plus[layer].to(dtype)
        if minus is not None:
            v = v - minus[layer].to(dtype)                               # h+ - h-
        elif directions is not None:
            v = v @ directions[layer].to(dtype)                          # c U
        target = base[layer].to(dtype) + alpha[layer].to(dtype) * v      # b + α (h+ - h-)
        r = h.flatten(0, 1)[rows].to(dtype) - target                     # [T, D]
        norm = torch.linalg.vector_norm(r, dim=-1)                       # [T]; its gradient at r = 0 is 0
        total = total + (norm.sum() if kind == "l2" else r.square().sum() / D)
        norms.append(norm.detach())
    return total * (scale / denom), torch.stack(norms)


# ---------------------------------------------------------------- Triton

@jit()
def pick(pointers, layer, L: tl.constexpr):
    """pointers[layer] of a tuple of L pointers, where the layer is known at run time only."""
    found = pointers[0]
    for i in tl.static_range(1, L):
        found = tl.where(layer == i, pointers[i], found)
    return found


@jit(do_not_specialize=["S", "N", "T"])       # they change with every batch: no new compilation for them
def loss_kernel(hidden, base, plus, minus, directions, index, alpha, upstream, grad, terms, norms, scale: tl.float64,
                stride_b, stride_s, S, N, T, D, K: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, SQUARED: tl.constexpr,
                DIFFERENCED: tl.constexpr, LOW_RANK: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr):
    """One program is one row of one layer: its term of the loss, its norm and its row of the gradient.

    hidden, base, plus, minus, directions: tuples of L pointers; grad [L, N, D]; terms [L, N] with N = B*S; norms [L, T]. Offsets are
    64-bit: L·N·D passes 2^31 in real use. Rows go on grid axis 0, the only one that is not limited to 65,535.
    """
    program = tl.program_id(0)                                           # layer * N + position in B*S
    layer, position = program // N, program % N
    row = tl.load(index + position).to(tl.int64)                         # of the packed states
    written = grad + program.to(tl.int64) * D
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    if row < 0:                                                          # no response token: its gradient is 0
        tl.store(terms + program, tl.zeros([], ACC))
        if GRADIENT:
            tl.store(written + columns, tl.zeros([BLOCK], grad.dtype.element_ty), mask=inside)
    else:
        start = (position // S).to(tl.int64) * stride_b + (position % S).to(tl.int64) * stride_s
        h = tl.load(pick(hidden, layer, L) + start + columns, mask=inside, other=0.0).to(ACC)
        b = tl.load(pick(base, layer, L) + row * D + columns, mask=inside, other=0.0).to(ACC)
        if LOW_RANK:
            v = tl.zeros([BLOCK], ACC)
            coefficient, direction = pick(plus, layer, L) + row * K, pick(directions, layer, L) + columns
            for _ in range(K):                                           # c U: all programs of a layer read the same U, from the cache
                v += tl.load(coefficient).to(ACC) * tl.load(direction, mask=inside, other=0.0).to(ACC)
                coefficient += 1
                direction += D
        else:
            v = tl.load(pick(plus, layer, L) + row * D + columns, mask=inside, other=0.0).to(ACC)
            if not DIFFERENCED:
                v -= tl.load(pick(minus, layer, L) + row * D + columns, mask=inside, other=0.0).to(ACC)     # h+ - h-
        r = h - (b + tl.load(alpha + layer).to(ACC) * v)                 # h - (b + α (h+ - h-))
        square = tl.sum(r * r)
        norm = tl.sqrt(square)
        factor = tl.full([], scale, ACC)                                 # scale / denom
        tl.store(norms + layer.to(tl.int64) * T + row, norm)
        if SQUARED:
            tl.store(terms + program, factor * square / D)
        else:
            tl.store(terms + program, factor * norm)
        if GRADIENT:
            if UPSTREAM:
                factor *= tl.load(upstream).to(ACC)
            if SQUARED:
                factor = 2.0 * factor / D                                # d ||r||² / D  =  2 r / D
            else:
                factor = tl.where(norm == 0, 0.0, factor / norm)         # d ||r||  =  r / ||r||; NaN stays NaN
            tl.store(written + columns, (factor * r).to(grad.dtype.element_ty), mask=inside)


@jit()
def scale_kernel(grad, factor, n, BLOCK: tl.constexpr):
    """grad *= factor, in place; nothing is read or written where the factor is 1, as it is after loss.backward()."""
    by = tl.load(factor)
    if by != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(grad + at, mask=at < n)
        tl.store(grad + at, (value.to(by.dtype) * by).to(value.dtype), mask=at < n)


@torch.library.custom_op("rahf::fused", mutates_args=())                # an operator, so that torch.compile takes it as it is
def fused(hidden: list[torch.Tensor], base: list[torch.Tensor], plus: list[torch.Tensor], minus: list[torch.Tensor],
          directions: list[torch.Tensor], index: torch.Tensor, alpha: torch.Tensor, upstream: torch.Tensor | None,
          scale: float, squared: bool, gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel: (loss, norms [L, T], gradient [L, B, S, D], empty unless asked for). upstream: the incoming gradient, or 1."""
    loss, norms, grad = fused_shapes(hidden, base, plus, minus, directions, index, alpha, upstream, scale, squared, gradient)
    (B, S, D), L, T, K = hidden[0].shape, len(hidden), len(base[0]), len(directions[0]) if directions else 0
    if any(h.stride() != (*hidden[0].stride()[:2], 1) for h in hidden):
        hidden = [h.contiguous() for h in hidden]
    stride_b, stride_s, _ = hidden[0].stride()
    hidden, (base, plus, minus, directions) = tuple(hidden), [tuple(state.contiguous() for state in states) for states in (base, plus, minus, directions)]
    terms = torch.empty(L, B * S, dtype=loss.dtype, device=loss.device)
    block = triton.next_power_of_2(D)
    with torch.cuda.device_of(loss):
        loss_kernel[(L * B * S,)](
            hidden, base, plus, minus or plus, directions or plus, index.contiguous(), alpha.contiguous(), index if upstream is None else upstream,
            grad, terms, norms, scale, stride_b, stride_s, S, B * S, T, D, K,
            L=L, BLOCK=block, ACC=tl.float64 if loss.dtype == torch.float64 else tl.float32, SQUARED=squared,
            DIFFERENCED=not minus, LOW_RANK=bool(directions), GRADIENT=gradient, UPSTREAM=upstream is not None,
            num_warps=min(16, max(1, block // 512)))                     # 16 elements of each state a thread, as 16-byte loads
    return terms.sum(), norms, grad


@fused.register_fake
def fused_shapes(hidden, base, plus, minus, directions, index, alpha, upstream, scale, squared, gradient):
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    return (hidden[0].new_empty((), dtype=dtype), hidden[0].new_empty(len(hidden), len(base[0]), dtype=dtype),
            hidden[0].new_empty(len(hidden), *hidden[0].shape) if gradient else hidden[0].new_empty(0))


@torch.library.custom_op("rahf::scale_", mutates_args=("grad",))
def scale_(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad *= factor on the device: asking the host whether the factor is 1 would wait for the GPU."""
    with torch.cuda.device_of(grad):
        scale_kernel[(triton.cdiv(grad.numel(), 4096),)](grad, factor, grad.numel(), BLOCK=4096, num_warps=8)


class FusedLoss(torch.autograd.Function):
    """The kernel as a differentiable function of the hidden states."""

    @staticmethod
    def forward(ctx, base, plus, minus, directions, index, alpha, scale, squared, in_forward, *hidden):
        loss, norms, grad = fused(hidden, base, plus, minus, directions, index, alpha, None, scale, squared, in_forward)
        ctx.mark_non_differentiable(norms)
        ctx.ready, ctx.settings, ctx.lengths = in_forward, (scale, squared), [len(states) for states in (hidden, base, plus, minus, directions)]
        ctx.save_for_backward(grad, index, alpha, *hidden, *base, *plus, *minus, *directions)
        return loss, norms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        grad, index, alpha, *states = ctx.saved_tensors
        if ctx.ready:                          # .data: a buffer of our own, handed out once; a second backward computes afresh
            ctx.ready, grad = False, grad.data
            scale_(grad, upstream)
        else:
            states = [[states.pop(0) for _ in range(length)] for length in ctx.lengths]
            *_, grad = fused(*states, index, alpha, upstream, *ctx.settings, True)
        return (None,) * 9 + grad.unbind(0)
