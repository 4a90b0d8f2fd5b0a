"""The ranks' exchange over gloo: any hosts, any processor."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from quire.common.errors import Unavailable


class GlooCollective:
    """A Collective over torch.distributed's default process group, of which a process has one."""

    def __init__(self, store: Any, *, rank: int, size: int, timeout_s: float, backend: str = "gloo") -> None:
        self.rank = rank
        self.size = size
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))

    def all_reduce(self, tensor: Tensor) -> None:
        # In float32: gloo rounds 16-bit numbers after each addition, and is slower with them.
        wide = tensor if tensor.dtype not in (torch.bfloat16, torch.float16) else tensor.float()
        try:
            dist.all_reduce(wide)
        except RuntimeError as error:
            raise _lost(error) from error
        if wide is not tensor:
            tensor.copy_(wide)

    def all_gather(self, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(self.size)]
        try:
            dist.all_gather(parts, part.contiguous())
        except RuntimeError as error:
            raise _lost(error) from error
        return torch.stack(parts)

    def gather_columns(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        padded = F.pad(part, (0, max(widths) - part.shape[-1])).contiguous()  # gloo takes parts of one size only
        parts = [torch.empty_like(padded) for _ in widths]
        try:
            dist.all_gather(parts, padded)
        except RuntimeError as error:
            raise _lost(error) from error
        return torch.cat([each[..., :width] for each, width in zip(parts, widths, strict=True)], dim=-1)

    def close(self) -> None:
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> Unavailable:
    return Unavailable(f"the ranks lost each other: {error}", reason="RANK_LOST")
