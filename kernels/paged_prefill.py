"""Causal attention of prompt chunks over the paged cache: each chunk sees its sequence's earlier tokens and itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.attention_tiles import PrefillTile
from quire.kernels.backend import runs_triton
from quire.kernels.paged_decode import attention_reference, cap

_LOG2_E: Final = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens [start, start + num_tokens) of one sequence."""

    row: int  # of the block tables
    start: int
    num_tokens: int


def cut_prefill(chunks: Sequence[PrefillChunk], *, tile: PrefillTile, group: int) -> list[tuple[int, int, int, int]]:
    """The pieces of a ragged batch whose queries are the chunks' tokens in order, the longest to compute first.

    group:  heads that share keys; they are rows of a tile as well
    result: for each piece: first query in the batch, number of queries, position of the first in its sequence, block table row
    """
    queries_per_piece = max(1, tile.num_rows // group)
    pieces = []
    first_query = 0
    for chunk in chunks:
        for first in range(0, chunk.num_tokens, queries_per_piece):
            num_queries = min(queries_per_piece, chunk.num_tokens - first)
            pieces.append((first_query + first, num_queries, chunk.start + first, chunk.row))
        first_query += chunk.num_tokens
    # A piece costs what its queries see; long ones last would leave multiprocessors idle at the end.
    return sorted(pieces, key=lambda piece: -piece[2])


def paged_prefill(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    pieces: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    output: Tensor | None = None,
    tile: PrefillTile,
) -> Tensor:
    """Causal attention of every query to its own sequence, whose keys and values are in the cache up to the query itself.

    query:          [num_tokens, num_heads, head_dim], last dim contiguous; num_heads is a multiple of num_kv_heads
    kv_cache:       [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view, last two dims contiguous
    block_tables:   [max_rows, width] int32 or int64
    pieces:         [num_pieces, 4] int32, from cut_prefill(); pieces of no queries do nothing (padding)
    sliding_window: a query sees the last so many positions, its own included
    softcap:        scores become softcap * tanh(score / softcap)
    sinks:          [num_heads]; a score per head that takes part in the softmax and adds no value
    result:         [num_tokens, num_heads, head_dim] of the query's dtype; `output` if given
    tile:           the one that the pieces were cut for

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
        paged_prefill_reference(
            query,
            kv_cache,
            block_tables,
            pieces,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            output=output,
        )
        return output
    _paged_prefill_kernel[(num_kv_heads, pieces.shape[0])](
        output,
        query,
        kv_cache,
        _descriptor(kv_cache, tile.num_keys) if tile.uses_copy_engine else None,
        block_tables,
        pieces,
        sinks,
        scale,
        softcap or 0.0,
        sliding_window or 0,
        *output.stride()[:2],
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        block_tables.stride(0),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        GROUP=num_heads // num_kv_heads,
        BLOCK_SIZE=block_size,
        ROWS=max(tile.num_rows, triton.next_power_of_2(num_heads // num_kv_heads)),
        TILE=tile.num_keys,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=sliding_window is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,  # said, because Triton's default will change
    )
    return output


def _descriptor(kv_cache: Tensor, num_keys: int) -> TensorDescriptor | None:
    """How the copy engine reads `num_keys` keys of one head; None where blocks do not hold whole tiles."""
    if kv_cache.shape[3] % num_keys != 0:
        return None
    box = [1, 1, 1, num_keys, triton.next_power_of_2(kv_cache.shape[4])]
    return TensorDescriptor(kv_cache, list(kv_cache.shape), list(kv_cache.stride()), box)


@triton.jit
def _paged_prefill_kernel(
    output: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM]
    query: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM]
    kv_cache: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    kv_descriptor: tl.tensor_descriptor,  # None, or of kv_cache, for boxes of TILE keys
    block_tables: tl.tensor,  # [max_rows, width]
    pieces: tl.tensor,  # [num_pieces, 4]
    sinks: tl.tensor,  # None, or [num_heads]
    scale: float,
    softcap: float,
    sliding_window: int,
    output_token_stride: int,
    output_head_stride: int,
    query_token_stride: int,
    query_head_stride: int,
    block_stride: int,
    kind_stride: int,
    head_stride: int,
    table_stride: int,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    num_queries = tl.load(pieces + piece * 4 + 1)
    if num_queries <= 0:
        return
    first_query = tl.load(pieces + piece * 4).to(tl.int64)
    first_position = tl.load(pieces + piece * 4 + 2)
    table = block_tables + tl.load(pieces + piece * 4 + 3).to(tl.int64) * table_stride

    # Row r is query r // GROUP of head r % GROUP of the group: short chunks fill a tile with heads, and share their keys.
    in_piece = tl.arange(0, ROWS)
    token = in_piece // GROUP
    head = kv_head * GROUP + in_piece % GROUP
    position = first_position + token
    dim = tl.arange(0, PADDED_DIM)
    is_query = token < num_queries
    is_number = is_query[:, None] & (dim[None, :] < HEAD_DIM)
    query_offset = (first_query + token) * query_token_stride + head * query_head_stride
    queries = tl.load(query + query_offset[:, None] + dim[None, :], mask=is_number, other=0.0)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        largest = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        denominator = tl.full([ROWS], 1.0, tl.float32)
    numerator = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    keys = kv_cache + kv_head * head_stride
    values = keys + kind_stride
    end = first_position + num_queries
    # Tiles that every query of the piece sees whole need no mask; with a window, few tiles are of that kind.
    first_key = 0
    first_masked = (first_position + 1) // TILE * TILE
    if HAS_WINDOW:
        first_key = tl.maximum(first_position - sliding_window + 1, 0) // TILE * TILE
        first_masked = first_key
    elif kv_descriptor is not None:
        # The copy engine takes whole boxes: it cannot leave out what lies behind the end, so masked tiles go by pointers.
        largest, denominator, numerator = _attend(
            largest, denominator, numerator, queries, position, kv_descriptor, kv_head, keys, values, table,
            first_key, first_masked, first_masked, end, scale, softcap, sliding_window, block_stride,
            HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
        first_key = first_masked
    largest, denominator, numerator = _attend(
        largest, denominator, numerator, queries, position, None, kv_head, keys, values, table,
        first_key, first_masked, end, end, scale, softcap, sliding_window, block_stride,
        HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, HAS_SOFTCAP, HAS_WINDOW,
    )  # fmt: skip
    result = numerator / denominator[:, None]
    output_offset = (first_query + token) * output_token_stride + head * output_head_stride
    tl.store(output + output_offset[:, None] + dim[None, :], result.to(output.dtype.element_ty), mask=is_number)


@triton.jit
def _attend(
    largest: tl.tensor,  # [ROWS]; with `denominator` and `numerator`, the softmax over the keys before `begin`
    denominator: tl.tensor,  # [ROWS]
    numerator: tl.tensor,  # [ROWS, PADDED_DIM]
    queries: tl.tensor,  # [ROWS, PADDED_DIM]
    position: tl.tensor,  # [ROWS]
    kv_descriptor: tl.tensor_descriptor,  # None: keys and values are read by pointers
    kv_head: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,  # [width]
    begin: int,
    first_masked: int,
    stop: int,
    end: int,
    scale: float,
    softcap: float,
    sliding_window: int,
    block_stride: int,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take the keys [begin, stop) into the softmax, tile by tile; those before `first_masked` are seen by every query."""
    unit = _LOG2_E if HAS_SOFTCAP else scale * _LOG2_E
    dim = tl.arange(0, PADDED_DIM)
    # Block ids are read a turn ahead: a load whose address is itself loaded in the same turn is pipelined half as deep.
    if kv_descriptor is not None:
        next_block = tl.load(table + begin // BLOCK_SIZE, mask=begin < stop, other=0).to(tl.int32)
    else:
        token = begin + tl.arange(0, TILE)
        next_block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    for first in range(begin, stop, TILE):
        block = next_block
        token = first + tl.arange(0, TILE)
        if kv_descriptor is not None:
            next_block = tl.load(table + (first + TILE) // BLOCK_SIZE, mask=first + TILE < stop, other=0).to(tl.int32)
            key = kv_descriptor.load([block, 0, kv_head.to(tl.int32), first % BLOCK_SIZE, 0]).reshape(TILE, PADDED_DIM)
        else:
            next_block = tl.load(table + (token + TILE) // BLOCK_SIZE, mask=token + TILE < end, other=0)
            offset = (block.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * HEAD_DIM)[:, None] + dim[None, :]
            is_loaded = (token < end)[:, None] & (dim[None, :] < HEAD_DIM)
            key = tl.load(keys + offset, mask=is_loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            scores = cap(scores * scale, softcap)
        # One loop with a branch in it: a second loop for the masked tiles would fill the pipeline a second time.
        if kv_descriptor is None and first >= first_masked:
            is_seen = token[None, :] <= position[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (token[None, :] > position[:, None] - sliding_window)
            scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * unit)
        base = new_largest
        if HAS_WINDOW:  # a tile may lie before a row's window, which has then seen nothing: 0 keeps -inf - -inf out
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay = tl.exp2(largest - base)
        weights = tl.exp2(scores * unit - base[:, None])  # one multiply-add
        denominator = denominator * decay + tl.sum(weights, 1)
        if kv_descriptor is not None:
            value = kv_descriptor.load([block, 1, kv_head.to(tl.int32), first % BLOCK_SIZE, 0]).reshape(TILE, PADDED_DIM)
        else:
            value = tl.load(values + offset, mask=is_loaded, other=0.0)
        numerator = tl.dot(weights.to(value.dtype), value, numerator * decay[:, None], input_precision="ieee")
        largest = new_largest
    return largest, denominator, numerator


def paged_prefill_reference(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    pieces: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    output: Tensor,
) -> None:
    """The same, one piece at a time."""
    for first_query, num_queries, first_position, row in pieces.tolist():
        if num_queries > 0:
            output[first_query : first_query + num_queries] = attention_reference(
                query[first_query : first_query + num_queries],
                kv_cache,
                block_tables[row],
                first_position=first_position,
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            )
