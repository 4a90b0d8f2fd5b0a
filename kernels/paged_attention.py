"""Attention of a ragged batch over the paged cache: chunks of prompts with their context, and one-token decodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Consecutive tokens [start, start + num_tokens) of one sequence."""

    num_tokens: int
    start: int  # tokens of the sequence before the chunk, all in the cache
    block_table: Tensor  # [ceil((start + num_tokens) / block_size)] int64


@dataclass(frozen=True, slots=True)
class DecodeSpans:
    """The last tokens of several sequences whose lengths are alike: they are padded to the longest."""

    tokens: Tensor  # [num_rows] int64; where each token lies in the batch
    lengths: Tensor  # [num_rows] int64; tokens in the sequence, this one included
    block_tables: Tensor  # [num_rows, width] int64; entries past a sequence's last block name any block


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Which sequences the tokens of a batch belong to: the chunks' tokens in order, then the decodes', covered by `decodes`."""

    chunks: Sequence[ChunkSpan]
    decodes: Sequence[DecodeSpans]
    # What the layers of one step share, made by the first that needs it: masks and gather indices.
    memo: dict[tuple[object, ...], Tensor] = field(default_factory=dict)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of every query to its own sequence, whose keys and values are in the cache up to the query itself.

    query:          [num_tokens, num_heads, head_dim], any strides; num_heads is a multiple of num_kv_heads
    kv_cache:       [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view, last two dims contiguous
    sliding_window: a query sees the last so many positions, its own included
    softcap:        scores become softcap * tanh(score / softcap)
    sinks:          [num_heads]; a score per head that takes part in the softmax and adds no value
    result:         [num_tokens, num_heads, head_dim], contiguous, of the query's dtype

    Scores and softmax are float32. What lies in slots behind a sequence's end does not matter, NaN included.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2]
    assert num_heads % num_kv_heads == 0, (query.shape, kv_cache.shape)
    assert head_dim == kv_cache.shape[4], (query.shape, kv_cache.shape)
    group = num_heads // num_kv_heads
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    first = 0
    for index, chunk in enumerate(batch.chunks):
        end = chunk.start + chunk.num_tokens
        keys_values = _gather(kv_cache, chunk.block_table[None], (batch, index))[:, 0, :, :end]
        # Heads that share keys are the second batch dimension: their keys are expanded without a copy.
        folded = query[first : first + chunk.num_tokens].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
        keys, values = keys_values[:, :, None].expand(-1, -1, group, -1, -1)
        is_plain = chunk.start == 0 and (sliding_window is None or end <= sliding_window)
        mask = None if is_plain else _chunk_mask(batch, index, sliding_window)
        chunk_sinks = None if sinks is None else sinks.view(num_kv_heads, group, 1, 1)
        attended = _attend(folded, keys, values, mask=mask, is_causal=is_plain, scale=scale, softcap=softcap, sinks=chunk_sinks)
        output[first : first + chunk.num_tokens].unflatten(1, (num_kv_heads, group)).copy_(attended.permute(2, 0, 1, 3))
        first += chunk.num_tokens
    for index, spans in enumerate(batch.decodes):
        # One query per row: heads that share keys take the place of queries, so nothing is repeated.
        folded = query[spans.tokens].unflatten(1, (num_kv_heads, group))
        keys_values = _gather(kv_cache, spans.block_tables, (batch, -1 - index))
        if query.device.type == "cpu":
            # torch's kernel for 16 bits is made for many queries per key. In float32, conversion included, 16 rows of 256 tokens
            # take 0.63 ms instead of 0.74, 32 rows 1.5 instead of 2.0 (one core of an AMD EPYC, torch 2.13, 2026-11-25).
            folded, keys_values = folded.float(), keys_values.float()
        mask = _decode_mask(batch, index, keys_values.shape[3], sliding_window)
        row_sinks = None if sinks is None else sinks.view(1, num_kv_heads, group, 1)
        attended = _attend(
            folded, keys_values[0], keys_values[1], mask=mask, is_causal=False, scale=scale, softcap=softcap, sinks=row_sinks
        )
        if not bool(attended.sum().isfinite()):
            # Masked slots weigh 0, but 0 * NaN is NaN. Blocks rarely hold such leftovers, so they are cleared only then.
            keys_values.masked_fill_(~mask.permute(0, 1, 3, 2), 0)
            attended = _attend(
                folded, keys_values[0], keys_values[1], mask=mask, is_causal=False, scale=scale, softcap=softcap, sinks=row_sinks
            )
        output[spans.tokens] = attended.flatten(1, 2).to(query.dtype)
    return output


def _gather(kv_cache: Tensor, block_tables: Tensor, memo_key: tuple[RaggedBatch, int]) -> Tensor:
    """Keys and values of whole blocks, in order: [2, num_rows, num_kv_heads, width * block_size, head_dim], a copy.

    Copies runs of block_size * head_dim numbers, which is what one head has in one block. torch copies runs fast only from
    two-dimensional contiguous tensors, so the layer is seen as all runs of the pool from its first one on.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    run = block_size * head_dim
    strides = [stride // run for stride in kv_cache.stride()[:3]]
    assert kv_cache.stride()[3:] == (head_dim, 1), kv_cache.stride()
    assert all(stride % run == 0 for stride in kv_cache.stride()[:3]), kv_cache.stride()
    batch, index = memo_key
    key = ("runs", index, *strides)
    if key not in batch.memo:
        kinds = torch.arange(2, device=block_tables.device) * strides[1]
        heads = torch.arange(num_kv_heads, device=block_tables.device) * strides[2]
        first = kinds[:, None, None, None] + heads[:, None]
        batch.memo[key] = (block_tables[:, None, :] * strides[0] + first).flatten()
    num_runs = 1 + sum((size - 1) * stride for size, stride in zip(kv_cache.shape[:3], strides, strict=True))
    runs = kv_cache.as_strided((num_runs, run), (run, 1))
    gathered = runs.index_select(0, batch.memo[key])
    return gathered.view(2, len(block_tables), num_kv_heads, block_tables.shape[1] * block_size, head_dim)


def _chunk_mask(batch: RaggedBatch, index: int, sliding_window: int | None) -> Tensor:
    """What each query of a chunk sees: [num_tokens, end] bool."""
    key = ("chunk", index, sliding_window)
    if key not in batch.memo:
        chunk = batch.chunks[index]
        positions = torch.arange(chunk.start + chunk.num_tokens, device=chunk.block_table.device)
        queries = positions[chunk.start :, None]
        batch.memo[key] = _sees(queries, positions, sliding_window)
    return batch.memo[key]


def _decode_mask(batch: RaggedBatch, index: int, padded_length: int, sliding_window: int | None) -> Tensor:
    """What each row's query sees: [num_rows, 1, 1, padded_length] bool."""
    key = ("decode", index, padded_length, sliding_window)
    if key not in batch.memo:
        lengths = batch.decodes[index].lengths
        positions = torch.arange(padded_length, device=lengths.device)
        batch.memo[key] = _sees(lengths[:, None, None, None] - 1, positions, sliding_window)
    return batch.memo[key]


def _sees(queries: Tensor, positions: Tensor, sliding_window: int | None) -> Tensor:
    seen = positions <= queries
    return seen if sliding_window is None else seen & (positions > queries - sliding_window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of [a, b, num_queries, head_dim] to [a, b, num_keys, head_dim], in float32 inside."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    if mask is None:
        positions = torch.arange(key.shape[-2], device=key.device)
        mask = positions <= positions[:, None]
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[-2]]
    return torch.matmul(weights, value.float()).to(query.dtype)


def paged_attention_reference(
    query: Tensor,
    kv_cache: Tensor,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same, one query and one head at a time."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    group = query.shape[1] // kv_cache.shape[2]
    places: list[tuple[int, int, Tensor]] = []  # (token, its position, its sequence's block table)
    for chunk in batch.chunks:
        places += [(len(places) + i, chunk.start + i, chunk.block_table) for i in range(chunk.num_tokens)]
    for spans in batch.decodes:
        places += [
            (int(token), int(length) - 1, table)
            for token, length, table in zip(spans.tokens, spans.lengths, spans.block_tables, strict=True)
        ]
    for token, position, block_table in places:
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        slots = [(int(block_table[p // kv_cache.shape[3]]), p % kv_cache.shape[3]) for p in range(first, position + 1)]
        for head in range(query.shape[1]):
            key = torch.stack([kv_cache[block_id, 0, head // group, offset] for block_id, offset in slots]).float()
            value = torch.stack([kv_cache[block_id, 1, head // group, offset] for block_id, offset in slots]).float()
            scores = key @ query[token, head].float() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1].float()))
            output[token, head] = (scores.softmax(0)[: len(slots)] @ value).to(query.dtype)
    return output
