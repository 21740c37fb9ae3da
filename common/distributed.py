"""Several processes, one for each GPU, as torchrun starts them:

    torchrun --nproc-per-node 8 dual.py ...

Each process runs the whole stage: it reads the same pairs, loads the model, and begins with the
same adapter. Of each training step it takes a share of the examples, but divides by the tokens of
the whole batch. So the sum of the gradients (not the mean, as in DDP) is the gradient of the batch.
Every process then makes the same update, and the adapters stay equal without being sent. The files
of collect.py are shared out, too. The first process alone prints, logs and writes the result.

In a script that python has started there is one process, and every function here is trivial.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# How long one process may keep the others waiting, as when it makes the embedded default.
TIMEOUT = timedelta(hours=1)

# torchrun is recognised by a variable of its own: RANK alone is set by many schedulers.
RANK = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_first():
    """Whether this is the process that prints, logs and writes."""
    return RANK == 0


@contextmanager
def others_reached():
    """Within the context, whatever fails is a ConnectionError: the other processes have ended, for
    the most part."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"the other processes cannot be reached: {reason}") from None


def join(device):
    """Join the other processes, if there are any, and silence all but the first. CUDA tensors are
    summed by NCCL, CPU tensors by gloo. device: the setting --device."""
    if WORLD_SIZE == 1:
        return
    if not is_first():
        # what is printed goes nowhere until the process ends
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    on_gpus = torch.cuda.is_available() and device != "cpu"
    with others_reached():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)


def leave():
    """Leave the other processes: no sums from here on."""
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def share_of(items):
    """This process's share of a list: every n-th item, beginning at its rank, of n processes."""
    return items[RANK::WORLD_SIZE]


def reduce(tensor, operation):
    """Reduce a tensor over the processes, in place."""
    with others_reached():
        dist.all_reduce(tensor, operation)
    if tensor.is_cuda:
        # NCCL's sum is only queued here: a process that has ended is noticed on the CPU
        barrier()


@torch.no_grad()
def sum_over_processes(tensors):
    """Replace each of some tensors, of one dtype and device, by its sum over the processes."""
    if WORLD_SIZE == 1:
        return
    # one message in place of hundreds
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    reduce(flat, dist.ReduceOp.SUM)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def sum_gradients(parameters, *losses):
    """Replace the gradients of some parameters, and some scalar losses, by their sums over the
    processes. (The losses are for the log, and for all processes to notice NaN together.)"""
    if WORLD_SIZE == 1:
        return
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            # No example for this process: the last batch of an epoch may be a small one.
            p.grad = torch.zeros_like(p)
    sum_over_processes([*(p.grad for p in parameters), *losses])


def largest(*numbers):
    """The largest of each of some integers over the processes."""
    if WORLD_SIZE == 1:
        return numbers
    # on the CPU: waits for the processes, not for their GPUs
    tensor = torch.tensor(numbers)
    reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(tensor):
    """The CPU tensors of all processes, of one shape, by rank."""
    if WORLD_SIZE == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    with others_reached():
        dist.all_gather(tensors, tensor)
    return tensors


def barrier():
    """Wait until all processes are here."""
    largest(0)


@contextmanager
def first_process_first():
    """The first process runs the block, then the others do. (If it fails, they get a
    ConnectionError.)"""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()
