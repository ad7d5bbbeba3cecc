"""One process or several that work on one run, as `accelerate launch` or `torchrun` start them.

All of them hold the model and take every step; each computes the gradients of its share of the examples, and sums over
processes make the step that one process alone would make. The first process writes files and speaks for all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from hyperfade.errors import ProcessError

Item = TypeVar("Item")


def on_cpu() -> bool:
    """Whether models run on the processor: there is no accelerator, or `ACCELERATE_USE_CPU` says so."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t")
    return told or not torch.accelerator.is_available()


def join() -> PartialState:
    """The processes of this run; called first, it connects them. Outside a launcher it is this one alone."""
    # accelerate takes a launched process without an accelerator for a lone one unless it is told
    return PartialState(cpu=on_cpu())


def leave() -> None:
    """Take leave of the other processes, if there are any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return join().is_main_process


def share_of(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of `items`: contiguous, and as large as the others' or one larger or smaller."""
    state = join()
    number, count = state.process_index, state.num_processes
    return items[len(items) * number // count : len(items) * (number + 1) // count]


def gathered(number: int) -> list[int]:
    """Every process's number, in their order."""
    state = join()
    numbers = torch.zeros(state.num_processes, dtype=torch.float64)
    numbers[state.process_index] = number
    sum_([numbers])
    return [round(each) for each in numbers.tolist()]


def numbered(items: Sequence[Item]) -> tuple[dict[int, Item], int]:
    """This process's `items` by their numbers among those of all processes, and how many all have."""
    counts = gathered(len(items))
    return dict(enumerate(items, start=sum(counts[: join().process_index]))), sum(counts)


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over processes; every process gives tensors of the same shapes.

    The order of the sum depends on their sizes only, so a resumed run gets the same bits. Raises `ProcessError` where
    a process has gone.
    """
    if join().num_processes == 1 or not tensors:
        return
    device = join().device
    assert device is not None
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device.type == device.type:
        with _named():
            distributed.all_reduce(tensors[0].detach())  # large ones come alone, and need no copy
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(device)
    with _named():
        distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(total.view_as(tensor))


def copy_from_first_(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's values."""
    if join().num_processes == 1:
        return
    for tensor in tensors:
        with _named():
            distributed.broadcast(tensor.detach(), 0)


def wait() -> None:
    """Until every process has come here."""
    with _named():
        join().wait_for_everyone()


@contextmanager
def _named() -> Iterator[None]:
    """Turn what the backends raise when a process has gone into an error of ours."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's
        raise ProcessError(
            f"Another process of this run has gone: {str(error).strip().splitlines()[0]}",
            "Look at its own error; the same command continues from the last checkpoint.",
        ) from error
