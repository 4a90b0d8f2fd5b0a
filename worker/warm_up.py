"""First steps of a rank before it says hello: code paths are touched once, memory is measured, and prefill is timed."""

import time
from typing import TYPE_CHECKING, Final

import torch

from quire.common.messages import Chunk, RowAdd, SamplingState, StepPlan
from quire.kernels import dense_attention
from quire.worker.collectives import Collective, all_agree
from quire.worker.kv_cache import KvCache
from quire.worker.models.llama import LlamaModel
from quire.worker.runner import Runner

# transformers takes seconds to import, and the native family needs none of it.
if TYPE_CHECKING:
    from quire.worker.models.transformers_model import TransformersModel

# Prompt lengths that are timed, and after how many seconds no further one is begun.
_LENGTHS: Final = {"cpu": (16, 64, 256), "cuda": (64, 256, 1024, 4096)}
_BUDGET_S: Final = {"cpu": 0.1, "cuda": 0.5}

# Numbers of rows for which libraries choose kernels of different kinds.
_TOUCHED_ROWS: Final = (1, 16, 128, 1024)

_SAMPLING: Final = SamplingState(temperature=1.0, top_p=0.9)
# What a native model draws without its graphs.
_SPECIAL_SAMPLING: Final = SamplingState(temperature=1.0, top_p=0.9, num_logprobs=1, frequency_penalty=0.5)


def measure_prefill(runner: Runner, *, max_tokens: int, collective: Collective | None = None) -> tuple[tuple[int, float], ...]:
    """(prompt length, tokens per second), ascending, for lengths of at most max_tokens that fit into the pool.

    max_tokens leaves room for the token that is drawn. Afterwards the batch is empty and blocks hold leftovers, as free blocks do.
    collective: the ranks that compute together, and so must measure the same lengths; None for one alone
    """
    block_size, num_blocks = runner.kv_cache.block_size, runner.kv_cache.num_blocks
    device = torch.device(runner.batch.device).type
    lengths = _LENGTHS[device]
    longest = min(max_tokens, num_blocks * block_size)
    # A pool that takes what its GPU has left may be another rank's larger one.
    if not all_agree(collective, longest >= lengths[0]):
        return ()
    _prefill(runner, lengths[0])  # the first pass pays for what is loaded lazily
    speeds = []
    started_s = time.perf_counter()
    for length in lengths:
        if not all_agree(collective, length <= longest and time.perf_counter() - started_s <= _BUDGET_S[device]):
            break
        # The better of two: other processes of this host may take the first one's time.
        speeds.append((length, length / min(_prefill(runner, length), _prefill(runner, length))))
    return tuple(speeds)


def touch_decodes(runner: Runner, *, max_rows: int) -> None:
    """Decode batches of 1, 2, 4, ... and max_rows sequences, so that every kernel they need is compiled. The batch is empty afterwards."""
    if runner.batch.tokens.shape[1] < 2:
        return  # no room to draw
    counts = [1 << index for index in range(max_rows.bit_length()) if 1 << index < max_rows]
    for count in (*counts, max_rows):
        for sampling in (_SAMPLING, _SPECIAL_SAMPLING):
            _step(runner, num_prompts=count, length=1, num_tokens=count, sampling=sampling)


def touch_libraries(model: LlamaModel, *, max_tokens: int) -> None:
    """A layer's products and attention by torch, whose libraries take seconds to load when they are not in the page cache.

    For the time in which other processes compile the kernels, without which no step can run. max_tokens: of the largest step
    """
    device, dtype = model.weights.embedding.device, model.weights.embedding.dtype
    layer, longest = model.weights.layers[0], dense_attention.padded_size(dense_attention.MIN_TOKENS)
    for num_rows in _TOUCHED_ROWS:
        for weight in (layer.qkv, layer.output, layer.gate_up, layer.down, model.weights.head):
            model.weights.product(torch.zeros((num_rows, weight.shape[1]), dtype=dtype, device=device), weight)
    if longest <= max_tokens and dense_attention.is_supported(head_dim=model.config.head_dim, dtype=dtype, device=device):
        heads = [(longest, count, model.config.head_dim) for count in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]
        query, key, value = (torch.zeros(shape, dtype=dtype, device=device) for shape in heads)
        dense_attention.dense_attention(query, key, value, scale=model.scale)


def measure_step_bytes(
    model: "TransformersModel | LlamaModel",
    *,
    block_size: int,
    max_rows: int,
    max_tokens: int,
    max_model_len: int,
    dtype: torch.dtype,
    device: str,
) -> int:
    """What the largest step takes on the GPU beside weights and KV blocks: the batch's tensors, activations, logits.

    Seen in a step of max_tokens tokens of prompts and in one that draws for max_rows sequences.
    """
    length = max(1, min(max_tokens, max_model_len - 1))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kv_cache = KvCache(
        num_blocks=-(-length // block_size),  # all prompts write to the same ones: what comes out does not matter
        num_layers=model.folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        head_dim=model.folder.head_dim,
        dtype=dtype,
        device=device,
    )
    runner = Runner(model, kv_cache, rank=0, max_rows=max_rows, max_model_len=max_model_len, max_batched_tokens=max_tokens, device=device)
    _step(runner, num_prompts=min(max_rows, -(-max_tokens // length)), length=length, num_tokens=max_tokens)
    _step(runner, num_prompts=max_rows, length=1, num_tokens=max_rows)
    return torch.cuda.max_memory_allocated(device) - before - kv_cache.blocks.nbytes


def _prefill(runner: Runner, length: int) -> float:
    """Seconds that a prompt of `length` tokens takes, its first draw included."""
    return _step(runner, num_prompts=1, length=length, num_tokens=length)


def _step(runner: Runner, *, num_prompts: int, length: int, num_tokens: int, sampling: SamplingState = _SAMPLING) -> float:
    """Seconds that a step takes which computes prompts of `length` tokens, `num_tokens` in all, and draws for each."""
    num_blocks = -(-length // runner.kv_cache.block_size)
    adds, chunks = [], []
    for row in range(num_prompts):
        count = min(length, num_tokens - row * length)
        first = row * num_blocks
        block_ids = tuple((first + index) % runner.kv_cache.num_blocks for index in range(-(-count // runner.kv_cache.block_size)))
        adds.append(RowAdd(row, (0,) * count, count, 0, block_ids, 0, sampling))
        chunks.append(Chunk(row, 0, count, True))
    plan = StepPlan(0, 0, add_rows=tuple(adds), chunks=tuple(chunks), samples=tuple((row, row) for row in range(num_prompts)))
    started_s = time.perf_counter()
    runner.execute(plan)
    took_s = time.perf_counter() - started_s
    runner.batch.clear()
    return took_s
