"""What of the swap pool of a GPU needs none; tests/worker/test_cuda.py has the rest."""

import pytest
import torch

from quire.worker import cuda_swap_pool
from quire.worker.cuda_swap_pool import _neighbours, pin_slabs
from quire.worker.kv_cache import KvCache

KV_CACHE = KvCache(num_blocks=6, num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype=torch.float32, device="cpu")


def test_neighbours_on_both_sides_share_a_transfer_inside_a_slab() -> None:
    copies = [(7, 3, 0), (8, 4, 1), (9, 5, 2), (10, 6, 3), (11, 7, 4), (12, 9, 5), (13, 10, 7)]
    assert _neighbours(copies, slab_blocks=3) == [([7, 8, 9], 3, 0), ([10, 11], 6, 3), ([12], 9, 5), ([13], 10, 7)]
    assert _neighbours(copies[:5], slab_blocks=100) == [([7, 8, 9, 10, 11], 3, 0)]
    assert _neighbours([], slab_blocks=3) == []


@pytest.mark.parametrize(("available", "num_blocks"), [(None, 7), (2**40, 7), (2**30, 0)])
def test_as_much_is_pinned_as_the_host_can_spare(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, available: int | None, num_blocks: int
) -> None:
    monkeypatch.setattr(cuda_swap_pool, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(cuda_swap_pool, "SLAB_BYTES", 3 * KV_CACHE.block_bytes)
    slabs = pin_slabs(KV_CACHE, num_blocks=7)
    assert [len(slab) for slab in slabs] == [3, 3, 1][: len(slabs)]
    assert sum(map(len, slabs)) == num_blocks
    assert ("0 blocks instead of 7" in caplog.text) == (num_blocks == 0)
