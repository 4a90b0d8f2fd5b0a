"""The numbers of a batch on the device, and how the host changes them without waiting for it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.kernels.write_runs import write_runs
from quire.worker.host_link import keep

_WORD_BYTES = 8


class BatchMemory:
    """Named tensors of 8-byte numbers in one piece of memory.

    On CPU a write is performed at once. On a GPU writes are collected: `flush` puts all of them in place with one launch, which
    reads them from pinned memory, in the order of the stream. So whoever changes the tensors on the device flushes first, and so
    does whoever writes a place a second time.
    """

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, device: str) -> None:
        sizes = {name: math.prod(shape) for name, (shape, _) in shapes.items()}
        self._words = torch.zeros(sum(sizes.values()), dtype=torch.int64, device=device)
        # The host's own view, where it has one.
        self._host_words = self._words.numpy() if self._words.device.type == "cpu" else None
        self._first: dict[str, int] = {}
        self._tensors: dict[str, Tensor] = {}
        self._is_float: dict[str, bool] = {}
        first = 0
        for name, (shape, dtype) in shapes.items():
            assert dtype.itemsize == _WORD_BYTES, (name, dtype)
            self._first[name] = first
            self._tensors[name] = self._words[first : first + sizes[name]].view(dtype).view(shape)
            self._is_float[name] = dtype.is_floating_point
            first += sizes[name]
        self._targets: list[int] = []
        self._runs: list[npt.NDArray[np.int64]] = []

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def write(self, name: str, place: int, values: Sequence[int] | Sequence[float]) -> None:
        """Write consecutive numbers from a place on, counted through the tensor's rows."""
        if len(values) == 0:
            return
        numbers = np.asarray(values, dtype=np.float64 if self._is_float[name] else np.int64).view(np.int64)
        target = self._first[name] + place
        if self._host_words is not None:
            self._host_words[target : target + len(numbers)] = numbers
        else:
            self._targets.append(target)
            self._runs.append(numbers)

    def flush(self) -> None:
        """Put what was written in place, behind what the stream has been given so far."""
        if not self._runs:
            return
        counts = np.array([len(run) for run in self._runs], dtype=np.int64)
        table = np.empty((len(counts), 3), dtype=np.int64)
        table[:, 0] = self._targets
        table[:, 1] = counts.cumsum() - counts
        table[:, 2] = counts
        # The payload begins at a multiple of 16 bytes: for others Triton would compile a second kernel.
        gap = np.zeros(table.size % 2, dtype=np.int64)
        first = table.size + gap.size
        message = torch.empty(first + int(counts.sum()), dtype=torch.int64, pin_memory=True)
        np.concatenate((table.ravel(), gap, *self._runs), out=message.numpy())
        write_runs(self._words, message[: table.size].view(-1, 3), message[first:], max_count=int(counts.max()))
        keep(message)
        self._targets.clear()
        self._runs.clear()
