"""Sequences in a paged cache of which everything else is poisoned."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kernel_device() -> torch.device:
    """Where kernels are tested: a GPU if there is one; else the CPU, by plain torch or, under TRITON_INTERPRET=1, interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def poisoned_cache(
    lengths: Sequence[int], *, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """One layer of a pool that is NaN but for the slots of the sequences, at random blocks; and their block tables.

    The block tables have two rows more than there are sequences, and name blocks outside the pool behind each sequence's end.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-length // block_size) for length in lengths]
    block_ids = torch.randperm(sum(widths) + 3, generator=generator).int()
    # Three layers, of which the middle one is used: the view must be strided.
    pool = torch.full((len(block_ids), 3, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    layer = pool[:, 1]
    block_tables = torch.full((len(lengths) + 2, max(widths) + 2), 2**24, dtype=torch.int32)
    first = 0
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        table = block_ids[first : first + width]
        block_tables[row, :width] = table
        first += width
        numbers = torch.full((2, num_kv_heads, width * block_size, head_dim), float("nan"))
        numbers[:, :, :length] = torch.randn(2, num_kv_heads, length, head_dim, generator=generator)
        layer[table.long()] = numbers.unflatten(2, (width, block_size)).permute(2, 0, 1, 3, 4).to(dtype)
    device = kernel_device()
    return pool.to(device)[:, 1], block_tables.to(device)
