"""Copying blocks inside the pool: all copy-on-write copies of a step at once."""

import math
from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton

# Numbers of each block that one program copies: 8 KiB of bf16. A block of 2 MiB then occupies 256 programs.
_SEGMENT: Final = 4096


def copy_blocks(blocks: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """Copy whole blocks, all layers, keys and values.

    blocks:                 [num_blocks, ...]  the pool, block first; at most one dim beside it may be strided
    source_ids, target_ids: [num_copies] int64; targets distinct

    A target may be the source of itself or of an earlier copy, which reads it first: a block is given away anew only after
    its own copy was planned. It must not be the source of a later one.
    """
    assert source_ids.shape == target_ids.shape, (source_ids.shape, target_ids.shape)
    if not runs_triton(blocks):
        # Not blocks[target_ids] = blocks[source_ids]: that copies number by number. Eight blocks of 393 kB took 1.05 ms that way
        # and 0.24 ms this way (x86 CPU, one thread, torch 2.13, 2026-11-25).
        blocks.index_copy_(0, target_ids, blocks.index_select(0, source_ids))
        return
    num_runs, run_stride, run_length = _runs(blocks)
    _copy_blocks_kernel[(triton.cdiv(run_length, _SEGMENT), num_runs)](
        blocks,
        source_ids,
        target_ids,
        source_ids.shape[0],
        run_length,
        blocks.stride(0),
        run_stride,
        SEGMENT=_SEGMENT,
        num_warps=4,
    )


def _runs(blocks: Tensor) -> tuple[int, int, int]:
    """How a block lies in memory: number of runs, stride from run to run, length of each."""
    dim = blocks.dim()
    run_length = 1
    while dim > 1 and blocks.stride(dim - 1) == run_length:
        dim -= 1
        run_length *= blocks.shape[dim]
    assert dim <= 2, f"a block is more than one row of runs: {tuple(blocks.shape)}, strides {blocks.stride()}"
    num_runs = math.prod(blocks.shape[1:dim])
    return num_runs, blocks.stride(1) if dim == 2 else 0, run_length


@triton.jit(do_not_specialize=["num_copies"])  # or the first lone copy, and the first sixteen, would wait for a compiler
def _copy_blocks_kernel(
    blocks: tl.tensor,  # [num_blocks, num_runs, run_length]
    source_ids: tl.tensor,  # [num_copies]
    target_ids: tl.tensor,  # [num_copies]
    num_copies: int,
    run_length: int,
    block_stride: int,
    run_stride: int,
    SEGMENT: tl.constexpr,
) -> None:
    # A program copies its segment of one block after the other. Every number is read and written by one thread, so a later
    # copy into an earlier one's source cannot overtake it.
    place = tl.program_id(0).to(tl.int64) * SEGMENT + tl.arange(0, SEGMENT)
    is_inside = place < run_length
    segment = blocks + tl.program_id(1).to(tl.int64) * run_stride + place
    for copy in range(num_copies):
        source = tl.load(source_ids + copy).to(tl.int64) * block_stride
        target = tl.load(target_ids + copy).to(tl.int64) * block_stride
        tl.store(segment + target, tl.load(segment + source, mask=is_inside), mask=is_inside)


def copy_blocks_reference(blocks: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """The same, block by block, from a copy of the pool."""
    before = blocks.clone()
    for source_id, target_id in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
        blocks[target_id] = before[source_id]
