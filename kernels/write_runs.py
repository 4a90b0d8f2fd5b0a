"""What the host changes in the batch between two steps, put in place by one launch."""

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton

_WORDS = 1024  # of one program


def write_runs(words: Tensor, runs: Tensor, payload: Tensor, *, max_count: int) -> None:
    """Copy consecutive words of the payload to where each run says; runs do not overlap.

    runs and payload may be pinned memory of the host, read from there.

    words:     [num_words] int64
    runs:      [num_runs, 3] int64: first word of the target, first word of the payload, number of words
    payload:   [num_payload_words] int64
    max_count: the largest number of words of a run
    """
    if not runs_triton(words):
        write_runs_reference(words, runs, payload)
        return
    _write_runs_kernel[(runs.shape[0], triton.cdiv(max_count, _WORDS))](words, runs, payload, WORDS=_WORDS, num_warps=4)


@triton.jit
def _write_runs_kernel(
    words: tl.tensor,  # [num_words]
    runs: tl.tensor,  # [num_runs, 3]
    payload: tl.tensor,  # [num_payload_words]
    WORDS: tl.constexpr,
) -> None:
    run = runs + tl.program_id(0).to(tl.int64) * 3
    target = tl.load(run)
    source = tl.load(run + 1)
    index = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    is_word = index < tl.load(run + 2)
    tl.store(words + target + index, tl.load(payload + source + index, mask=is_word, other=0), mask=is_word)


def write_runs_reference(words: Tensor, runs: Tensor, payload: Tensor) -> None:
    """The same, run by run."""
    for target, source, count in runs.tolist():
        words[target : target + count] = payload[source : source + count]
