from collections.abc import Sequence
from typing import Any

import pytest
import torch
from paged_cases import kernel_device, poisoned_cache
from torch import Tensor

from quire.kernels.attention_tiles import PrefillTile, prefill_tile
from quire.kernels.paged_decode import attention_reference
from quire.kernels.paged_prefill import PrefillChunk, cut_prefill, paged_prefill

SMALL_TILE = PrefillTile(num_rows=32, num_keys=16, num_warps=4, num_stages=2)
CHUNKS = [(0, 7), (5, 13), (0, 1), (64, 21)]  # (start, num_tokens)


def attended(
    spans: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    tile: PrefillTile = SMALL_TILE,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The kernel's output, poisoned before, and the reference's in float32."""
    num_heads, num_kv_heads, head_dim = heads
    kv_cache, block_tables = poisoned_cache(
        [start + count for start, count in spans], num_kv_heads=num_kv_heads, block_size=block_size, head_dim=head_dim, dtype=dtype
    )
    device = kernel_device()
    chunks = [PrefillChunk(row, start, count) for row, (start, count) in enumerate(spans)]
    padding = [(0, 0, 0, 0)]
    pieces = torch.tensor(cut_prefill(chunks, tile=tile, group=num_heads // num_kv_heads) + padding, dtype=torch.int32, device=device)
    num_tokens = sum(count for _, count in spans)
    query = torch.randn(num_tokens, num_heads + 3, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)[:, :num_heads]
    output = torch.full((num_tokens, num_heads, head_dim), float("nan"), dtype=dtype, device=device)
    scale = head_dim**-0.5
    actual = paged_prefill(query, kv_cache, block_tables, pieces, scale=scale, output=output, tile=tile, **options)
    expected = []
    wanted = {"sliding_window": None, "softcap": None, "sinks": None, **options}
    for chunk, part in zip(chunks, query.split([count for _, count in spans]), strict=True):
        table = block_tables[chunk.row]
        expected.append(attention_reference(part.float(), kv_cache.float(), table, first_position=chunk.start, scale=scale, **wanted))
    return actual, torch.cat(expected)


@pytest.mark.kernel
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 3, 16), (6, 1, 20)], ids=str)
@pytest.mark.parametrize("block_size", [4, 16])
def test_chunks_equal_the_reference(heads: tuple[int, int, int], block_size: int) -> None:
    actual, expected = attended(CHUNKS, heads, block_size=block_size)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
def test_whole_tiles_may_be_read_by_the_copy_engine() -> None:
    tile = PrefillTile(num_rows=32, num_keys=16, num_warps=4, num_stages=2, uses_copy_engine=True)
    actual, expected = attended(CHUNKS, (4, 2, 16), block_size=32, tile=tile)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 9},
        {"sliding_window": 40},
        {"softcap": 2.0},
        {"sinks": [0.5, -1.0, 3.0, 0.0, 1.0, 2.0]},
        {"sliding_window": 20, "softcap": 1.5, "sinks": [-2.0, 2.0, 1.0, 0.0, 0.5, 9.0]},
    ],
    ids=str,
)
def test_windows_soft_caps_and_sinks_equal_the_reference(options: dict[str, Any]) -> None:
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor(options["sinks"], device=kernel_device())}
    actual, expected = attended(CHUNKS, (6, 2, 16), **options)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
def test_half_precision_is_summed_in_float32() -> None:
    actual, expected = attended(CHUNKS, (4, 2, 64), dtype=torch.float16)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


def test_pieces_cover_every_query_once_and_begin_with_the_longest() -> None:
    pieces = cut_prefill([PrefillChunk(3, 10, 21), PrefillChunk(1, 0, 7)], tile=SMALL_TILE, group=4)
    assert [piece[2] for piece in pieces] == [26, 18, 10, 0]
    assert sorted((first, count, row) for first, count, _, row in pieces) == [(0, 8, 3), (8, 8, 3), (16, 5, 3), (21, 7, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (40, 40, 128), (32, 1, 128), (12, 12, 64), (8, 8, 80), (14, 2, 96), (8, 4, 256)], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_committed_tiles_are_right_on_the_gpu(heads: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> None:
    tile = prefill_tile(head_dim=heads[2], num_bytes=2, block_size=block_size)
    actual, expected = attended([(0, 1000), (3000, 300), (0, 1), (511, 129)], heads, block_size=block_size, dtype=dtype, tile=tile)
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
