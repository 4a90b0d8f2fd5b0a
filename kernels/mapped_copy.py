"""Copies between the device and pinned memory of the host, which lies in the device's address space, by a kernel."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton

_WORDS: Final = 1024  # of one program: all of them are under way at once, and the way across the bus takes a microsecond


def mapped_copy(source: Tensor, target: Tensor) -> None:
    """Copy all numbers; either side may be pinned memory, and both must stay until the stream has come past this.

    source, target: of one shape and dtype, contiguous, of 4 or 8 bytes each: one kernel for all dtypes

    A copy engine is quicker for megabytes, but it performs transfers in the order in which they were asked for, of whatever
    stream: behind 100 blocks of 13 MB, a step's few kilobytes waited 27 ms (NVIDIA H200, PCIe 5.0, 2026-11-30).
    """
    assert (source.shape, source.dtype) == (target.shape, target.dtype), (source.shape, source.dtype, target.shape, target.dtype)
    assert source.itemsize % 4 == 0, source.dtype
    assert source.is_contiguous(), source.stride()
    assert target.is_contiguous(), target.stride()
    if source.numel() == 0:
        return
    if not (runs_triton(source) or runs_triton(target)):
        target.copy_(source)
        return
    words, places = (tensor.view(-1).view(torch.int32) for tensor in (source, target))
    _mapped_copy_kernel[(triton.cdiv(len(words), _WORDS),)](words, places, len(words), WORDS=_WORDS, num_warps=4)


# Not for each alignment either, nor for small numbers of words: a step would wait for a compiler.
@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["source", "target"])
def _mapped_copy_kernel(
    source: tl.tensor,  # [num_words]
    target: tl.tensor,  # [num_words]
    num_words: int,
    WORDS: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    is_word = index < num_words
    tl.store(target + index, tl.load(source + index, mask=is_word, other=0), mask=is_word)
