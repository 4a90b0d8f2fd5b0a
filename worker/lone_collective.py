"""A stand-in for a group of ranks, where kernels are compiled and nothing runs."""

import torch
from torch import Tensor

from quire.kernels.all_reduce import MAX_PROGRAMS, Peers
from quire.worker.collectives_cuda import CudaCollective


class LoneCollective(CudaCollective):
    """Launches what a CudaCollective launches, at addresses where nobody is, and leaves out what is not our own kernel."""

    def __init__(self, *, rank: int, size: int, partial_bytes: int, draw_bytes: int, device: str) -> None:
        """partial_bytes, draw_bytes: as CudaCollective's; all partial sums share them"""
        self.rank = rank
        self.size = size
        self._has_nccl = size > 2
        self._area_bytes = partial_bytes
        self._area = torch.zeros(partial_bytes, dtype=torch.uint8, device=device)
        nowhere = torch.zeros(size, dtype=torch.int64, device=device)
        self._draw_memory = torch.zeros(draw_bytes, dtype=torch.uint8, device=device)
        self.peers = Peers(rank, size, nowhere, nowhere, torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device))

    @property
    def draw_memory(self) -> Tensor:
        return self._draw_memory

    def partial(self, index: int, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
        del index
        return self._area[: num_tokens * width * dtype.itemsize].view(dtype).view(num_tokens, width)

    def all_reduce(self, tensor: Tensor) -> None:
        if not self._is_for_nccl(tensor):
            super().all_reduce(tensor)

    def all_gather(self, part: Tensor) -> Tensor:
        if not self._is_for_nccl(part, is_gathered=True):
            return super().all_gather(part)
        return torch.zeros((self.size, *part.shape), dtype=part.dtype, device=part.device)

    def sum_norm(self, index: int, weight: Tensor, *, residual: Tensor, eps: float, output: Tensor, adds: bool = True) -> None:
        if not self._is_for_nccl(output):
            super().sum_norm(index, weight, residual=residual, eps=eps, output=output, adds=adds)

    def close(self) -> None:
        """There is nobody to let go of."""
