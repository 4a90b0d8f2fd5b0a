"""Small tensors of numbers that the host knows, put on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.worker.host_link import send


def device_tensor(
    values: Sequence[int] | Sequence[float] | Sequence[Sequence[int]], *, device: str, dtype: torch.dtype = torch.int64
) -> Tensor:
    """The values as a tensor. On a GPU they travel from pinned memory, so that the host does not wait for what runs there."""
    if torch.device(device).type != "cuda" or len(values) == 0:
        return torch.tensor(values, dtype=dtype, device=device)
    pinned = torch.tensor(values, dtype=dtype, pin_memory=True)
    tensor = torch.empty(pinned.shape, dtype=dtype, device=device)
    send(pinned, tensor)
    return tensor
