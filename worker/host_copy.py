"""What the device computes, on its way to the host."""

from typing import Any

import torch
from torch import Tensor

from quire.worker.host_link import fetch


class HostCopy:
    """A tensor's values for the host, copied when the stream comes to it; to be read once the step has ended. Bools come as 0 and 1."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor
        if tensor.is_cuda:
            numbers = tensor.int() if tensor.dtype == torch.bool else tensor
            self._values = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            fetch(numbers.contiguous(), self._values)

    def __len__(self) -> int:
        return len(self._values)

    def tolist(self) -> list[Any]:
        """The values. Before the step has ended they are anything."""
        values: list[Any] = self._values.tolist()
        return values
