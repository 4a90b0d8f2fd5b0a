"""The least that drives a Runner: continuous batching of greedy requests in arrival order, with blocks for each request up front."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.common.messages import Chunk, RowAdd, SamplingState, StepPlan
from quire.worker.runner import Runner

_GREEDY = SamplingState(temperature=0.0)


@dataclass(slots=True)
class _Running:
    index: int  # of the request
    row: int
    prompt: Sequence[int]
    num_tokens: int
    block_ids: tuple[int, ...]
    num_computed: int = 0
    token_ids: list[int] = field(default_factory=list)


def run_requests(
    runner: Runner, requests: Sequence[tuple[Sequence[int], int]], *, max_rows: int, max_batched_tokens: int
) -> list[list[int]]:
    """The completions of (prompt, number of tokens to generate); decodes go first, prompts take what is left of each step's tokens.

    The pool must hold max_rows of the longest requests.
    """
    block_size = runner.kv_cache.block_size
    free_blocks = list(range(runner.kv_cache.num_blocks))
    free_rows = list(range(max_rows))
    waiting = deque(enumerate(requests))
    prefilling: deque[_Running] = deque()
    decoding: dict[int, _Running] = {}
    completions: list[list[int]] = [[] for _ in requests]
    removed: list[int] = []
    step_id = 0
    while waiting or prefilling or decoding or removed:
        budget = max_batched_tokens - len(decoding)
        adds: list[RowAdd] = []
        chunks: list[Chunk] = []
        ended: list[_Running] = []
        while budget > 0 and (prefilling or (waiting and free_rows)):
            if not prefilling:
                index, (prompt, num_tokens) = waiting.popleft()
                num_blocks = -(-(len(prompt) + num_tokens) // block_size)
                block_ids = tuple(free_blocks.pop() for _ in range(num_blocks))
                prefilling.append(_Running(index, free_rows.pop(), prompt, num_tokens, block_ids))
                adds.append(RowAdd(prefilling[0].row, tuple(prompt), len(prompt), 0, block_ids, 0, _GREEDY))
            first = prefilling[0]
            count = min(budget, len(first.prompt) - first.num_computed)
            is_last = first.num_computed + count == len(first.prompt)
            chunks.append(Chunk(first.row, first.num_computed, count, is_last))
            first.num_computed += count
            budget -= count
            if is_last:
                ended.append(prefilling.popleft())
        result, _ = runner.execute(
            StepPlan(
                term=0,
                step_id=step_id,
                add_rows=tuple(adds),
                remove_rows=tuple(removed),
                chunks=tuple(chunks),
                samples=tuple((each.row, each.row) for each in ended),
            )
        )
        step_id += 1
        drawn = [*ended, *(decoding[row] for row in sorted(decoding))]
        decoding |= {each.row: each for each in ended}
        removed = []
        for each, token_id in zip(drawn, result.token_ids, strict=True):
            each.token_ids.append(token_id)
            if len(each.token_ids) == each.num_tokens:
                completions[each.index] = each.token_ids
                removed.append(each.row)
                del decoding[each.row]
                free_rows.append(each.row)
                free_blocks.extend(each.block_ids)
    return completions
