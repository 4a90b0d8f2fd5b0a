"""What `quire doctor` looks at of GPUs."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from quire.cli.doctor_finding import Finding, bad, good, note
from quire.cli.nvidia import Gpu, query_gpus, query_links, query_peer_reads
from quire.common.config import ModelPlan
from quire.common.errors import QuireError
from quire.common.gpu import torch_sees_gpu
from quire.worker.gpu_memory import MARGIN_BYTES, check_gpu_holds, weight_bytes

# Kernels are compiled for these and newer (bfloat16 in hardware).
MIN_COMPUTE_CAPABILITY: Final = 8.0
_DRIVER: Final = Path("/dev/nvidiactl")
_GIB: Final = 2**30


def gpus(plan: ModelPlan | None) -> Iterator[Finding]:
    """The GPUs, their driver, what torch makes of them, and how they are linked."""
    wants_gpu = plan is not None and plan.device == "cuda"
    if not _DRIVER.exists():
        if wants_gpu:
            yield bad("no NVIDIA driver is here (/dev/nvidiactl)", "install it, start the container with --gpus all, or use --device cpu")
        else:
            yield note("no NVIDIA driver is here; ranks compute on CPU")
        return
    try:
        found = query_gpus()
    except (OSError, ValueError) as error:
        yield (bad if wants_gpu else note)(f"the NVIDIA driver is here, and nvidia-smi cannot be used: {error}", "install the driver anew")
        return
    yield from judge(found, num_wanted=plan.groups * plan.tensor_parallel_size if plan is not None and wants_gpu else 0)
    if not torch_sees_gpu():
        advice = "install a torch built for CUDA (deploy/constraints.txt takes the CPU build), or a newer driver"
        yield (bad if wants_gpu else note)("torch sees no GPU, though the driver does", advice)
    if len(found) > 1:
        is_split = plan is not None and plan.tensor_parallel_size > 1
        yield from links(query_links, query_peer_reads, is_split=is_split)


def judge(found: list[Gpu], *, num_wanted: int) -> Iterator[Finding]:
    """Each GPU, and whether there are enough. num_wanted: ranks that will want one, 0 if they compute on CPU."""
    for gpu in found:
        text = (
            f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver}, "
            f"{gpu.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB free"
        )
        if gpu.compute_capability < MIN_COMPUTE_CAPABILITY:
            yield (bad if num_wanted else note)(text, f"the kernels want compute capability {MIN_COMPUTE_CAPABILITY}; use --device cpu")
        elif gpu.num_ecc_errors:
            yield note(f"{text}; {gpu.num_ecc_errors} uncorrected memory errors", "take it out of service")
        elif gpu.free_bytes < gpu.total_bytes * 0.9:
            yield note(text, "something else uses it: nvidia-smi shows what")
        else:
            yield good(text)
    if len(found) < num_wanted:
        yield bad(f"{num_wanted} ranks want a GPU each, and there are {len(found)}", "lower --groups or --tensor-parallel-size")


def links(
    ask_links: Callable[[], Mapping[tuple[int, int], str]], ask_reads: Callable[[], Mapping[tuple[int, int], str]], *, is_split: bool
) -> Iterator[Finding]:
    """NVLink and peer access between the GPUs. is_split: a model is split over several, so their speed counts."""
    try:
        kinds, reads = ask_links(), ask_reads()
    except OSError as error:
        yield note(f"how the GPUs are linked is not known: {error}")
        return
    slow = {pair: kind for pair, kind in kinds.items() if not kind.startswith("NV")}
    blind = {pair: word for pair, word in reads.items() if word != "OK"}
    if kinds and not slow:
        yield good(f"all {len(kinds)} pairs of GPUs are linked by NVLink ({', '.join(sorted(set(kinds.values())))})")
    elif slow:
        shown = ", ".join(f"{a}-{b} {kind}" for (a, b), kind in slow.items())
        advice = "a model split over them exchanges data at every layer: prefer pairs with NVLink" if is_split else ""
        yield note(f"not linked by NVLink: {shown}", advice)
    if blind:
        shown = ", ".join(f"{a}-{b} {word}" for (a, b), word in blind.items())
        yield note(
            f"cannot read each other's memory: {shown}", "in a virtual machine ask for ACS off; data goes through the host till then"
        )
    elif reads:
        yield good(f"all {len(reads)} pairs of GPUs can read each other's memory")


def memory(plan: ModelPlan) -> Iterator[Finding]:
    """Weights, KV cache and margin against the memory of the GPU that has the least free."""
    if plan.device != "cuda":
        return
    try:
        free_bytes = min(gpu.free_bytes for gpu in query_gpus())
        weights = weight_bytes(plan.folder, dtype=plan.dtype, num_ranks=plan.tensor_parallel_size)
        check_gpu_holds(num_blocks=plan.num_gpu_blocks, block_bytes=plan.block_bytes, weight_bytes=weights, free_bytes=free_bytes)
    except (OSError, ValueError):
        return  # said above
    except QuireError as error:
        yield bad(f"GPU memory: {error.message}", "or a smaller number format (--dtype), a smaller model, or more ranks")
        return
    room = (free_bytes - weights - MARGIN_BYTES) // plan.block_bytes
    yield good(
        f"GPU memory: {weights / _GIB:.2f} GiB weights + {MARGIN_BYTES / _GIB:.0f} GiB margin of {free_bytes / _GIB:.2f} GiB free: room "
        f"for about {room} blocks of {plan.block_size} tokens, less what the largest step takes"
    )
