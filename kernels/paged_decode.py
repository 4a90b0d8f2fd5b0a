"""Attention of one new token per sequence over the paged cache: split over the keys, then combined."""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton
from quire.kernels.decode_plan import DecodePlan

_LOG2_E: Final = tl.constexpr(math.log2(math.e))
# float32 numbers that a combining program of four warps holds at once: 64 registers of each thread. Rows of a batch have few
# pieces each, and programs that hold less run more at a time.
_COMBINED_NUMBERS: Final = 8192
_COMBINED_NUMBERS_OF_BATCH: Final = 2048
_BATCH_ROWS: Final = 8


def paged_decode(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    plan: DecodePlan,
    *,
    lengths: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    output: Tensor | None = None,
    first_query: Tensor | None = None,
) -> Tensor:
    """Attention of each row's last token to its whole sequence, its own key included.

    query:        [num_rows, num_heads, head_dim], last dim contiguous; num_heads is a multiple of num_kv_heads
    kv_cache:     [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view, last two dims contiguous
    block_tables: [max_rows, width] int32 or int64, of the device-resident batch
    plan:         filled by plan_decode() from the same `lengths` and `rows`; holds the sliding window
    lengths:      [max_rows] tokens in each sequence, the query's included
    rows:         [num_rows] batch row of each query, -1 for none: its output is 0
    softcap:      scores become softcap * tanh(score / softcap)
    sinks:        [num_heads]; a score per head that takes part in the softmax and adds no value
    result:       [num_rows, num_heads, head_dim] of the query's dtype; `output` if given
    first_query:  [1] int32 or int64; where the rows' queries begin in `query` and `output`, which then hold other tokens as
                  well. The rows that are no padding come first then, and padding writes nothing.

    Scores and softmax are float32. What lies in slots behind a sequence's end does not matter, NaN included.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[2:4]
    assert num_heads % num_kv_heads == 0, (query.shape, kv_cache.shape)
    assert head_dim == kv_cache.shape[4], (query.shape, kv_cache.shape)
    assert kv_cache.stride()[3:] == (head_dim, 1), kv_cache.stride()
    assert query.stride(2) == 1, query.stride()
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if output is None else output
    if not runs_triton(query):
        num_rows = query.shape[0] if first_query is None else int((rows >= 0).sum())
        first = 0 if first_query is None else int(first_query)
        reference = paged_decode_reference(
            query[first : first + num_rows],
            kv_cache,
            block_tables,
            lengths=lengths,
            rows=rows[:num_rows],
            scale=scale,
            sliding_window=plan.sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
        output[first : first + num_rows] = reference
        return output
    tile = plan.tile
    group = num_heads // num_kv_heads
    padded_dim = triton.next_power_of_2(head_dim)
    # Heads fastest: programs that run together read neighbouring runs of memory.
    _paged_decode_kernel[(num_kv_heads, plan.pieces.shape[0])](
        output,
        query,
        kv_cache,
        block_tables,
        plan.pieces,
        plan.first_pieces,
        plan.partial_outputs,
        plan.partial_stats,
        sinks,
        first_query,
        scale,
        softcap or 0.0,
        *output.stride()[:2],
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        block_tables.stride(0),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        GROUP=group,
        DOT_ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK_SIZE=block_size,
        TILE=tile.num_keys,
        HAS_SOFTCAP=softcap is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,  # said, because Triton's default will change
    )
    _combine_kernel[(num_heads, plan.split_rows.shape[0])](
        output,
        plan.partial_outputs,
        plan.partial_stats,
        plan.split_rows,
        plan.first_pieces,
        sinks,
        first_query,
        *output.stride()[:2],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        PIECES=(_COMBINED_NUMBERS if rows.shape[0] < _BATCH_ROWS else _COMBINED_NUMBERS_OF_BATCH) // padded_dim,
        num_warps=4,
    )
    return output


@triton.jit
def _paged_decode_kernel(
    output: tl.tensor,  # [num_rows, num_heads, HEAD_DIM]
    query: tl.tensor,  # [num_rows, num_heads, HEAD_DIM]
    kv_cache: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    block_tables: tl.tensor,  # [max_rows, width]
    pieces: tl.tensor,  # [num_pieces, 4]
    first_pieces: tl.tensor,  # [num_rows + 1]
    partial_outputs: tl.tensor,  # [num_pieces, num_heads, HEAD_DIM]
    partial_stats: tl.tensor,  # [num_pieces, num_heads, 2]
    sinks: tl.tensor,  # None, or [num_heads]
    first_query: tl.tensor,  # None, or [1]
    scale: float,
    softcap: float,
    output_row_stride: int,
    output_head_stride: int,
    query_row_stride: int,
    query_head_stride: int,
    block_stride: int,
    kind_stride: int,
    head_stride: int,
    table_stride: int,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    row = tl.load(pieces + piece * 4).to(tl.int64)
    if row < 0:
        return
    table_row = tl.load(pieces + piece * 4 + 1).to(tl.int64)
    query_row = row
    if first_query is not None:
        if table_row < 0:
            return
        query_row += tl.load(first_query)
    begin = tl.load(pieces + piece * 4 + 2)
    end = tl.load(pieces + piece * 4 + 3)

    # The heads that share this program's keys are the rows of its products, padded to what tensor cores take.
    in_group = tl.arange(0, DOT_ROWS)
    dim = tl.arange(0, PADDED_DIM)
    heads = kv_head * GROUP + in_group
    is_query = (in_group[:, None] < GROUP) & (dim[None, :] < HEAD_DIM)
    queries = tl.load(query + query_row * query_row_stride + heads[:, None] * query_head_stride + dim[None, :], mask=is_query, other=0.0)

    largest = tl.full([DOT_ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([DOT_ROWS], tl.float32)
    numerator = tl.zeros([DOT_ROWS, PADDED_DIM], tl.float32)
    keys = kv_cache + kv_head * head_stride
    values = keys + kind_stride
    table = block_tables + table_row * table_stride
    unit = _LOG2_E if HAS_SOFTCAP else scale * _LOG2_E
    # Block ids are read a turn ahead: a load whose address is itself loaded in the same turn is pipelined half as deep.
    token = begin + tl.arange(0, TILE)
    block_id = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        is_seen = token < end
        offset = block_id.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * HEAD_DIM
        block_id = tl.load(table + (token + TILE) // BLOCK_SIZE, mask=token + TILE < end, other=0)
        is_loaded = is_seen[:, None] & (dim[None, :] < HEAD_DIM)
        key = tl.load(keys + offset[:, None] + dim[None, :], mask=is_loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            scores = cap(scores * scale, softcap)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        # Every tile holds a seen token, so the new maximum is finite unless the sequence's own keys are not.
        new_largest = tl.maximum(largest, tl.max(scores, 1) * unit)
        decay = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores * unit - new_largest[:, None])
        value = tl.load(values + offset[:, None] + dim[None, :], mask=is_loaded, other=0.0)
        denominator = denominator * decay + tl.sum(weights, 1)
        numerator = tl.dot(weights.to(value.dtype), value, numerator * decay[:, None], input_precision="ieee")
        largest = new_largest

    first_piece = tl.load(first_pieces + row)
    num_pieces = tl.load(first_pieces + row + 1) - first_piece
    if num_pieces == 1:
        if sinks is not None:
            sink = tl.load(sinks + heads, mask=in_group < GROUP, other=0.0).to(tl.float32) * _LOG2_E
            new_largest = tl.maximum(largest, sink)
            decay = tl.exp2(largest - new_largest)
            denominator = denominator * decay + tl.exp2(sink - new_largest)
            numerator = numerator * decay[:, None]
        result = numerator / tl.where(denominator == 0.0, 1.0, denominator)[:, None]  # 0 for a row of no tokens
        target = output + query_row * output_row_stride + heads[:, None] * output_head_stride + dim[None, :]
        tl.store(target, result.to(output.dtype.element_ty), mask=is_query)
        return

    num_heads = tl.num_programs(0) * GROUP
    partial = piece * num_heads + heads
    tl.store(partial_outputs + partial[:, None] * HEAD_DIM + dim[None, :], numerator, mask=is_query)
    tl.store(partial_stats + partial * 2, largest, mask=in_group < GROUP)
    tl.store(partial_stats + partial * 2 + 1, denominator, mask=in_group < GROUP)


@triton.jit
def _combine_kernel(
    output: tl.tensor,  # [num_rows, num_heads, HEAD_DIM]
    partial_outputs: tl.tensor,  # [num_pieces, num_heads, HEAD_DIM]
    partial_stats: tl.tensor,  # [num_pieces, num_heads, 2]
    split_rows: tl.tensor,  # [num_split_rows]
    first_pieces: tl.tensor,  # [num_rows + 1]
    sinks: tl.tensor,  # None, or [num_heads]
    first_query: tl.tensor,  # None, or [1]
    output_row_stride: int,
    output_head_stride: int,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """One softmax from those of a row's pieces, for one head."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.load(split_rows + tl.program_id(1)).to(tl.int64)
    if row < 0:
        return
    num_heads = tl.num_programs(0)
    begin = tl.load(first_pieces + row)
    end = tl.load(first_pieces + row + 1)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    largest = tl.full([], float("-inf"), tl.float32)
    denominator = tl.full([], 0.0, tl.float32)
    numerator = tl.zeros([PADDED_DIM], tl.float32)
    if sinks is not None:
        largest = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        denominator = tl.full([], 1.0, tl.float32)
    for first in range(begin, end, PIECES):
        piece = first + tl.arange(0, PIECES)
        is_piece = piece < end
        place = piece.to(tl.int64) * num_heads + head
        piece_largest = tl.load(partial_stats + place * 2, mask=is_piece, other=float("-inf"))
        piece_denominator = tl.load(partial_stats + place * 2 + 1, mask=is_piece, other=0.0)
        is_number = is_piece[:, None] & is_dim[None, :]
        piece_numerator = tl.load(partial_outputs + place[:, None] * HEAD_DIM + dim[None, :], mask=is_number, other=0.0)
        new_largest = tl.maximum(largest, tl.max(piece_largest, 0))
        decay = tl.exp2(largest - new_largest)
        weight = tl.exp2(piece_largest - new_largest)
        denominator = denominator * decay + tl.sum(piece_denominator * weight, 0)
        numerator = numerator * decay + tl.sum(piece_numerator * weight[:, None], 0)
        largest = new_largest
    if first_query is not None:
        row += tl.load(first_query)
    target = output + row * output_row_stride + head * output_head_stride + dim
    tl.store(target, (numerator / denominator).to(output.dtype.element_ty), mask=is_dim)


@triton.jit
def cap(scores: tl.tensor, softcap: float) -> tl.tensor:
    """softcap * tanh(scores / softcap), by exp2, which cannot overflow into NaN."""
    return softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * _LOG2_E) / softcap)) - 1.0)


def paged_decode_reference(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    *,
    lengths: Tensor,
    rows: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same, one sequence at a time."""
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for index, row in enumerate(rows.tolist()):
        length = int(lengths[row]) if row >= 0 else 0
        if length == 0:
            continue
        output[index] = attention_reference(
            query[index : index + 1],
            kv_cache,
            block_tables[row],
            first_position=length - 1,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )[0]
    return output


def attention_reference(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    *,
    first_position: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of consecutive queries of one sequence, from first_position on, in float32.

    query: [num_tokens, num_heads, head_dim]; block_table: [width]
    """
    num_tokens, num_heads, _ = query.shape
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    end = first_position + num_tokens
    blocks = kv_cache[block_table[: -(-end // block_size)].long()]
    keys, values = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :end].float()
    folded = query.float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).permute(1, 2, 0, 3)
    scores = folded @ keys[:, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(end, device=query.device)
    own = position[first_position:, None]
    is_seen = position <= own
    if sliding_window is not None:
        is_seen &= position > own - sliding_window
    scores = scores.masked_fill(~is_seen, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights: Tensor = scores.softmax(dim=-1)[..., :end]
    return torch.matmul(weights, values[:, None]).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
