"""What the device computes, on its way to the host."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor's values for the host, copied when the stream comes to it; to be read once the step has ended."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)

    def __len__(self) -> int:
        return len(self._values)

    def tolist(self) -> list[Any]:
        """The values. Before the step has ended they are anything."""
        values: list[Any] = self._values.tolist()
        return values
