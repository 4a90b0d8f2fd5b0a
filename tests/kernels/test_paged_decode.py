from typing import Any

import pytest
import torch
from paged_cases import kernel_device, poisoned_cache
from torch import Tensor

from quire.kernels.attention_tiles import DecodeTile
from quire.kernels.decode_plan import allocate_decode_plan, plan_decode
from quire.kernels.paged_decode import paged_decode, paged_decode_reference

SMALL_TILE = DecodeTile(num_keys=32, num_warps=4, num_stages=2, pieces_per_multiprocessor=2, min_piece_tokens=64)


def decoded(
    lengths: list[int],
    heads: tuple[int, int, int],
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    tile: DecodeTile | None = SMALL_TILE,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The kernel's output, poisoned before, and the reference's in float32. The last row is padding."""
    num_heads, num_kv_heads, head_dim = heads
    kv_cache, block_tables = poisoned_cache(lengths, num_kv_heads=num_kv_heads, block_size=block_size, head_dim=head_dim, dtype=dtype)
    device = kernel_device()
    rows = torch.tensor([*reversed(range(len(lengths))), -1], device=device)
    batch_lengths = torch.tensor([*lengths, 0, 0], device=device)
    plan = allocate_decode_plan(
        num_rows=len(rows),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        sliding_window=sliding_window,
        tile=tile,
    )
    plan.partial_outputs.fill_(float("nan"))
    plan_decode(plan, batch_lengths, rows)
    # Queries as a model has them: a part of the q/k/v product.
    query = torch.randn(len(rows), num_heads + 3, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)[:, :num_heads]
    common = {"lengths": batch_lengths, "rows": rows, "scale": head_dim**-0.5, **options}
    output = torch.full((len(rows), num_heads, head_dim), float("nan"), dtype=dtype, device=device)
    actual = paged_decode(query, kv_cache, block_tables, plan, output=output, **common)
    expected = paged_decode_reference(query.float(), kv_cache.float(), block_tables, sliding_window=sliding_window, **common)
    return actual, expected


@pytest.mark.kernel
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 3, 16), (6, 1, 20), (14, 2, 16)], ids=str)
@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_decoding_equals_the_reference(heads: tuple[int, int, int], block_size: int) -> None:
    actual, expected = decoded([1, 7, 129, 64], heads, block_size=block_size)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
    assert not actual[-1].any(), "the row of padding"


@pytest.mark.kernel
def test_one_long_sequence_among_short_ones_is_split_and_combined() -> None:
    actual, expected = decoded([1300, 3, 70, 1], (4, 2, 32))
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 200},
        {"softcap": 2.0},
        {"sinks": [0.5, -1.0, 3.0, 0.0, 1.0, 2.0]},
        {"sliding_window": 150, "softcap": 1.5, "sinks": [-2.0, 2.0, 1.0, 0.0, 0.5, 9.0]},
    ],
    ids=str,
)
def test_windows_soft_caps_and_sinks_equal_the_reference(options: dict[str, Any]) -> None:
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor(options["sinks"], device=kernel_device())}
    actual, expected = decoded([33, 1, 500], (6, 2, 16), **options)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
def test_half_precision_is_summed_in_float32() -> None:
    actual, expected = decoded([129, 1, 300], (4, 2, 64), dtype=torch.float16)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (40, 40, 128), (32, 1, 128), (12, 12, 64), (8, 8, 80), (14, 2, 96), (8, 4, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_committed_tiles_are_right_on_the_gpu(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    actual, expected = decoded([4096, 1, 17, 129, 1000, 511], heads, dtype=dtype, tile=None)
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
