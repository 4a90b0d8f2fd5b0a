"""The vocabulary split over the ranks of a group, and the memory where a draw finds what the others have of it."""

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from quire.kernels.all_reduce import Peers

# Tokens that a rank's part is a multiple of, where the vocabulary is large enough: as many as a draw ever takes for one group.
_MAX_ALIGNMENT: Final = 128
# A call of Philox gives the noise of so many tokens.
_MIN_ALIGNMENT: Final = 4
# The first launch of a draw has a program for this many tokens at least.
MIN_TOKENS_PER_PROGRAM: Final = 8192
# A draw of one row has groups no smaller than a cache line of float32, where the vocabulary is large enough, and no more than
# its second launch can keep in registers beside a turn's tokens; twice as many spill (sm_90).
_MIN_GROUP: Final = 32
MAX_GROUPS: Final = 4096


def shard_width(vocab_size: int, num_ranks: int) -> int:
    """Tokens of each rank's part of the vocabulary but the last's, which may have fewer. No part is empty from 4 * num_ranks**2 on."""
    if num_ranks == 1:
        return vocab_size
    alignment = _MIN_ALIGNMENT
    while alignment < _MAX_ALIGNMENT and 2 * alignment * num_ranks**2 <= vocab_size:
        alignment *= 2
    return -(-vocab_size // (num_ranks * alignment)) * alignment


def group_tokens(vocab_size: int, num_ranks: int) -> int:
    """Tokens of one group of a draw: a power of two. No group has tokens of two ranks."""
    wanted = max(_MIN_GROUP, triton.next_power_of_2(triton.cdiv(vocab_size, MAX_GROUPS)))
    width = shard_width(vocab_size, num_ranks)
    return int(wanted if num_ranks == 1 else min(wanted, width & -width))


@dataclass(frozen=True, slots=True)
class DrawBuffers:
    """What the first launch of a draw leaves for the second, of one rank's part of the vocabulary.

    scores: [4, num_rows, num_programs] float32; ids: [num_rows, num_programs] int32; groups: [2, num_rows, num_groups] float32
    """

    scores: Tensor
    ids: Tensor
    groups: Tensor

    @staticmethod
    def new(num_rows: int, *, num_programs: int, num_groups: int, device: torch.device) -> "DrawBuffers":
        return DrawBuffers(
            torch.empty((4, num_rows, num_programs), dtype=torch.float32, device=device),
            torch.empty((num_rows, num_programs), dtype=torch.int32, device=device),
            torch.empty((2, num_rows, num_groups), dtype=torch.float32, device=device),
        )


class VocabShards:
    """One rank's part of the logits of a step, and of draws from them, in memory that the group's other ranks read.

    Each rank writes its own, and reads all others' after a meeting. Before it writes again, the ranks must have met once more, as
    they do in every layer: whoever comes to that meeting has ended its reading.
    """

    def __init__(self, peers: Peers, memory: Tensor, *, vocab_size: int, max_rows: int, dtype: torch.dtype) -> None:
        """memory: [num_bytes(...)] uint8: this rank's own, at the same place of each rank's areas"""
        self.peers = peers
        self.vocab_size = vocab_size
        self.width = shard_width(vocab_size, peers.size)
        self.first = peers.rank * self.width
        num_bytes = max_rows * self.width * dtype.itemsize
        own_width = max(0, min(self.width, vocab_size - self.first))
        self._memory = memory
        # [max_rows, own width]: rows begin at the same places on all ranks
        self.logits = memory[:num_bytes].view(dtype).view(max_rows, self.width)[:, :own_width]
        self._scratch_at = num_bytes

    @staticmethod
    def num_bytes(*, vocab_size: int, num_ranks: int, max_rows: int, dtype: torch.dtype) -> int:
        width = shard_width(vocab_size, num_ranks)
        num_programs = triton.next_power_of_2(triton.cdiv(width, MIN_TOKENS_PER_PROGRAM))
        num_groups = triton.cdiv(width, group_tokens(vocab_size, num_ranks))
        return max_rows * int(width * dtype.itemsize + 4 * (5 * num_programs + 2 * num_groups))

    def buffers(self, num_rows: int, *, num_programs: int, num_groups: int) -> DrawBuffers:
        """Those of a draw, behind the logits."""
        sizes = ((4, num_rows, num_programs), (num_rows, num_programs), (2, num_rows, num_groups))
        views = []
        start = self._scratch_at
        for size, dtype in zip(sizes, (torch.float32, torch.int32, torch.float32), strict=True):
            length = 4 * size[-1] * size[-2] * (size[0] if len(size) == 3 else 1)
            views.append(self._memory[start : start + length].view(dtype).view(size))
            start += length
        return DrawBuffers(*views)
