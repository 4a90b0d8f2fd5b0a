"""The least of a scheduler: hand-written plans for a Runner, with blocks given out in random order."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from quire.common.messages import Chunk, RowAdd, SamplingState, StepAck, StepPlan, StepResult
from quire.worker.runner import Runner

GREEDY = SamplingState(temperature=0.0)

MakeRunner: TypeAlias = Callable[..., Runner]  # the fixture make_runner, whose every argument has a default


class PlanDriver:
    """Numbers the steps and gives out blocks; every step is followed by the batch's own check."""

    def __init__(self, runner: Runner, *, seed: int = 0) -> None:
        self.runner = runner
        self.block_size = runner.kv_cache.block_size
        self.free_blocks = random.Random(seed).sample(range(runner.kv_cache.num_blocks), runner.kv_cache.num_blocks)
        self.last_ack: StepAck | None = None
        self._step_id = 0

    def step(self, **fields: Any) -> StepResult:
        result, self.last_ack = self.runner.execute(StepPlan(1, self._step_id, **fields))
        assert (result.term, result.step_id) == (self.last_ack.term, self.last_ack.step_id) == (1, self._step_id)
        self._step_id += 1
        self.runner.batch.check()
        return result

    def blocks(self, num_tokens: int) -> tuple[int, ...]:
        """Blocks for so many tokens, never given out twice."""
        return tuple(self.free_blocks.pop() for _ in range(-(-num_tokens // self.block_size)))

    def add(self, row: int, prompt: Sequence[int], sampling: SamplingState = GREEDY, *, room: int = 0) -> RowAdd:
        """The RowAdd of a fresh prompt, with blocks for it and `room` tokens more."""
        return RowAdd(row, tuple(prompt), len(prompt), 0, self.blocks(len(prompt) + room), 0, sampling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_tokens: int,
        chunk: int,
        sampling: Sequence[SamplingState] | None = None,
        stagger: int = 0,
    ) -> list[list[int]]:
        """Run prompts to `num_tokens` tokens each, prompt i entering at step i * stagger, so that prefill and decode mix."""
        states = sampling or [GREEDY] * len(prompts)
        drawn: list[list[int]] = [[] for _ in prompts]
        computed = [0] * len(prompts)
        num_blocks = [0] * len(prompts)
        removals: list[int] = []
        step = 0
        while any(len(tokens) < num_tokens for tokens in drawn):
            adds, chunks, samples, grows, decoding = [], [], [], [], []
            for row, prompt in enumerate(prompts):
                if step < row * stagger or len(drawn[row]) == num_tokens:
                    continue
                if computed[row] < len(prompt):
                    if computed[row] == 0:
                        adds.append(self.add(row, prompt, states[row]))
                        num_blocks[row] = len(adds[-1].block_ids)
                    count = min(chunk, len(prompt) - computed[row])
                    is_last = computed[row] + count == len(prompt)
                    chunks.append(Chunk(row, computed[row], count, is_last))
                    computed[row] += count
                    samples += [row] if is_last else []
                    continue
                computed[row] += 1
                decoding.append(row)
                if computed[row] > num_blocks[row] * self.block_size:
                    grows.append((row, self.blocks(1)[0]))
                    num_blocks[row] += 1
            result = self.step(
                remove_rows=tuple(removals),
                add_rows=tuple(adds),
                grow_rows=tuple(row for row, _ in grows),
                grow_block_ids=tuple(block_id for _, block_id in grows),
                chunks=tuple(chunks),
                samples=tuple((row, row) for row in samples),
            )
            assert result.counts == (1,) * (len(samples) + len(decoding))
            for row, token_id in zip(samples + decoding, result.token_ids, strict=True):
                drawn[row].append(token_id)
            removals = [row for row in samples + decoding if len(drawn[row]) == num_tokens]
            step += 1
        self.step(remove_rows=tuple(removals))
        return drawn
