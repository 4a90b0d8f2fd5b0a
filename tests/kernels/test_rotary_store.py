from typing import Any

import pytest
import torch
from paged_cases import kernel_device
from torch import Tensor

from quire.kernels.rotary_store import MAX_TOKENS_ALONE, rotary_store, rotary_store_reference, rotary_table
from quire.worker.graph_sizes import mixed_sizes, warmed


def stored(
    num_tokens: int, heads: tuple[int, int, int], *, rotary_dim: int, has_norm: bool, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and pool of the kernel, and of the reference in float32."""
    num_heads, num_kv_heads, head_dim = heads
    device = kernel_device()
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(device, dtype)
    query, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    num_blocks = 40 + num_tokens // 4
    pool = torch.randn(num_blocks, 2, 2, num_kv_heads, 4, head_dim, generator=generator).to(device, dtype)
    slots = torch.randperm(4 * num_blocks, generator=generator)[:num_tokens].to(device)
    slots[1::3] = -1
    positions = torch.randint(0, 50, (num_tokens,), generator=generator).to(device)
    table = rotary_table(1e4 ** -(torch.arange(rotary_dim // 2, device=device) * 2 / rotary_dim), max_positions=50)
    norms = torch.randn(2, head_dim, generator=generator).to(device) if has_norm else (None, None)
    options: dict[str, Any] = {"query_norm": norms[0], "key_norm": norms[1], "eps": 1e-5}
    expected, expected_pool = torch.empty_like(query, dtype=torch.float32), pool.float()
    rotary_store_reference(
        query.float(), key.float(), value.float(), expected_pool[:, 1], slots, positions, table, output=expected, **options
    )
    actual = rotary_store(query, key, value, pool[:, 1], slots, positions, table, **options)
    return [actual, pool], [expected, expected_pool]


@pytest.mark.kernel
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "rotary_dim"), [((4, 2, 16), 16), ((6, 1, 20), 8), ((3, 3, 64), 48)], ids=str)
def test_rotation_norm_and_write_equal_the_reference(num_tokens: int, has_norm: bool, heads: tuple[int, int, int], rotary_dim: int) -> None:
    actual, expected = stored(num_tokens, heads, rotary_dim=rotary_dim, has_norm=has_norm, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "rotary_dim"), [((4, 2, 16), 16), ((6, 1, 20), 8), ((3, 3, 64), 48)], ids=str)
def test_several_tokens_of_a_program_are_none_of_each_other(has_norm: bool, heads: tuple[int, int, int], rotary_dim: int) -> None:
    # Not a multiple of any number of tokens that a program may take.
    actual, expected = stored(MAX_TOKENS_ALONE + 3, heads, rotary_dim=rotary_dim, has_norm=has_norm, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.kernel
def test_half_precision_is_computed_in_float32() -> None:
    actual, expected = stored(7, (4, 2, 16), rotary_dim=16, has_norm=True, dtype=torch.float16)
    torch.testing.assert_close([tensor.float() for tensor in actual], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (71, 1, 64), (8, 8, 80), (8, 4, 256)], ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("num_tokens", [129, 1027])
def test_bfloat16_is_right_on_the_gpu(num_tokens: int, heads: tuple[int, int, int], has_norm: bool) -> None:
    actual, expected = stored(num_tokens, heads, rotary_dim=heads[2] // 2, has_norm=has_norm, dtype=torch.bfloat16)
    torch.testing.assert_close([tensor.float() for tensor in actual], expected, atol=5e-2, rtol=1e-2)


@pytest.mark.kernel
@pytest.mark.parametrize("num_tokens", [7, MAX_TOKENS_ALONE + 3])
def test_queries_and_keys_may_be_rotated_in_place(num_tokens: int) -> None:
    qkv = torch.randn(num_tokens, 8, 16, device=kernel_device())
    query, key, value = qkv.split([4, 2, 2], dim=1)
    pool = torch.zeros(num_tokens // 4 + 8, 2, 2, 2, 4, 16, device=query.device)
    slots, positions = torch.arange(num_tokens, device=query.device), torch.arange(num_tokens, device=query.device)
    slots[5] = -1
    table = rotary_table(torch.rand(8, device=query.device), max_positions=num_tokens)
    norms: dict[str, Any] = {name: torch.rand(16, device=query.device) for name in ("query_norm", "key_norm")}
    expected, expected_pool = torch.empty_like(query), pool[:, 1].clone()
    expected_key, values = torch.empty_like(key), value.clone()
    rotary_store_reference(query, key, value, expected_pool, slots, positions, table, output=expected, key_output=expected_key, **norms)
    rotary_store(query, key, value, pool[:, 1], slots, positions, table, output=query, key_output=key, **norms)
    torch.testing.assert_close([query, key, pool[:, 1]], [expected, expected_key, expected_pool], atol=2e-6, rtol=2e-6)
    assert torch.equal(value, values)
    assert pool[1, 1, 0, :, 1].count_nonzero() == 0, "the slot of padding is not written"


def test_what_a_program_takes_changes_where_sizes_are_compiled_apart() -> None:
    sizes = mixed_sizes(8192, launch_bound_tokens=0)
    assert len(warmed([MAX_TOKENS_ALONE, MAX_TOKENS_ALONE + 1])) == 2
    assert min(sizes) <= MAX_TOKENS_ALONE < max(sizes), "every model has graphs of both"


def test_the_table_turns_by_frequency_times_position() -> None:
    table = rotary_table(torch.tensor([0.5, 2.0]), max_positions=3)
    torch.testing.assert_close(
        table[2], torch.tensor([1.0, 4.0, 1.0, 4.0]).cos() * torch.tensor([1, 1, 0, 0]) + torch.tensor([0, 0, 0.841471, -0.756802])
    )
