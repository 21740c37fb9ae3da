"""Several processes, one for each GPU, as torchrun starts them:

    torchrun --nproc-per-node 8 dual.py ...

Each process runs the whole stage: it reads the same pairs, loads the model, and begins with the
same adapter. Shared out are the examples of each training step, whose gradients are then summed,
and the files of collect.py. The first process alone prints, logs and writes the result. In a
process that was started by python everything here does nothing.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# What one process may keep the others waiting, for instance while it makes the embedded default.
TIMEOUT = timedelta(hours=1)

RANK = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_first():
    """Whether this is the process that prints, logs and writes."""
    return RANK == 0


def join(device):
    """Join the other processes, if there are any. On GPUs each takes its own, whose sums go over
    NCCL; sums on the CPU go over gloo. device: the setting --device."""
    if WORLD_SIZE == 1:
        return
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)


def share_of(items):
    """This process's share of a list: every n-th item, of n processes."""
    return items[RANK::WORLD_SIZE]


def reduce(tensor, operation):
    """Reduce a tensor over the processes, in place. ConnectionError if one of them has ended."""
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError:
        raise ConnectionError("another process of this run has ended") from None


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
    """Sum the gradients of some parameters over the processes, and scalar losses with them."""
    if WORLD_SIZE == 1:
        return
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            # this process had no example in this step
            p.grad = torch.zeros_like(p)
    sum_over_processes([*(p.grad for p in parameters), *losses])


def largest(*numbers):
    """The largest of each of some integers over the processes."""
    if WORLD_SIZE == 1:
        return numbers
    # on the CPU, so that no process waits for its GPU
    tensor = torch.tensor(numbers)
    reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(tensor):
    """A CPU tensor of every process, in the order of the processes."""
    if WORLD_SIZE == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    dist.all_gather(tensors, tensor)
    return tensors


def barrier():
    """Wait until all processes are here."""
    largest(0)


def goes_on_alone():
    """Part with the other processes. True in the first one, which does the rest alone."""
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return is_first()


@contextmanager
def first_process_first():
    """The other processes enter this context when the first one has left it."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()
