import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.store_kv import store_kv, store_kv_reference


@pytest.mark.parametrize("num_tokens", [1, 7, 129])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_land_in_their_slots_and_nowhere_else(num_tokens: int, block_size: int, dtype: torch.dtype) -> None:
    num_blocks, num_kv_heads, head_dim = 150, 3, 8
    pool = torch.randn(num_blocks, 2, 2, num_kv_heads, block_size, head_dim).to(dtype)
    expected = pool.clone()
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[torch.rand(num_tokens) < 0.2] = -1
    key, value = torch.randn(2, num_kv_heads, num_tokens, head_dim).to(dtype).transpose(1, 2)  # strided, as models give them
    store_kv(key, value, pool[:, 1], slots)
    store_kv_reference(key, value, expected[:, 1], slots)
    assert torch.equal(pool, expected)


@pytest.mark.kernel
@pytest.mark.parametrize("head_dim", [16, 20])
def test_any_strides_are_written(head_dim: int) -> None:
    device = kernel_device()
    pool = torch.randn(9, 2, 2, 3, 4, head_dim, device=device)
    expected = pool.clone()
    slots = torch.tensor([35, -1, 0, 7, 8], device=device)
    key = torch.randn(head_dim, 3, 5, device=device).permute(2, 1, 0)
    value = torch.randn(5, 7, head_dim, device=device)[:, 2:5]
    store_kv(key, value, pool[:, 1], slots)
    store_kv_reference(key, value, expected[:, 1], slots)
    assert torch.equal(pool, expected)
