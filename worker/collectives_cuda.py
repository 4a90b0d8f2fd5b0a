"""The ranks' exchange between GPUs of one host: peer memory, NCCL for what is large among many, gloo for what lies in host memory."""

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.all_reduce import Peers, all_gather, all_reduce, sum_norm
from quire.kernels.rms_norm import rms_norm
from quire.worker.collectives_gloo import GlooCollective
from quire.worker.peer_memory import PeerMemory

# Where partial sums lie: those of the embedding, of attention and of the MLP, so that none is written while it may be read.
NUM_AREAS: Final = 3
# Measured by tools/gpu/all_reduce.py on two NVIDIA H200, 2026-11-30; docs/kernel_notes.md has the rows. Two ranks need neither NCCL, of
# whose time one shot takes 0.33-0.93 from 4 KiB to 64 MiB, nor two shots, which read as much as one. Of more ranks each would read all
# others' numbers in one shot; two shots read less, and meet a second time, which takes as long as reading so many bytes.
_SECOND_MEETING_BYTES: Final = 2**20
# For more ranks than two: two shots take 0.78 of NCCL's time there, and 0.97 at 64 MiB. Gathering was measured up to 1 MiB (0.35).
_MAX_SUM_BYTES_OF_MANY: Final = 2**24
_MAX_GATHERED_BYTES_OF_MANY: Final = 2**22
_ALIGNMENT: Final = 512


def peer_bytes(area_bytes: int, draw_bytes: int) -> int:
    """Of a rank's memory that others read: the areas, two slots of the same size, and what lies behind them for draws."""
    return (NUM_AREAS + 2) * area_bytes + draw_bytes


def is_for_one_shot(num_bytes: int, *, num_ranks: int) -> bool:
    """Whether a sum of so many bytes is quicker if each rank reads all numbers of all others, instead of a share of them and then sums."""
    num_read, num_read_in_two = num_ranks - 1, 2 * (num_ranks - 1) / num_ranks
    return num_bytes * (num_read - num_read_in_two) <= _SECOND_MEETING_BYTES


class CudaCollective(GlooCollective):
    """A Collective whose ranks have a GPU each. Everything on the GPU can be captured in CUDA graphs."""

    def __init__(self, store: Any, *, rank: int, size: int, timeout_s: float, partial_bytes: int, draw_bytes: int = 0) -> None:
        """partial_bytes: of the largest partial sum that `partial` will be asked for; draw_bytes: of `draw_memory`"""
        self._has_nccl = size > 2
        backend = "cpu:gloo,cuda:nccl" if self._has_nccl else "gloo"
        super().__init__(store, rank=rank, size=size, timeout_s=timeout_s, backend=backend)
        self._area_bytes = -(-partial_bytes // _ALIGNMENT) * _ALIGNMENT
        self._draw_bytes = draw_bytes
        memory = PeerMemory(store, rank=rank, size=size, area_bytes=peer_bytes(self._area_bytes, draw_bytes))
        self.peers: Peers = memory.peers
        self._area = memory.area
        if self._has_nccl:
            dist.all_reduce(torch.zeros(1, device="cuda"))  # it connects at its first use, which must not be inside a capture
            torch.cuda.synchronize()

    @property
    def draw_memory(self) -> Tensor:
        """[draw_bytes] uint8: this rank's own, which the others can read at the same place of their areas."""
        start = (NUM_AREAS + 2) * self._area_bytes
        return self._area[start : start + self._draw_bytes]

    def all_reduce(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            super().all_reduce(tensor)
        elif self._is_for_nccl(tensor):
            dist.all_reduce(tensor)
        else:
            self._all_reduce_by_peers(tensor)

    def all_gather(self, part: Tensor) -> Tensor:
        if not part.is_cuda:
            return super().all_gather(part)
        part = part.contiguous()
        gathered = torch.empty((self.size, *part.shape), dtype=part.dtype, device=part.device)
        if self._is_for_nccl(part, is_gathered=True):
            dist.all_gather_into_tensor(gathered.view(-1), part.view(-1))
        elif part.nbytes <= self._area_bytes:
            all_gather(self.peers, part, gathered, area=NUM_AREAS * self._area_bytes, slot_bytes=self._area_bytes)
        else:
            first = 0
            for piece in _pieces(part, num_bytes=self._area_bytes):
                gathered.view(self.size, -1)[:, first : first + len(piece)] = self.all_gather(piece)
                first += len(piece)
        return gathered

    def gather_columns(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        if not part.is_cuda:
            return super().gather_columns(part, widths)
        gathered = self.all_gather(F.pad(part, (0, max(widths) - part.shape[-1])))
        return torch.cat([each[..., :width] for each, width in zip(gathered, widths, strict=True)], dim=-1)

    def _all_reduce_by_peers(self, tensor: Tensor) -> None:
        for piece in _pieces(tensor, num_bytes=self._area_bytes):
            area = NUM_AREAS * self._area_bytes
            all_reduce(self.peers, piece, area=area, slot_bytes=self._area_bytes, in_two_shots=not self._is_for_one_shot(piece))

    def _is_for_one_shot(self, tensor: Tensor) -> bool:
        return is_for_one_shot(tensor.nbytes, num_ranks=self.size)

    def _is_for_nccl(self, tensor: Tensor, *, is_gathered: bool = False) -> bool:
        return self._has_nccl and tensor.nbytes > (_MAX_GATHERED_BYTES_OF_MANY if is_gathered else _MAX_SUM_BYTES_OF_MANY)

    def close(self) -> None:
        if self._has_nccl:
            # Ending it in order waits for ranks that may be gone.
            dist.group.WORLD._get_backend(torch.device("cuda")).abort()  # type: ignore[union-attr]  # no public abort
        super().close()

    # -- sums of a layer's partial results ----------------------------------------------------------------------------

    def partial(self, index: int, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
        """Where this rank writes its part of a sum: [num_tokens, width]. Two in a row have different indices below NUM_AREAS."""
        start = index * self._area_bytes
        num_bytes = num_tokens * width * dtype.itemsize
        assert num_bytes <= self._area_bytes, (num_tokens, width, self._area_bytes)
        return self._area[start : start + num_bytes].view(dtype).view(num_tokens, width)

    def sum_norm(self, index: int, weight: Tensor, *, residual: Tensor, eps: float, output: Tensor, adds: bool = True) -> None:
        """Sum the ranks' `partial(index, ...)`, add that to the residual stream and take the norm; see kernels.all_reduce.sum_norm."""
        if self._is_for_one_shot(output):
            start = index * self._area_bytes
            sum_norm(self.peers, weight, area=start, residual=residual, eps=eps, output=output, adds=adds)
            return
        partial = self.partial(index, len(output), output.shape[1], output.dtype)
        self.all_reduce(partial)
        if adds:
            rms_norm(partial, weight, eps=eps, residual=residual, output=output)
        else:
            rms_norm(residual.copy_(partial), weight, eps=eps, output=output)


def _pieces(tensor: Tensor, *, num_bytes: int) -> Sequence[Tensor]:
    """A contiguous tensor, flat, in pieces of at most so many bytes."""
    pieces: Sequence[Tensor] = tensor.view(-1).split(num_bytes // tensor.element_size())
    return pieces
