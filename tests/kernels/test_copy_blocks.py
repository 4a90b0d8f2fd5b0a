import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.copy_blocks import copy_blocks, copy_blocks_reference

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("num_copies", [1, 7, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_copied_whole(num_copies: int, dtype: torch.dtype) -> None:
    blocks = torch.randn(300, 2, 2, 1, 4, 3, device=kernel_device()).to(dtype)
    ids = torch.randperm(300, device=blocks.device)
    expected = blocks.clone()
    copy_blocks(blocks, ids[:num_copies], ids[-num_copies:])
    copy_blocks_reference(expected, ids[:num_copies], ids[-num_copies:])
    assert torch.equal(blocks, expected)


def test_a_block_that_takes_several_programs_is_copied_whole() -> None:
    blocks = torch.randn(5, 3, 3001, device=kernel_device())
    copy_blocks(blocks, torch.tensor([4], device=blocks.device), torch.tensor([0], device=blocks.device))
    assert torch.equal(blocks[0], blocks[4])


def test_a_source_that_a_later_copy_writes_to_is_read_first() -> None:
    blocks = torch.arange(3, device=kernel_device()).float()[:, None]
    copy_blocks(blocks, torch.tensor([1, 0], device=blocks.device), torch.tensor([2, 1], device=blocks.device))
    assert blocks[:, 0].tolist() == [0, 0, 1]


def test_a_pool_of_another_physical_order_is_copied_as_well() -> None:
    pool = torch.randn(2, 5, 3, device=kernel_device())  # layer first
    blocks = pool.transpose(0, 1)
    expected = blocks.clone()
    source, target = torch.tensor([4], device=pool.device), torch.tensor([1], device=pool.device)
    copy_blocks(blocks, source, target)
    copy_blocks_reference(expected, source, target)
    assert torch.equal(pool.transpose(0, 1), expected)
