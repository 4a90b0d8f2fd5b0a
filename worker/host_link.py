"""Small tensors between the host and the device, without a wait of either for the other, nor behind blocks that are swapped.

What is under way belongs to the process's GPU rather than to any object: tensors are sent from wherever they are needed.
"""

from collections import deque
from typing import Final

import torch
from torch import Tensor

from quire.kernels.mapped_copy import mapped_copy

# Behind the last block of each lot that is on its way: as many as there are lots, which end.
_blocks: Final[list[torch.cuda.Event]] = []
# Pinned tensors that kernels read or write, each with an event behind the last one that does, oldest first. torch's allocator knows
# of copies, not of kernels, and would give their memory out again. At most what two steps exchange, which are under way at most.
_in_use: Final[deque[tuple[torch.cuda.Event, Tensor]]] = deque()


def note_blocks(last: torch.cuda.Event) -> None:
    """Copies of blocks were asked for, of which the last has ended when the event comes: a copy engine is not free until then."""
    _forget_ended()
    _blocks.append(last)


def send(values: Tensor, target: Tensor) -> None:
    """Copy to the device when the stream comes to it.

    values: pinned, contiguous, of 4 or 8 bytes each; not to be written to again
    target: of the same shape and dtype, on a GPU, contiguous
    """
    _copy(values, target, pinned=values)


def fetch(source: Tensor, values: Tensor) -> None:
    """Copy from the device when the stream comes to it; to be read once an event behind it has come.

    source: on a GPU, contiguous, of 4 or 8 bytes each
    values: of the same shape and dtype, pinned, contiguous
    """
    _copy(source, values, pinned=values)


def keep(pinned: Tensor) -> None:
    """Keep a pinned tensor until the kernels that were launched so far have run."""
    _forget_ended()
    event = torch.cuda.Event()
    event.record()
    _in_use.append((event, pinned))


def touch(device: torch.device) -> None:
    """Compile and load the kernel, which must not happen when the first blocks are swapped."""
    mapped_copy(*torch.zeros((2, 4), dtype=torch.int32, device=device))


def _copy(source: Tensor, target: Tensor, *, pinned: Tensor) -> None:
    # Of both ways, so that a mistake is seen before the first swap.
    assert (source.shape, source.dtype) == (target.shape, target.dtype), (source.shape, source.dtype, target.shape, target.dtype)
    assert source.itemsize % 4 == 0, source.dtype
    assert source.is_contiguous(), source.stride()
    assert target.is_contiguous(), target.stride()
    _forget_ended()
    if not _blocks:
        target.copy_(source, non_blocking=True)  # its launch costs the host a tenth of a Triton kernel's
        return
    mapped_copy(source, target)
    keep(pinned)


def _forget_ended() -> None:
    if _blocks:
        _blocks[:] = [event for event in _blocks if not event.query()]
    while _in_use and _in_use[0][0].query():
        _in_use.popleft()
