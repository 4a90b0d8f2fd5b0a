"""What preemptions took from the other sequences: GPU time, read from a scheduler's journal."""

import bisect
import statistics
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

from quire.cluster.scheduler.journal import Header, read_journal
from quire.common.messages import (
    StepAck,
    StepPlan,
    StepResult,
    Submit,
    decode_rank_down,
    decode_rank_up,
    decode_session_down,
)

# How many steps that only decode a step is held against, and by which share of its sequences they may differ.
NUM_NEAR: Final = 8
NEAR_SHARE: Final = 0.125


@dataclass(frozen=True, slots=True)
class StolenTime:
    """Of one journal. Seconds are of the GPU, as the ranks report them."""

    num_recomputed_tokens: int
    num_swapped_tokens: int  # swapped in; blocks that were found again by their hash are not among them
    recompute_s: float
    swap_s: float
    num_held: int  # rows, summed over steps, that were held: for blocks that were being copied away, or for prompts' share of a step

    @property
    def us_per_token(self) -> float | None:
        """Microseconds per token that had to come back; None if none had."""
        num_tokens = self.num_recomputed_tokens + self.num_swapped_tokens
        return 1e6 * (self.recompute_s + self.swap_s) / num_tokens if num_tokens else None


@dataclass(slots=True)
class _Step:
    """What a step did besides decoding, and how long it took."""

    num_decoding: int
    num_new_tokens: int  # of prompts, for the first time
    num_again_tokens: int
    num_copies: int  # that ran beside it, or that it waited for
    device_s: float


def stolen_time(journal: BinaryIO, *, block_size: int) -> StolenTime:
    """Reads the journal of a scheduler with one group of one or more ranks.

    A step that computes prompts is longer than one that decodes as many sequences; the share of tokens that had been
    computed before is what recompute took. A step beside which copies ran is longer than one without; the mean per copy of
    steps that only decode, times all copies, is what swap took. Steps that are shorter by chance count against those that are
    longer by chance.

    Raises:
        ConfigError: it is no journal.
    """
    reader = _Reader(block_size)
    for record in read_journal(journal):
        if isinstance(record, Header):
            continue
        match record.kind:
            case "submit":
                reader.on_submit(decode_session_down(record.message))
            case "plan":
                reader.on_plan(decode_rank_down(record.message))
            case "apply" | "ack":
                reader.on_answer(decode_rank_up(record.message))
    return reader.result()


@dataclass(slots=True)
class _Reader:
    block_size: int
    plans: dict[int, StepPlan] = field(default_factory=dict)  # without their result
    steps: list[_Step] = field(default_factory=list)
    started: set[tuple[int, ...]] = field(default_factory=set)  # prompts that had a row since they were submitted
    rows_again: set[int] = field(default_factory=set)
    copies: dict[int, int] = field(default_factory=dict)  # those under way, with the first step that they run beside
    num_copies: int = 0
    num_swapped_blocks: int = 0
    held: set[int] = field(default_factory=set)  # rows
    num_held: int = 0

    def on_submit(self, message: Any) -> None:
        if isinstance(message, Submit):
            self.started.discard(message.prompt_ids)

    def on_plan(self, plan: StepPlan) -> None:
        self.plans[plan.step_id] = plan
        self.copies |= {copy[0]: plan.step_id for copy in plan.swap_in}
        self.copies |= {copy[0]: plan.step_id + 1 for copy in plan.swap_out}  # they start behind the forward
        self.num_copies += len(plan.swap_in) + len(plan.swap_out)
        self.num_swapped_blocks += len(plan.swap_in)
        self.held.difference_update(plan.remove_rows, (~row for row in plan.hold_rows))
        self.held.update(row for row in plan.hold_rows if row >= 0)
        self.num_held += len(self.held)

    def on_answer(self, message: Any) -> None:
        match message:
            case StepAck():
                for copy_id in message.copies_done:
                    self.copies.pop(copy_id, None)
            case StepResult() if message.step_id in self.plans:
                self._on_result(self.plans.pop(message.step_id), message)

    def _on_result(self, plan: StepPlan, result: StepResult) -> None:
        self.rows_again.difference_update(plan.remove_rows)
        for add in plan.add_rows:
            prompt = add.token_ids[: add.prompt_len]
            if prompt in self.started:
                self.rows_again.add(add.row)
            else:
                self.rows_again.discard(add.row)
            self.started.add(prompt)
        # A chunk of one token is how a swapped sequence joins the batch: the token that it would have decoded.
        again = sum(chunk.count for chunk in plan.chunks if chunk.row in self.rows_again and chunk.count > 1)
        new = sum(chunk.count for chunk in plan.chunks if chunk.row not in self.rows_again)
        num_joining = sum(chunk.row in self.rows_again and chunk.count == 1 for chunk in plan.chunks)
        num_decoding = len(result.counts) - len(plan.samples) + num_joining
        num_copies = sum(first_step <= plan.step_id for first_step in self.copies.values())
        self.steps.append(_Step(num_decoding, new, again, num_copies, result.device_s))

    def result(self) -> StolenTime:
        decode_s = _DecodeTimes(self.steps)
        recompute_s, excess_s, num_copies_beside = 0.0, 0.0, 0
        for number, step in enumerate(self.steps):
            longer_s = step.device_s - decode_s.of(step.num_decoding, number)
            num_tokens = step.num_new_tokens + step.num_again_tokens
            if num_tokens:
                recompute_s += longer_s * step.num_again_tokens / num_tokens
            elif step.num_copies:
                excess_s += longer_s
                num_copies_beside += step.num_copies
        return StolenTime(
            num_recomputed_tokens=sum(step.num_again_tokens for step in self.steps),
            num_swapped_tokens=self.num_swapped_blocks * self.block_size,
            recompute_s=max(0.0, recompute_s),
            swap_s=max(0.0, excess_s / num_copies_beside * self.num_copies) if num_copies_beside else 0.0,
            num_held=self.num_held,
        )


class _DecodeTimes:
    """How long a step takes that only decodes: the median of the nearest of those with about as many sequences.

    The nearest, since a step takes as long as its sequences have become: preemptions come when the pool is full, and the steps
    of a whole run have shorter contexts.
    """

    def __init__(self, steps: list[_Step]) -> None:
        pure = [
            (number, step)
            for number, step in enumerate(steps)
            if step.num_decoding and not (step.num_new_tokens or step.num_again_tokens or step.num_copies)
        ]
        self._numbers = [number for number, _ in pure]
        self._steps = [step for _, step in pure]

    def of(self, num_decoding: int, number: int) -> float:
        """number: of the step that is held against them, in the order of steps"""
        if not num_decoding or not self._steps:
            return 0.0
        place = bisect.bisect_left(self._numbers, number)
        # Outwards, by turns of whichever side is nearer.
        before, behind = place - 1, place
        near: list[float] = []
        tolerance = max(1.0, NEAR_SHARE * num_decoding)
        while len(near) < NUM_NEAR and (before >= 0 or behind < len(self._steps)):
            is_before = behind == len(self._steps) or (before >= 0 and number - self._numbers[before] <= self._numbers[behind] - number)
            step = self._steps[before if is_before else behind]
            before, behind = (before - 1, behind) if is_before else (before, behind + 1)
            if abs(step.num_decoding - num_decoding) <= tolerance:
                near.append(step.device_s)
        if not near:
            least = min(abs(step.num_decoding - num_decoding) for step in self._steps)
            near = [step.device_s for step in self._steps if abs(step.num_decoding - num_decoding) == least]
        return statistics.median(near)
