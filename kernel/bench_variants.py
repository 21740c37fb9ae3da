"""Other ways to launch or to write loss_kernel, which kernel/bench.py times beside it.

All are correct in Triton's interpreter and compile for an H100 (tests/test_kernel.py). Only a GPU
can tell which is the fastest; that one then goes into representation_loss.py.
"""

import functools
import sys
from contextlib import contextmanager
from unittest import mock

import torch
import triton.language as tl

from kernel.representation_loss import jit, loss_kernel, pick

# Programs of the persistent form for each multiprocessor of a GPU, by warps: as many as an H100
# holds at width 4,096, by the registers and the shared memory of the compiled code.
PROGRAMS_PER_PROCESSOR = {4: 6, 8: 5, 16: 2}


@jit(do_not_specialize=["S", "N", "T"])
def persistent_kernel(
    hidden,
    base,
    plus,
    minus,
    rows,
    grad,
    terms,
    norms,
    alpha: tl.float64,
    inverse_denom: tl.float64,
    stride_b,
    stride_s,
    S,
    N,
    T,
    D,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    SQUARED: tl.constexpr,
    DIFFERENCED: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """loss_kernel with a fixed number of programs, each of which goes over many positions: the
    loads of the next are issued while this one is computed. Masks take the place of the branch,
    so that the loads of all positions are alike. The arguments are those of loss_kernel. (tl.cast,
    because in the interpreter the loop's variable is a Python int.)"""
    columns = tl.arange(0, BLOCK)
    for program in tl.range(tl.program_id(0), L * N, tl.num_programs(0), num_stages=2):
        layer = program // N
        position = program % N
        row = tl.load(rows + position).to(tl.int64)
        is_response = row >= 0
        read = columns < tl.where(is_response, D, 0)
        start = (
            tl.cast(position // S, tl.int64) * stride_b + tl.cast(position % S, tl.int64) * stride_s
        )
        h_row = pick(hidden, layer, L) + start
        b_row = pick(base, layer, L) + row * D
        v_row = pick(plus, layer, L) + row * D
        h = tl.load(h_row + columns, mask=read, other=0.0).to(ACC)
        b = tl.load(b_row + columns, mask=read, other=0.0).to(ACC)
        v = tl.load(v_row + columns, mask=read, other=0.0).to(ACC)
        if not DIFFERENCED:
            minus_row = pick(minus, layer, L) + row * D
            v -= tl.load(minus_row + columns, mask=read, other=0.0).to(ACC)

        # 0 everywhere where the position is no response token: so are its term and its gradient
        e = h - (b + tl.full([], alpha, ACC) * v)
        square = tl.sum(e * e)
        norm = tl.sqrt(square)
        scale = tl.full([], inverse_denom, ACC)
        tl.store(norms + tl.cast(layer, tl.int64) * T + row, norm, mask=is_response)
        if SQUARED:
            tl.store(terms + program, scale * square / D)
        else:
            tl.store(terms + program, scale * norm)

        if GRADIENT:
            if SQUARED:
                scale = 2.0 * scale / D
            else:
                scale = tl.where(norm == 0, 0.0, scale / norm)
            grad_row = grad + tl.cast(program, tl.int64) * D
            tl.store(grad_row + columns, (scale * e).to(grad.dtype.element_ty), mask=columns < D)


class Launcher:
    """Takes the place of loss_kernel: another kernel, or another number of warps or programs."""

    def __init__(self, kernel, warps):
        self.kernel = kernel
        self.warps = warps

    def __getitem__(self, grid):
        if self.kernel is persistent_kernel:
            # in the interpreter
            count = 2
            if torch.cuda.is_available():
                count = torch.cuda.get_device_properties().multi_processor_count
            grid = (min(*grid, count * PROGRAMS_PER_PROCESSOR[self.warps]),)
        return functools.partial(self.launch, self.kernel[grid])

    def launch(self, kernel, *arguments, **options):
        return kernel(*arguments, **{**options, "num_warps": self.warps})


VARIANTS = {
    "4 warps": Launcher(loss_kernel, 4),
    "8 warps": Launcher(loss_kernel, 8),
    "16 warps": Launcher(loss_kernel, 16),
    "persistent, 4 warps": Launcher(persistent_kernel, 4),
    "persistent, 8 warps": Launcher(persistent_kernel, 8),
    "persistent, 16 warps": Launcher(persistent_kernel, 16),
}


@contextmanager
def variant(name):
    """Within the context, the Triton backend computes the loss by one of VARIANTS."""
    # the package has a function of the module's name
    module = sys.modules["kernel.representation_loss"]
    with mock.patch.object(module, "loss_kernel", VARIANTS[name]):
        yield
