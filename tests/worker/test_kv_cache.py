from pathlib import Path
from typing import Any

import pytest
import torch

from quire.common.errors import ConfigError
from quire.worker import kv_cache as kv_cache_file
from quire.worker.host_memory import available_memory_bytes, check_pool_fits
from quire.worker.kv_cache import KvCache

SIZES: dict[str, Any] = {
    "num_blocks": 5,
    "num_layers": 3,
    "num_kv_heads": 2,
    "block_size": 4,
    "head_dim": 8,
    "dtype": torch.bfloat16,
    "device": "cpu",
}


def test_a_block_is_one_run_of_memory() -> None:
    kv_cache = KvCache(**SIZES)
    assert kv_cache.block_bytes == 3 * 2 * 2 * 4 * 8 * 2
    assert kv_cache.blocks[2].is_contiguous()


@pytest.mark.parametrize("order", [kv_cache_file.PHYSICAL_ORDER, ("layer", "block", "kind", "head", "offset", "dim")])
def test_layers_and_blocks_are_views_of_the_same_memory_in_any_physical_order(
    monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    monkeypatch.setattr(kv_cache_file, "PHYSICAL_ORDER", order)
    kv_cache = KvCache(**SIZES)
    assert kv_cache.layer(1).shape == (5, 2, 2, 4, 8)
    kv_cache.layer(1)[3, 0, 1, 2] = 7
    assert kv_cache.blocks[3, 1, 0, 1, 2].tolist() == [7] * 8
    assert int((kv_cache.blocks != 0).sum()) == 8


def test_a_pool_larger_than_memory_is_refused_with_the_arithmetic() -> None:
    check_pool_fits(num_blocks=10, block_bytes=100, available_bytes=1000)
    check_pool_fits(num_blocks=10, block_bytes=100, available_bytes=None)
    with pytest.raises(ConfigError, match=r"needs 11 blocks of 100 bytes.*room for 10 blocks"):
        check_pool_fits(num_blocks=11, block_bytes=100, available_bytes=1000)


def test_available_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert available_memory_bytes(meminfo=meminfo, cgroup=tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.current").write_text("10000\n")
    assert available_memory_bytes(meminfo=meminfo, cgroup=tmp_path) == 20000
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    assert available_memory_bytes(meminfo=meminfo, cgroup=tmp_path) == 25000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(meminfo=meminfo, cgroup=tmp_path) == 50 * 1024
    assert available_memory_bytes(meminfo=tmp_path / "none", cgroup=tmp_path / "none") is None
