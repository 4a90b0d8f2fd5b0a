"""First steps of a rank before it says hello: code paths are touched once, and prefill is timed."""

import time
from typing import Final

from quire.common.messages import Chunk, RowAdd, SamplingState, StepPlan
from quire.worker.collectives import Collective, all_agree
from quire.worker.runner import Runner

_LENGTHS: Final = (16, 64, 256)
# No further length is begun after this long.
_BUDGET_S: Final = 0.1


def measure_prefill(runner: Runner, *, max_tokens: int, collective: Collective | None = None) -> tuple[tuple[int, float], ...]:
    """(prompt length, tokens per second), ascending, for lengths of at most max_tokens that fit into the pool.

    max_tokens leaves room for the token that is drawn. Afterwards the batch is empty and blocks hold leftovers, as free blocks do.
    collective: the ranks that compute together, and so must measure the same lengths; None for one alone
    """
    block_size, num_blocks = runner.kv_cache.block_size, runner.kv_cache.num_blocks
    longest = min(max_tokens, num_blocks * block_size)
    if longest < _LENGTHS[0]:
        return ()
    _prefill(runner, _LENGTHS[0])  # the first pass pays for what is loaded lazily
    speeds = []
    started_s = time.perf_counter()
    for length in _LENGTHS:
        if length > longest or not all_agree(collective, time.perf_counter() - started_s <= _BUDGET_S):
            break
        # The better of two: other processes of this host may take the first one's time.
        speeds.append((length, length / min(_prefill(runner, length), _prefill(runner, length))))
    return tuple(speeds)


def _prefill(runner: Runner, length: int) -> float:
    """Seconds that a prompt of `length` tokens takes, its first draw included."""
    block_ids = tuple(range(-(-length // runner.kv_cache.block_size)))
    added = RowAdd(0, (0,) * length, length, 0, block_ids, 0, SamplingState(temperature=1.0, top_p=0.9))
    started_s = time.perf_counter()
    runner.execute(StepPlan(0, 0, add_rows=(added,), chunks=(Chunk(0, 0, length, True),), samples=((0, 0),)))
    took_s = time.perf_counter() - started_s
    runner.batch.clear()
    return took_s
