from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.paged_attention import ChunkSpan, DecodeSpans, RaggedBatch, paged_attention, paged_attention_reference

HEAD_DIM = 8
HEADS = {"multi-head": (4, 4), "grouped": (6, 2), "multi-query": (4, 1)}


def ragged(
    chunks: Sequence[tuple[int, int]],
    decodes: Sequence[Sequence[int]],
    *,
    block_size: int,
    heads: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, RaggedBatch]:
    """A query, one layer of a cache full of NaN but for the sequences' own slots, and the batch.

    chunks: (start, num_tokens); decodes: groups of lengths; every sequence has random blocks of its own
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [start + count for start, count in chunks] + [length for group in decodes for length in group]
    widths = [-(-length // block_size) for length in lengths]
    block_ids = torch.randperm(sum(widths) + 3, generator=generator)
    num_heads, num_kv_heads = heads
    # Three layers, of which the middle one is used: the view must be strided.
    pool = torch.full((len(block_ids), 3, 2, num_kv_heads, block_size, HEAD_DIM), float("nan"), dtype=dtype)
    kv_cache = pool[:, 1]
    tables = list(block_ids[: sum(widths)].split(widths))
    for table, length in zip(tables, lengths, strict=True):
        for position in range(length):
            values = torch.randn(2, num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
            kv_cache[table[position // block_size], :, :, position % block_size] = values
    spans = [ChunkSpan(count, start, table) for (start, count), table in zip(chunks, tables[: len(chunks)], strict=True)]
    groups: list[DecodeSpans] = []
    token, sequence = sum(count for _, count in chunks), len(chunks)
    for group in decodes:
        width = max(widths[sequence : sequence + len(group)])
        rows = torch.stack([torch.nn.functional.pad(table, (0, width - len(table))) for table in tables[sequence : sequence + len(group)]])
        groups.append(DecodeSpans(torch.arange(token, token + len(group)), torch.tensor(group), rows))
        token, sequence = token + len(group), sequence + len(group)
    query = torch.randn(token, num_heads, HEAD_DIM, generator=generator).to(dtype)
    return query, kv_cache, RaggedBatch(spans, groups)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("chunks", "decodes"),
    [
        ([(0, 1)], []),
        ([(0, 7), (3, 1), (5, 13)], []),
        ([], [[1]]),
        ([], [[7, 1, 29]]),
        ([(0, 5), (16, 3)], [[2, 3], [17, 33]]),
    ],
)
def test_ragged_batches_equal_the_reference(
    chunks: list[tuple[int, int]], decodes: list[list[int]], block_size: int, heads: tuple[int, int]
) -> None:
    query, kv_cache, batch = ragged(chunks, decodes, block_size=block_size, heads=heads)
    actual = paged_attention(query, kv_cache, batch, scale=0.3)
    torch.testing.assert_close(actual, paged_attention_reference(query, kv_cache, batch, scale=0.3))


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 5},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, 2.0])},
        {"sliding_window": 3, "softcap": 1.5, "sinks": torch.linspace(-2, 2, 6)},
    ],
    ids=str,
)
def test_windows_soft_caps_and_sinks_equal_the_reference(options: dict[str, Any]) -> None:
    query, kv_cache, batch = ragged([(0, 7), (9, 4)], [[1, 12, 6]], block_size=4, heads=(6, 2))
    actual = paged_attention(query, kv_cache, batch, scale=0.5, **options)
    torch.testing.assert_close(actual, paged_attention_reference(query, kv_cache, batch, scale=0.5, **options))


def test_a_long_sequence_equals_torch_on_the_whole() -> None:
    query, kv_cache, batch = ragged([(0, 129)], [], block_size=16, heads=(6, 2))
    table = batch.chunks[0].block_table
    keys, values = kv_cache[table].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :129].repeat_interleave(3, dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), keys, values, is_causal=True, scale=0.3)
    torch.testing.assert_close(paged_attention(query, kv_cache, batch, scale=0.3), expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    query, kv_cache, batch = ragged([(0, 7), (4, 5)], [[3, 30]], block_size=4, heads=(4, 2), dtype=dtype)
    actual = paged_attention(query, kv_cache, batch, scale=0.3)
    exact = paged_attention_reference(query.float(), kv_cache.float(), batch, scale=0.3)
    torch.testing.assert_close(actual.float(), exact, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


def test_a_sequence_with_nan_of_its_own_leaves_its_neighbours_alone() -> None:
    query, kv_cache, batch = ragged([], [[9, 6, 11]], block_size=4, heads=(4, 2))
    whole = paged_attention(query, kv_cache, batch, scale=0.3)
    kv_cache[batch.decodes[0].block_tables[1, 0]] = float("nan")
    actual = paged_attention(query, kv_cache, batch, scale=0.3)
    assert actual[1].isnan().all()
    torch.testing.assert_close(actual[[0, 2]], whole[[0, 2]])


def test_the_query_may_be_any_view() -> None:
    query, kv_cache, batch = ragged([(0, 7)], [[5, 3]], block_size=4, heads=(4, 2))
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(paged_attention(strided, kv_cache, batch, scale=0.3), paged_attention(query, kv_cache, batch, scale=0.3))
