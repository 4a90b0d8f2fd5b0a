"""Times of launches on the GPU, and the machine's own ceilings to hold them against."""

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def seconds_per_launch(launches: Sequence[Callable[[], object]], *, num_replays: int = 15) -> float:
    """Median time of one of the launches, captured together into a CUDA graph and replayed.

    The launches should touch different memory, several times the second-level cache: then nothing is found there.
    """
    launches[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays)]
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times_ms = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    return float(statistics.median(times_ms)) / 1e3 / len(launches)


def ceilings() -> dict[str, float]:
    """What this GPU does at best: bytes per second of reading and of copying, operations per second of a bf16 product."""
    data = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(data)
    copy_s = seconds_per_launch([lambda: torch.neg(data, out=target)])  # in a graph, copy_() would be left to a copy engine
    sums = torch.empty(132 * 16, dtype=torch.float32, device="cuda")
    words = data.view(torch.int32)
    read_s = seconds_per_launch([lambda: _read_kernel[(len(sums),)](sums, words, len(words) // len(sums) // 8192, BLOCK=8192, num_warps=8)])
    read_bytes = len(words) // len(sums) // 8192 * 8192 * 4 * len(sums)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product_s = seconds_per_launch([lambda: matrix @ matrix] * 4)
    return {
        "read_bytes_per_s": read_bytes / read_s,
        "copy_bytes_per_s": 2 * data.nbytes / copy_s,
        "bf16_operations_per_s": 2 * 8192**3 / product_s,
    }


@triton.jit
def _read_kernel(
    sums: tl.tensor,  # [num_programs]
    words: tl.tensor,  # [num_programs * num_turns * BLOCK] int32
    num_turns: int,
    BLOCK: tl.constexpr,
) -> None:
    total = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * num_turns * BLOCK
    for turn in range(num_turns):
        total += tl.load(words + first + turn * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total, 0).to(tl.float32))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the expected norm; infinite if anything is not finite."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    return float(difference) if bool(actual.isfinite().all()) else float("inf")
