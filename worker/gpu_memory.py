"""How a GPU's memory is shared out between weights, steps and KV blocks."""

from typing import Final

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder

# Left free of KV blocks beside what the largest step was seen to take: kernels that are loaded later, and what the allocator
# cannot use because steps of many sizes have cut it up. The second is a share of the step's own bytes.
MARGIN_BYTES: Final = 2**30
STEP_MARGIN: Final = 0.25
# What CUDA graphs take, which are captured once the pool is there: 1.1 GiB with Llama 3 8B's shape, 0.5 GiB with Qwen3 0.6B's
# (NVIDIA H100 80GB HBM3, 92 graphs, 2026-11-25).
_GRAPH_BYTES: Final = 5 * 2**28

_GIB: Final = 2**30
_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(folder: ModelFolder, *, dtype: str, num_ranks: int) -> int:
    """What the weights of one rank will take, judged by their files; without files, by the sizes in config.json."""
    if not folder.weight_files:
        return _num_parameters(folder) * _DTYPE_BYTES[dtype] // num_ranks
    num_bytes = sum((folder.path / name).stat().st_size for name in folder.weight_files)
    return num_bytes * _DTYPE_BYTES[dtype] // _DTYPE_BYTES[folder.dtype] // num_ranks


def _num_parameters(folder: ModelFolder) -> int:
    """Of the whole model. Families that config.json does not tell of are built without memory, which takes a second."""
    if folder.num_parameters is not None:
        return folder.num_parameters
    from quire.worker.models.dummy_weights import count_built_parameters  # imports transformers

    return count_built_parameters(folder)


def partial_bytes(folder: ModelFolder, *, dtype: str, max_tokens: int) -> int:
    """What one rank adds to a sum over ranks in a step of so many tokens, which other ranks read in its memory."""
    return max_tokens * folder.hidden_size * _DTYPE_BYTES[dtype]


def draw_bytes(folder: ModelFolder, *, dtype: str, num_ranks: int, max_rows: int) -> int:
    """What other ranks read in one rank's memory when the group draws."""
    from quire.kernels.vocab_shards import VocabShards  # imports Triton
    from quire.worker.models.load_model import DTYPES

    return VocabShards.num_bytes(vocab_size=folder.vocab_size, num_ranks=num_ranks, max_rows=max_rows, dtype=DTYPES[dtype])


def graph_bytes(*, step_bytes: int, max_tokens: int, largest_graph: int) -> int:
    """What CUDA graphs will take: those of large steps hold the activations of the largest of them, beside those of steps without.

    step_bytes: what a step of max_tokens takes
    """
    return _GRAPH_BYTES + step_bytes * largest_graph // max_tokens


def check_gpu_holds(*, num_blocks: int | None, block_bytes: int, weight_bytes: int, free_bytes: int) -> None:
    """Refuse, before anything is loaded, what the GPU cannot hold.

    num_blocks: of the KV pool, as told; None if it takes what is left, which must be a block at least

    Raises:
        ConfigError: with the arithmetic.
    """
    least = 1 if num_blocks is None else num_blocks
    needed = weight_bytes + least * block_bytes + MARGIN_BYTES
    if needed > free_bytes:
        room = (free_bytes - weight_bytes - MARGIN_BYTES) // block_bytes
        advice = f"room for {room} blocks; lower gpu_blocks or kv_cache_memory" if room > 0 else "which is too little for this model"
        raise ConfigError(
            f"weights of {weight_bytes / _GIB:.2f} GiB, {least} KV blocks of {block_bytes} bytes ({least * block_bytes / _GIB:.2f} GiB) "
            f"and a margin of {MARGIN_BYTES / _GIB:.0f} GiB are {needed / _GIB:.2f} GiB, and the GPU has {free_bytes / _GIB:.2f} GiB free, "
            + advice,
            reason="NOT_ENOUGH_MEMORY",
        )


def blocks_that_fit(*, free_bytes: int, step_bytes: int, block_bytes: int) -> int:
    """KV blocks for which the GPU has room, once the weights are there.

    step_bytes: what the largest step takes beside weights and KV blocks, as measured

    Raises:
        ConfigError: not even one, with the arithmetic.
    """
    reserved = MARGIN_BYTES + int(step_bytes * (1 + STEP_MARGIN))
    num_blocks = (free_bytes - reserved) // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"behind the weights the GPU has {free_bytes / _GIB:.2f} GiB free; the largest step takes {step_bytes / _GIB:.2f} GiB, with "
            f"its margin {reserved / _GIB:.2f} GiB, which leaves no room for a KV block of {block_bytes} bytes; lower max_batched_tokens "
            "or max_sequences",
            reason="NOT_ENOUGH_MEMORY",
        )
    return num_blocks


def check_step_fits(*, num_blocks: int, free_bytes: int, step_bytes: int, block_bytes: int) -> None:
    """Refuse a pool of told size beside which the largest step has no room: it would end the rank while it serves.

    free_bytes: with the weights there; step_bytes: as for `blocks_that_fit`, whose margins are not asked for here

    Raises:
        ConfigError: with the arithmetic.
    """
    room = max(0, free_bytes - step_bytes) // block_bytes
    if num_blocks > room:
        raise ConfigError(
            f"behind the weights the GPU has {free_bytes / _GIB:.2f} GiB free; beside the {step_bytes / _GIB:.2f} GiB of the largest step "
            f"that is room for {room} KV blocks of {block_bytes} bytes, and {num_blocks} are asked for; lower gpu_blocks, kv_cache_memory, "
            "max_batched_tokens or max_sequences",
            reason="NOT_ENOUGH_MEMORY",
        )
