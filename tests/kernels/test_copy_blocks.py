import pytest
import torch

from quire.kernels.copy_blocks import copy_blocks, copy_blocks_reference


@pytest.mark.parametrize("num_copies", [1, 7, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_copied_whole(num_copies: int, dtype: torch.dtype) -> None:
    blocks = torch.randn(300, 2, 2, 1, 4, 3).to(dtype)
    ids = torch.randperm(300)
    expected = blocks.clone()
    copy_blocks(blocks, ids[:num_copies], ids[-num_copies:])
    copy_blocks_reference(expected, ids[:num_copies], ids[-num_copies:])
    assert torch.equal(blocks, expected)


def test_a_source_that_is_also_a_target_is_read_first() -> None:
    blocks = torch.arange(3).float()[:, None]
    copy_blocks(blocks, torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert blocks[:, 0].tolist() == [0, 0, 1]


def test_a_pool_of_another_physical_order_is_copied_as_well() -> None:
    pool = torch.randn(2, 5, 3)  # layer first
    blocks = pool.transpose(0, 1)
    expected = blocks.clone()
    copy_blocks(blocks, torch.tensor([4]), torch.tensor([1]))
    copy_blocks_reference(expected, torch.tensor([4]), torch.tensor([1]))
    assert torch.equal(pool.transpose(0, 1), expected)
