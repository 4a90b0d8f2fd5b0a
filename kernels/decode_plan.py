"""How one step's decode attention is cut into pieces of about equal work, decided on the device."""

from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.attention_tiles import DecodeTile, decode_tile
from quire.kernels.backend import num_multiprocessors, runs_triton

# Pieces of long sequences begin at multiples of this many tokens after the first one that is seen.
_ALIGNMENT: Final = 64
# Entries of `pieces` that one program of the planning kernel fills.
_PIECES_PER_PROGRAM: Final = 32


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The pieces of one step, the same for all layers that share a sliding window, and room for their partial results.

    Every sequence is one piece or several equal ones. There are at most num_rows + num_slots pieces whatever the lengths, so
    grids have this fixed size, inside CUDA graphs too, and no piece is longer than total tokens / num_slots (rounded up):
    one long sequence among short ones is spread over the whole GPU. The buffers outlive the step; one plan serves one stream.
    """

    tile: DecodeTile
    num_slots: int
    sliding_window: int | None
    pieces: Tensor  # [num_rows + num_slots, 4] int32: row of the query, row of the block table, first token, end; row -1: none
    first_pieces: Tensor  # [num_rows + 1] int32: row i has pieces first_pieces[i] to first_pieces[i + 1] - 1, at least one
    partial_outputs: Tensor  # [num_rows + num_slots, num_heads, head_dim] float32, a softmax's numerators
    partial_stats: Tensor  # [num_rows + num_slots, num_heads, 2] float32: their largest score (base 2), their denominator
    split_rows: Tensor  # [min(num_rows, num_slots)] int32: the rows that have several pieces, then -1

    def part(self, num_rows: int) -> "DecodePlan":
        """A plan for fewer rows in the same buffers, so that batches of any size need one allocation; one is filled in at a time."""
        num_pieces = num_rows + self.num_slots
        return replace(
            self,
            pieces=self.pieces[:num_pieces],
            first_pieces=self.first_pieces[: num_rows + 1],
            partial_outputs=self.partial_outputs[:num_pieces],
            partial_stats=self.partial_stats[:num_pieces],
            split_rows=self.split_rows[: min(num_rows, self.num_slots)],
        )


def allocate_decode_plan(
    *,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    sliding_window: int | None = None,
    tile: DecodeTile | None = None,
) -> DecodePlan:
    """A plan for steps of exactly `num_rows` decodes; padding fills up. `tile` is for tuning; else the committed table's."""
    tile = tile or decode_tile(head_dim=head_dim, num_bytes=dtype.itemsize)
    num_slots = max(1, tile.pieces_per_multiprocessor * num_multiprocessors(device) // num_kv_heads)
    num_pieces = num_rows + num_slots
    return DecodePlan(
        tile=tile,
        num_slots=num_slots,
        sliding_window=sliding_window,
        pieces=torch.full((num_pieces, 4), -1, dtype=torch.int32, device=device),
        first_pieces=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
        partial_outputs=torch.empty((num_pieces, num_heads, head_dim), dtype=torch.float32, device=device),
        partial_stats=torch.empty((num_pieces, num_heads, 2), dtype=torch.float32, device=device),
        split_rows=torch.full((min(num_rows, num_slots),), -1, dtype=torch.int32, device=device),
    )


def plan_decode(plan: DecodePlan, lengths: Tensor, rows: Tensor) -> None:
    """Fill in this step's `pieces`, `first_pieces` and `split_rows`.

    lengths: [max_rows] int32 or int64, of the device-resident batch; tokens in each sequence, the one that decodes included
    rows:    [num_rows] int32 or int64; which batch row each query belongs to, -1 for none (padding)
    """
    num_rows = rows.shape[0]
    num_pieces = plan.pieces.shape[0]
    assert plan.first_pieces.shape == (num_rows + 1,), (plan.first_pieces.shape, rows.shape)
    if not runs_triton(lengths):
        plan_decode_reference(plan, lengths, rows)
        return
    _plan_decode_kernel[(triton.cdiv(num_pieces, _PIECES_PER_PROGRAM),)](
        plan.pieces,
        plan.first_pieces,
        plan.split_rows,
        lengths,
        rows,
        num_rows,
        num_pieces,
        plan.split_rows.shape[0],
        plan.num_slots,
        plan.sliding_window or 0,
        ROWS=triton.next_power_of_2(num_rows),
        PIECES=_PIECES_PER_PROGRAM,
        ALIGNMENT=_ALIGNMENT,
        MIN_PIECE_TOKENS=plan.tile.min_piece_tokens,
        num_warps=4,
    )


# Numbers that change from step to step are not compiled in: a batch of 1 or 16 would wait for a compiler.
@triton.jit(do_not_specialize=["num_rows", "num_pieces", "num_split_rows"])
def _plan_decode_kernel(
    pieces: tl.tensor,  # [num_pieces, 4]
    first_pieces: tl.tensor,  # [num_rows + 1]
    split_rows: tl.tensor,  # [num_split_rows]
    lengths: tl.tensor,  # [max_rows]
    rows: tl.tensor,  # [num_rows]
    num_rows: int,
    num_pieces: int,
    num_split_rows: int,
    num_slots: int,
    sliding_window: int,  # 0: none
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MIN_PIECE_TOKENS: tl.constexpr,
) -> None:
    # Every program computes all rows' shares, which is quicker than a second launch, and writes its own PIECES entries.
    index = tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < num_rows, other=-1)
    length = tl.load(lengths + row, mask=row >= 0, other=0).to(tl.int32)
    first_token = tl.zeros([ROWS], tl.int32)
    if sliding_window > 0:
        first_token = tl.maximum(length - sliding_window, 0)
    num_tokens = length - first_token
    piece_tokens = tl.cdiv(tl.cdiv(tl.sum(num_tokens, 0), num_slots), ALIGNMENT) * ALIGNMENT
    piece_tokens = tl.maximum(piece_tokens, MIN_PIECE_TOKENS)
    count = tl.where(index < num_rows, tl.maximum(tl.cdiv(num_tokens, piece_tokens), 1), 0)
    end = tl.cumsum(count, 0)
    begin = end - count

    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    is_owner = (begin[None, :] <= piece[:, None]) & (piece[:, None] < end[None, :])
    # One row at most owns a piece, so a sum over rows picks its value.
    owner = tl.sum(tl.where(is_owner, index[None, :] + 1, 0), 1) - 1
    table_row = tl.sum(tl.where(is_owner, row.to(tl.int32)[None, :], 0), 1)
    place = tl.sum(tl.where(is_owner, piece[:, None] - begin[None, :], 0), 1)
    begin_token = tl.sum(tl.where(is_owner, first_token[None, :], 0), 1) + place * piece_tokens
    end_token = tl.minimum(tl.sum(tl.where(is_owner, length[None, :], 0), 1), begin_token + piece_tokens)
    is_inside = piece < num_pieces
    entry = pieces + piece * 4
    tl.store(entry, owner, mask=is_inside)
    tl.store(entry + 1, table_row, mask=is_inside)
    tl.store(entry + 2, begin_token, mask=is_inside)
    tl.store(entry + 3, end_token, mask=is_inside)
    if tl.program_id(0) == 0:
        tl.store(first_pieces + index + 1, end, mask=index < num_rows)
        tl.store(first_pieces, 0)
        # A row of several pieces holds more than 1 / num_slots of all tokens, so there are fewer than num_slots of them.
        is_split = (count > 1).to(tl.int32)
        num_split = tl.sum(is_split, 0)
        tl.store(split_rows + tl.cumsum(is_split, 0) - 1, index, mask=is_split == 1)
        tl.store(split_rows + index, -1, mask=(index >= num_split) & (index < num_split_rows))


def plan_decode_reference(plan: DecodePlan, lengths: Tensor, rows: Tensor) -> None:
    """The same, row by row."""
    length_of = [int(lengths[row]) if row >= 0 else 0 for row in rows.tolist()]
    window = plan.sliding_window
    seen = [length if window is None else min(length, window) for length in length_of]
    share = -(-sum(seen) // plan.num_slots)
    piece_tokens = max(-(-share // _ALIGNMENT) * _ALIGNMENT, plan.tile.min_piece_tokens)
    pieces: list[list[int]] = []
    first_pieces = [0]
    for index, (row, length, num_tokens) in enumerate(zip(rows.tolist(), length_of, seen, strict=True)):
        for first in range(length - num_tokens, max(length, 1), piece_tokens):
            pieces.append([index, row, first, min(first + piece_tokens, length)])  # noqa: PERF401
        first_pieces.append(len(pieces))
    plan.pieces[:, 0] = -1
    plan.pieces[: len(pieces)] = torch.tensor(pieces, dtype=torch.int32)
    plan.first_pieces.copy_(torch.tensor(first_pieces, dtype=torch.int32))
    split_rows = (plan.first_pieces.diff() > 1).nonzero()[:, 0]
    plan.split_rows.fill_(-1)
    plan.split_rows[: len(split_rows)] = split_rows.int()
