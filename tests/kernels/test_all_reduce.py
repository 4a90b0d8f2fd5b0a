"""Ranks are processes here, and their programs really wait for each other: two sums of one launch that differ show a race."""

from typing import Any

import pytest
import torch
from peer_ranks import SLOT_BYTES, exchanges, numbers, run_ranks, sums_and_norms

from quire.kernels.backend import IS_INTERPRETED
from quire.kernels.rms_norm import rms_norm_reference

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not IS_INTERPRETED, reason="test_interpreted.py runs these"),
]


@pytest.mark.parametrize(("size", "shape"), [(2, (1, 64)), (2, (9, 130)), (3, (20, 64)), (4, (5, 48))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_ranks_have_the_sum_and_its_norm(size: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_turns = 6
    of_ranks = run_ranks(sums_and_norms, size, shape, dtype, num_turns, area_bytes=2 * shape[0] * shape[1] * dtype.itemsize)
    residual = torch.zeros(shape, dtype=dtype)
    for turn in range(num_turns):
        total = torch.zeros(shape)
        for rank in range(size):
            total += numbers(rank, turn, *shape, dtype=dtype).float()
        residual = (total.to(dtype).float() + residual.float()).to(dtype)
        expected = rms_norm_reference(residual, numbers(-1, turn, shape[1], dtype=dtype), eps=1e-5)
        for rank in range(size):
            torch.testing.assert_close(of_ranks[rank][turn][0], residual, rtol=0, atol=0)
            torch.testing.assert_close(of_ranks[rank][turn][1], expected)
            torch.testing.assert_close(of_ranks[rank][turn][1], of_ranks[0][turn][1], rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parts_are_summed_and_gathered(size: int, dtype: torch.dtype) -> None:
    lengths = [1, 5000, 7, 4096, 16384, 3, 3, 9000]
    of_ranks: list[Any] = run_ranks(exchanges, size, lengths, dtype, area_bytes=2 * SLOT_BYTES)
    for turn, length in enumerate(lengths):
        parts = torch.stack([numbers(rank, turn, length, dtype=dtype) for rank in range(size)])
        total = torch.zeros(length)
        for part in parts:
            total += part.float()
        for rank in range(size):
            torch.testing.assert_close(of_ranks[rank][turn][0], total.to(dtype), rtol=0, atol=0)
            torch.testing.assert_close(of_ranks[rank][turn][1], parts, rtol=0, atol=0)
            torch.testing.assert_close(of_ranks[rank][turn][2], total.to(dtype), rtol=0, atol=0)


def test_numbers_of_meetings_wrap_around() -> None:
    of_ranks: list[Any] = run_ranks(exchanges, 2, [10] * 4, torch.float32, area_bytes=2 * SLOT_BYTES, num_meetings=2**31 - 4)
    for turn in range(4):
        parts = torch.stack([numbers(rank, turn, 10, dtype=torch.float32) for rank in range(2)])
        for rank in range(2):
            torch.testing.assert_close(of_ranks[rank][turn][0], parts.sum(0), rtol=0, atol=0)
            torch.testing.assert_close(of_ranks[rank][turn][1], parts, rtol=0, atol=0)
            torch.testing.assert_close(of_ranks[rank][turn][2], parts.sum(0), rtol=0, atol=0)
