import pytest
import torch
from torch import Tensor

from quire.common.errors import InternalError
from quire.worker.kv_cache import KvCache
from quire.worker.swap_pool import SwapPool


def kv_cache_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> KvCache:
    return KvCache(num_blocks=6, num_layers=3, num_kv_heads=2, block_size=4, head_dim=8, dtype=dtype, device=device)


def fill_with_random_bytes(kv_cache: KvCache) -> None:
    """Any pattern of bits: NaN of all kinds, infinities and subnormals among them."""
    flat = kv_cache.blocks.view(torch.uint8)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def bytes_of(kv_cache: KvCache, block_id: int) -> Tensor:
    return kv_cache.blocks[block_id].view(torch.uint8).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swapped_blocks_come_back_byte_for_byte(dtype: torch.dtype) -> None:
    kv_cache = kv_cache_of(dtype)
    fill_with_random_bytes(kv_cache)
    before = [bytes_of(kv_cache, block_id) for block_id in range(6)]
    pool = SwapPool(kv_cache, num_blocks=3)
    pool.start_out([(0, 5, 1), (1, 0, 2)])
    assert pool.take_ended() == ((0, 1), ())
    kv_cache.blocks[[0, 5]] = 0
    pool.start_in([(2, 3, 1), (3, 5, 2)])
    assert pool.take_ended() == ((2, 3), ())
    assert torch.equal(bytes_of(kv_cache, 3), before[5])
    assert torch.equal(bytes_of(kv_cache, 5), before[0])
    for untouched in (1, 2, 4):
        assert torch.equal(bytes_of(kv_cache, untouched), before[untouched])
    assert not bytes_of(kv_cache, 0).any()


def test_a_copy_is_performed_when_it_is_waited_for_else_when_the_ended_are_asked_for() -> None:
    kv_cache = kv_cache_of()
    pool = SwapPool(kv_cache, num_blocks=2)
    kv_cache.blocks[0], kv_cache.blocks[1] = 1.0, 2.0
    pool.start_out([(0, 0, 0), (1, 1, 1)])
    pool.take_ended()
    pool.start_in([(7, 2, 0), (8, 3, 1)])
    assert (kv_cache.blocks[[2, 3]] == 0).all()
    pool.wait((8,))
    assert (kv_cache.blocks[2] == 0).all()
    assert (kv_cache.blocks[3] == 2).all()
    pool.wait((8, 0))  # ended before
    assert pool.take_ended() == ((8, 7), ())
    assert (kv_cache.blocks[2] == 1).all()
    assert pool.take_ended() == ((), ())


def test_a_copy_that_fails_is_reported_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    pool = SwapPool(kv_cache_of(device="meta"), num_blocks=2)  # a device from which nothing can be read
    pool.start_out([(4, 0, 0)])
    pool.start_in([(5, 1, 1)])
    pool.wait((4,))
    assert pool.take_ended() == ((5,), (4,))
    assert "copy 4 of a block failed: Cannot copy out of meta tensor" in caplog.text
    assert pool.take_ended() == ((), ())


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ((3, 6, 0), "copy 3 is between block 6 of 6 on the device and block 0 of 2 in CPU memory"),
        ((3, -1, 0), "block -1 of 6"),
        ((3, 0, 2), "block 2 of 2 in CPU memory"),
        ((3, 0, -1), "block -1 of 2"),
        ((9, 0, 0), "copy 9 is started while another copy of this id is not reported"),
    ],
)
def test_a_copy_that_cannot_be_is_an_error_with_the_values(copy: tuple[int, int, int], message: str) -> None:
    pool = SwapPool(kv_cache_of(), num_blocks=2)
    pool.start_out([(9, 1, 1)])
    for start in (pool.start_in, pool.start_out):
        with pytest.raises(InternalError, match=message):
            start([copy])
    pool.wait((9,))
    with pytest.raises(InternalError, match="copy 9 is started while"):
        pool.start_in([(9, 1, 1)])
    pool.take_ended()
    pool.start_in([(9, 1, 1)])


def test_a_pool_without_blocks_and_one_that_is_cleared_report_nothing() -> None:
    assert SwapPool(kv_cache_of(), num_blocks=0).take_ended() == ((), ())
    pool = SwapPool(kv_cache_of(), num_blocks=1)
    pool.start_out([(0, 0, 0)])
    pool.wait((0,))
    pool.start_out([(1, 0, 0)])
    pool.clear()
    assert pool.take_ended() == ((), ())


def test_the_cpu_pool_has_the_layout_of_the_device_pool() -> None:
    kv_cache = kv_cache_of(torch.bfloat16)
    cpu_pool = kv_cache.cpu_pool(4)
    assert (cpu_pool.block_bytes, cpu_pool.blocks.dtype) == (kv_cache.block_bytes, torch.bfloat16)
    assert cpu_pool.blocks.shape == (4, *kv_cache.blocks.shape[1:])
    assert cpu_pool.blocks.stride() == kv_cache.blocks.stride()
    assert kv_cache.cpu_pool(0).block_bytes == kv_cache.block_bytes
