"""What kernels/bench.py compares: each form of the alignment loss, its inputs, its bytes, and its check against float64."""
import math
from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.representation_loss import FusedLoss, representation_loss, response_index

ALPHA = 0.5
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-5}    # ||error|| / ||reference||; the gradient's rounding to bf16 alone is 1.7e-3

# ---------------------------------------------------------------- inputs

# L x [B, S, D], L x [T, D] thrice, bool [B, S], int32 [B*S], α, and None or L x [k, D]: then plus holds coefficients, L x [T, k]
Inputs = namedtuple("Inputs", "hidden base plus minus mask index alpha directions", defaults=[None])


def random_inputs(shape, seed, device, dtype):
    L, T, D, f = shape
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.zeros(round(T / f), dtype=torch.bool, device=device)
    mask[torch.randperm(len(mask), generator=generator, device=device)[:T]] = True       # T responses, scattered
    mask = mask.view(-1, 512)

    def normal(*size):
        return [torch.randn(*size, D, generator=generator, device=device, dtype=dtype) for _ in range(L)]
    hidden = [h.requires_grad_() for h in normal(*mask.shape)]
    return Inputs(hidden, normal(T), normal(T), normal(T), mask, response_index(mask), ALPHA)


def differenced(x):
    """v in place of h+ and h-."""
    return x._replace(minus=None)


def low_rank(x, k=8):
    """v of rank k."""
    return x._replace(plus=[p[:, :k].contiguous() for p in x.plus], minus=None, directions=[m[:k] / k ** 0.5 for m in x.minus])


def difference(x, layer, rows):
    """v = h+ - h- in float64."""
    plus = x.plus[layer][rows].double()
    if x.directions:
        return plus @ x.directions[layer].double()
    return plus if x.minus is None else plus - x.minus[layer][rows].double()


def positions(x):
    return x.mask.flatten().nonzero()[:, 0]


def by_rows(x):
    """The positions of the response tokens in place of the row map: nonzero() waits for the GPU, so it is not timed."""
    return x._replace(index=positions(x))


def scattered(x):
    """The collected states at their places in [B, S, D], zeros between."""
    rows = positions(x)
    dense = [[torch.zeros_like(h, requires_grad=False).flatten(0, 1).index_copy_(0, rows, s).view_as(h) for h, s in zip(x.hidden, states)]
             for states in (x.base, x.plus, x.minus)]
    return x._replace(base=dense[0], plus=dense[1], minus=dense[2])


# ---------------------------------------------------------------- the forms of the loss

def authors(hidden, base, plus, minus, mask, index, alpha):
    """As RAHF's authors write it, all layers in one masked dense stack; but their mean counts padding and this one does not."""
    mask = mask[None, :, :, None]
    target = torch.stack([b + alpha * (p - m) for b, p, m in zip(base, plus, minus)]) * mask
    states = torch.stack(hidden) * mask
    return torch.norm(states - target, p=2, dim=-1, dtype=torch.float32).sum() / (len(hidden) * mask.sum())


def packed(hidden, base, plus, minus, mask, rows, alpha):
    """Response tokens only, and in the states' own type: eager PyTorch at its cheapest that still meets the tolerance."""
    total = 0.0
    for h, b, p, m in zip(hidden, base, plus, minus):
        r = h.flatten(0, 1)[rows] - (b + alpha * (p - m))
        total = total + torch.linalg.vector_norm(r, dim=-1, dtype=torch.float32).sum()
    return total / (len(base) * len(base[0]))


def where(hidden, base, plus, minus, mask, index, alpha):
    """The collected states gathered to the rows of [B, S], so that the gradient needs no scatter."""
    at, marked, total = index.clamp(min=0), mask.flatten()[:, None], 0.0
    for h, b, p, m in zip(hidden, base, plus, minus):
        r = h.flatten(0, 1).float() - (b[at].float() + alpha * (p[at].float() - m[at].float()))
        total = total + torch.linalg.vector_norm(torch.where(marked, r, 0.0), dim=-1).sum()
    return total / (len(base) * len(base[0]))


def torch_backend(hidden, base, plus, minus, mask, index, alpha):
    return representation_loss(hidden, base, plus, minus, index, alpha, backend="torch")[0]


def fused(hidden, base, plus, minus, mask, index, alpha, directions=None):
    return representation_loss(hidden, base, plus, minus, index, alpha, directions=directions, backend="triton")[0]


def recomputed(hidden, base, plus, minus, mask, index, alpha):
    alpha = torch.full((len(hidden),), alpha, dtype=torch.float64, device=index.device)      # as representation_loss does
    return FusedLoss.apply(base, plus, minus, [], index, alpha, 1 / (len(base) * len(base[0])), False, False, *hidden)[0]


class Form(NamedTuple):
    loss: Callable                                         # (hidden, base, plus, minus, mask, index, alpha) -> loss
    own_bytes: Callable                                    # of f: bytes per element of a response token, both passes, bf16; counted
    layout: Callable = lambda x: x                         # how the inputs are handed over; not timed
    inputs: Callable = lambda x: x                         # a change of what is computed, for the reference too
    upstream: float = 1.0                                  # the incoming gradient


def forms():
    def compiled(function):
        return torch.compile(function, fullgraph=True, dynamic=False)
    return {
        "authors, eager": Form(authors, lambda f: 72 / f, scattered),
        "packed, eager": Form(packed, lambda f: 62 + 2 / f, by_rows),
        "torch backend": Form(torch_backend, lambda f: 112 + 2 / f),                 # in fp32, and it finds the rows itself
        "packed, compiled": Form(compiled(packed), lambda f: 16 + 2 / f, by_rows),   # both passes read all four states
        "where, compiled": Form(compiled(where), lambda f: 6 + 8 / f),               # h read, r written and read, gradient: every row
        "fused": Form(fused, lambda f: 8 + 2 / f),
        "fused, incoming 0.37": Form(fused, lambda f: 8 + 6 / f, upstream=0.37),     # reads and writes the gradient once more
        "fused, recomputed": Form(recomputed, lambda f: 16 + 2 / f),
        "fused, v differenced": Form(fused, lambda f: 6 + 2 / f, inputs=differenced),
        "fused, low rank": Form(fused, lambda f: 4 + 2 / f, inputs=low_rank),        # k numbers a token; the directions stay in cache
    }


def prepare(form, shape, seed, device, dtype):
    """(inputs, forward, step): forward() gives the loss, step() the loss and its gradient."""
    x = form.inputs(random_inputs(shape, seed, device, dtype))
    arguments = form.layout(x)[:8 if x.directions else 7]                                    # only one form knows directions
    upstream = torch.tensor(form.upstream, device=device)

    def forward():
        return form.loss(*arguments)

    def step():
        loss = forward()
        return loss, torch.autograd.grad(loss, x.hidden, upstream)
    return x, forward, step


# ---------------------------------------------------------------- correctness

def check(x, step, upstream):
    """Relative errors of one forward and backward pass against float64; ArithmeticError where they are too large."""
    if x.mask.is_cuda:
        torch.cuda.empty_cache()                           # so that the blocks freed here are the next handed out
    (L, T, D), N, dtype, device = (len(x.base), *x.base[0].shape), x.mask.numel(), x.hidden[0].dtype, x.mask.device
    poison = [torch.full(size, math.nan, dtype=dtype, device=device) for size in ((L, N, D), *[(N, D), (T, D)] * L)]
    poison += [torch.full(size, math.nan, device=device) for size in ((L, N), (L, T), (1,)) for _ in range(4)]
    del poison                                             # what a form leaves unwritten is NaN now, not a lucky 0
    loss, grads = step()

    rows, total, wrong, size = positions(x), 0.0, 0.0, 0.0
    with torch.no_grad():
        for layer, (h, grad) in enumerate(zip(x.hidden, grads)):
            for at in range(0, T, 2048):                   # in chunks: float64 is four times the size
                chunk, here = slice(at, at + 2048), rows[at:at + 2048]
                r = h.flatten(0, 1)[here].double() - (x.base[layer][chunk].double() + x.alpha * difference(x, layer, chunk))
                norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
                expected = upstream * r / norm / (L * T)
                total, size = total + norm.sum() / (L * T), size + expected.square().sum()
                wrong = wrong + (grad.flatten(0, 1)[here].double() - expected).square().sum()
    found = {"loss_error": (abs(loss.detach().double() - total) / total).item(), "gradient_error": (wrong / size).sqrt().item()}
    if not all(error <= TOLERANCE[dtype] for error in found.values()):                   # NaN is not
        raise ArithmeticError(f"relative {', '.join(f'{name} {error:.1e}' for name, error in found.items())}, over {TOLERANCE[dtype]:.0e}")
    if any(((grad != 0).any(-1) & ~x.mask).any() for grad in grads):
        raise ArithmeticError("the gradient is not 0 at rows that are no response")
    return found
