"""The forms of the alignment loss that kernel/bench.py compares: their random inputs, the bytes
that they move, and their check against float64.
"""

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernel.representation_loss import representation_loss

ALPHA = 0.5
SEQUENCE_LENGTH = 512

# Upper bounds of ||error|| / ||reference||. Rounding the gradient to bf16 alone gives 1.7e-3.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-5}

# ---------------------------------------------------------------- inputs

# L layers, T response tokens, hidden size D, share f of the rows of [B, S] that are responses
Shape = namedtuple("Shape", "L T D f")

# hidden: L x [B, S, D]; base, plus, minus: L x [T, D]; mask: bool [B, S]; positions: int64 [T]
Inputs = namedtuple("Inputs", "hidden base plus minus mask positions alpha")


def random_inputs(shape, seed, device, dtype):
    """Normal states with T response tokens scattered over [B, S]."""
    L, T, D, f = shape
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.zeros(round(T / f), dtype=torch.bool, device=device)
    order = torch.randperm(len(mask), generator=generator, device=device)
    mask[order[:T]] = True
    mask = mask.view(-1, SEQUENCE_LENGTH)

    def normal(*rows):
        options = {"generator": generator, "device": device, "dtype": dtype}
        return [torch.randn(*rows, D, **options) for _ in range(L)]

    hidden = [h.requires_grad_() for h in normal(*mask.shape)]
    base, plus, minus = normal(T), normal(T), normal(T)
    return Inputs(hidden, base, plus, minus, mask, mask.flatten().nonzero()[:, 0], ALPHA)


def by_row(inputs):
    """A layout: int64 [B*S], each position's packed row or any other, in place of positions."""
    return inputs._replace(positions=(inputs.mask.flatten().cumsum(0) - 1).clamp(min=0))


def scattered(inputs):
    """A layout: the collected states at their places in [B, S, D], zeros between them."""

    def scatter(states):
        dense = []
        for h, state in zip(inputs.hidden, states):
            zeros = torch.zeros_like(h, requires_grad=False)
            dense.append(zeros.flatten(0, 1).index_copy_(0, inputs.positions, state).view_as(h))
        return dense

    return inputs._replace(
        base=scatter(inputs.base), plus=scatter(inputs.plus), minus=scatter(inputs.minus)
    )


# ---------------------------------------------------------------- the forms of the loss


def authors(hidden, base, plus, minus, mask, positions, alpha):
    """All layers in one masked dense stack, as RAHF's authors write it.

    Their mean also counts padding; this one does not.
    """
    mask = mask[None, :, :, None]
    targets = [b + alpha * (p - m) for b, p, m in zip(base, plus, minus)]
    target = torch.stack(targets) * mask
    states = torch.stack(hidden) * mask
    norms = torch.norm(states - target, p=2, dim=-1, dtype=torch.float32)
    return norms.sum() / (len(hidden) * mask.sum())


def packed(hidden, base, plus, minus, mask, positions, alpha):
    """Response tokens only, in the states' own dtype: the cheapest eager form within tolerance."""
    total = 0.0
    for h, b, p, m in zip(hidden, base, plus, minus):
        e = h.flatten(0, 1)[positions] - (b + alpha * (p - m))
        total = total + torch.linalg.vector_norm(e, dim=-1, dtype=torch.float32).sum()
    return total / (len(base) * len(base[0]))


def where(hidden, base, plus, minus, mask, rows, alpha):
    """The collected states gathered to the rows of [B, S]: the gradient needs no scatter."""
    is_response = mask.flatten()[:, None]
    total = 0.0
    for h, b, p, m in zip(hidden, base, plus, minus):
        target = b[rows].float() + alpha * (p[rows].float() - m[rows].float())
        e = torch.where(is_response, h.flatten(0, 1).float() - target, 0.0)
        total = total + torch.linalg.vector_norm(e, dim=-1).sum()
    return total / (len(base) * len(base[0]))


def torch_backend(hidden, base, plus, minus, mask, positions, alpha):
    return representation_loss(hidden, base, plus, minus, positions, alpha, backend="torch")[0]


def fused(hidden, base, plus, minus, mask, positions, alpha):
    return representation_loss(hidden, base, plus, minus, positions, alpha, backend="triton")[0]


@dataclass(frozen=True)
class Form:
    """One way to compute loss and gradient, and the bytes that it moves in bf16 (counted)."""

    # (hidden, base, plus, minus, mask, positions, alpha) -> loss
    loss: Callable
    # bytes for each element of a response token
    response_bytes: float
    # bytes for each element of every row of [B, S]
    row_bytes: float
    # Inputs -> Inputs, how the form wants them; not timed
    layout: Callable | None = None
    # plus holds v = h+ - h-, in the reference too
    differenced: bool = False
    # the incoming gradient
    upstream: float = 1.0

    def own_bytes(self, f):
        """Bytes of both passes per element of a response token, for the share f of responses."""
        return self.response_bytes + self.row_bytes / f


def forms():
    """{name: Form}."""
    packed_compiled = torch.compile(packed, fullgraph=True, dynamic=False)
    where_compiled = torch.compile(where, fullgraph=True, dynamic=False)
    return {
        "authors, eager": Form(authors, 0, 72, scattered),
        "packed, eager": Form(packed, 62, 2),
        # in fp32
        "torch backend": Form(torch_backend, 112, 2),
        # both passes read all four states
        "packed, compiled": Form(packed_compiled, 16, 2),
        # reads h, writes and reads e, writes the gradient: at every row
        "where, compiled": Form(where_compiled, 6, 8, by_row),
        "fused": Form(fused, 8, 2),
        # reads and writes the gradient once more
        "fused, incoming 0.37": Form(fused, 8, 6, upstream=0.37),
        "fused, v differenced": Form(fused, 6, 2, differenced=True),
    }


def prepare(form, shape, seed, device, dtype):
    """(inputs, forward, step): forward() returns the loss, step() the loss and its gradients."""
    inputs = random_inputs(shape, seed, device, dtype)
    if form.differenced:
        inputs = inputs._replace(minus=None)
    arguments = form.layout(inputs) if form.layout else inputs
    upstream = torch.tensor(form.upstream, device=device)

    def forward():
        return form.loss(*arguments)

    def step():
        loss = forward()
        return loss, torch.autograd.grad(loss, inputs.hidden, upstream)

    return inputs, forward, step


# ---------------------------------------------------------------- correctness


def check(inputs, step, upstream):
    """Relative errors of one forward and backward pass against float64.

    Raises ArithmeticError if they exceed TOLERANCE, or if a token that is not part of a response
    has a gradient other than 0.
    """
    poison_free_memory(inputs)
    loss, gradients = step()
    errors = relative_errors(inputs, upstream, loss, gradients)
    tolerance = TOLERANCE[inputs.hidden[0].dtype]
    # written so that NaN fails
    if not all(error <= tolerance for error in errors.values()):
        measured = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise ArithmeticError(f"relative {measured}, over {tolerance:.0e}")
    for gradient in gradients:
        written = (gradient != 0).any(-1)
        if (written & ~inputs.mask).any():
            raise ArithmeticError("the gradient of a token that is not part of a response is not 0")
    return errors


def poison_free_memory(inputs):
    """Fill the memory that a form will get with NaN, so that what it leaves unwritten shows."""
    device, dtype = inputs.mask.device, inputs.hidden[0].dtype
    L = len(inputs.base)
    T, D = inputs.base[0].shape
    N = inputs.mask.numel()
    if device.type == "cuda":
        # the blocks that are freed below are then the next to be handed out
        torch.cuda.empty_cache()
    state_shapes = [(L, N, D), *[(N, D), (T, D)] * L]
    norm_shapes = [(L, N), (L, T), (1,)] * 4
    poison = [torch.full(shape, math.nan, dtype=dtype, device=device) for shape in state_shapes]
    poison += [torch.full(shape, math.nan, device=device) for shape in norm_shapes]
    del poison


@torch.no_grad()
def relative_errors(inputs, upstream, loss, gradients, chunk_size=2048):
    """||error|| / ||reference|| of loss and gradient. In chunks: float64 is four times the size."""
    L, T = len(inputs.base), len(inputs.base[0])
    expected_loss = squared_error = squared_size = 0.0
    for layer, (h, gradient) in enumerate(zip(inputs.hidden, gradients)):
        for start in range(0, T, chunk_size):
            rows = slice(start, start + chunk_size)
            here = inputs.positions[rows]
            v = inputs.plus[layer][rows].double()
            if inputs.minus is not None:
                v -= inputs.minus[layer][rows].double()
            target = inputs.base[layer][rows].double() + inputs.alpha * v
            e = h.flatten(0, 1)[here].double() - target
            norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
            expected = upstream * e / norm / (L * T)
            error = gradient.flatten(0, 1)[here].double() - expected
            expected_loss = expected_loss + norm.sum() / (L * T)
            squared_error = squared_error + error.square().sum()
            squared_size = squared_size + expected.square().sum()
    loss_error = (loss.double() - expected_loss).abs() / expected_loss
    gradient_error = (squared_error / squared_size).sqrt()
    return {"loss_error": loss_error.item(), "gradient_error": gradient_error.item()}
