import io
from dataclasses import asdict
from typing import Any

import msgspec
import pytest

from quire.bench.stolen_time import StolenTime, stolen_time
from quire.cluster.scheduler.journal import JOURNAL_VERSION, Header, Input
from quire.cluster.scheduler.scheduler import SchedulerConfig
from quire.common.messages import Chunk, RowAdd, SamplingState, StepAck, StepPlan, StepResult, encode

BLOCK_SIZE = 16
PROMPT = tuple(range(40))


class Journal:
    """A journal, step by step."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._put(Header(JOURNAL_VERSION, asdict(SchedulerConfig("test"))))

    def step(self, plan: StepPlan, device_s: float, *, num_decoding: int = 0, copies_done: tuple[int, ...] = ()) -> None:
        """A plan, its result with so many decoded tokens, its acknowledgement."""
        count = len(plan.samples) + num_decoding
        self._record("plan", plan)
        self._record("apply", StepResult(1, plan.step_id, (1,) * count, (5,) * count, device_s=device_s))
        self._record("ack", StepAck(1, plan.step_id, 0, copies_done))

    def stolen(self) -> StolenTime:
        self._file.seek(0)
        return stolen_time(self._file, block_size=BLOCK_SIZE)

    def _record(self, kind: str, message: msgspec.Struct) -> None:
        self._put(Input(kind, 1.0, b"g", encode(message)))

    def _put(self, record: msgspec.Struct) -> None:
        frame = encode(record)
        self._file.write(len(frame).to_bytes(4, "little") + frame)


def add(row: int, *generated: int, num_computed: int = 0) -> RowAdd:
    return RowAdd(row, (*PROMPT, *generated), len(PROMPT), num_computed, (0, 1, 2), 0, SamplingState())


def near(seconds: float) -> Any:
    return pytest.approx(seconds)


def test_recompute_takes_what_a_step_is_longer_by_and_prompts_that_are_new_take_nothing() -> None:
    journal = Journal()
    journal.step(StepPlan(1, 0, add_rows=(add(0),), chunks=(Chunk(0, 0, 40, True),), samples=((0, 0),)), 0.9)
    journal.step(StepPlan(1, 1), 0.010, num_decoding=1)
    again = StepPlan(1, 2, remove_rows=(0,), add_rows=(add(1, 5, 5),), chunks=(Chunk(1, 0, 42, True),), samples=((1, 1),))
    journal.step(again, 0.052, num_decoding=1)
    assert journal.stolen() == StolenTime(42, 0, recompute_s=near(0.042), swap_s=0.0, num_held=0)
    assert journal.stolen().us_per_token == pytest.approx(1000.0)


def test_a_step_shares_its_length_out_over_new_tokens_and_those_that_came_back() -> None:
    journal = Journal()
    journal.step(StepPlan(1, 0, add_rows=(add(0),), chunks=(Chunk(0, 0, 40, True),), samples=((0, 0),)), 0.9)
    other = RowAdd(2, tuple(range(100, 130)), 30, 0, (4, 5), 0, SamplingState())
    chunks = (Chunk(1, 0, 10, False), Chunk(2, 0, 30, True))
    journal.step(StepPlan(1, 1, remove_rows=(0,), add_rows=(add(1), other), chunks=chunks, samples=((2, 2),)), 0.040)
    assert journal.stolen() == StolenTime(10, 0, recompute_s=near(0.010), swap_s=0.0, num_held=0)


def test_swap_takes_what_steps_beside_its_copies_are_longer_by() -> None:
    journal = Journal()
    journal.step(StepPlan(1, 0, add_rows=(add(0),), chunks=(Chunk(0, 0, 40, True),), samples=((0, 0),)), 0.9)
    journal.step(StepPlan(1, 1), 0.010, num_decoding=4)
    # Copies out start behind the forward of their plan: the next step is the one beside them.
    journal.step(StepPlan(1, 2, remove_rows=(0,), swap_out=((1, 0, 0), (2, 1, 1))), 0.010, num_decoding=4)
    journal.step(StepPlan(1, 3), 0.014, num_decoding=4, copies_done=(1, 2))
    journal.step(StepPlan(1, 4, swap_in=((3, 0, 0), (4, 1, 1))), 0.012, num_decoding=4, copies_done=(3, 4))
    # It joins by the one token that it would have decoded, which is no recompute.
    joins = StepPlan(1, 5, add_rows=(add(7, 5, num_computed=40),), chunks=(Chunk(7, 40, 1, True),), samples=((7, 7),))
    journal.step(joins, 0.011, num_decoding=4)
    stolen = journal.stolen()
    # 4 and 2 ms over 2 and 2 copies, 4 copies in all.
    assert stolen == StolenTime(0, 2 * BLOCK_SIZE, recompute_s=0.0, swap_s=near(0.006), num_held=0)


def test_a_step_is_held_against_those_of_its_time_and_chance_evens_out() -> None:
    """Contexts grow, so steps do; copies come late, and each other one is beside a step that happens to be shorter than most."""
    journal = Journal()
    journal.step(StepPlan(1, 0, add_rows=(add(0),), chunks=(Chunk(0, 0, 40, True),), samples=((0, 0),)), 0.9)
    for step_id in range(1, 101):
        journal.step(StepPlan(1, step_id), 0.010 + 1e-4 * step_id, num_decoding=4)
    for step_id in range(101, 141, 4):
        by_chance_s = 0.0005 if step_id % 8 == 5 else -0.0005
        copies = ((2 * step_id, 0, 0),)
        journal.step(StepPlan(1, step_id, swap_in=copies), 0.020 + by_chance_s, num_decoding=4, copies_done=(2 * step_id,))
        for later in range(1, 4):
            journal.step(StepPlan(1, step_id + later), 0.020, num_decoding=4)
    assert journal.stolen().swap_s == pytest.approx(0.0, abs=1e-4)


def test_a_row_counts_in_each_step_in_which_it_is_held() -> None:
    journal = Journal()
    journal.step(StepPlan(1, 0, add_rows=(add(0), add(1)), chunks=(Chunk(0, 0, 40, True),), samples=((0, 0),)), 0.9)
    journal.step(StepPlan(1, 1, hold_rows=(0, 1)), 0.010)
    journal.step(StepPlan(1, 2), 0.010)
    journal.step(StepPlan(1, 3, hold_rows=(~0,)), 0.010, num_decoding=1)
    journal.step(StepPlan(1, 4, remove_rows=(1,)), 0.010, num_decoding=1)
    assert journal.stolen().num_held == 2 + 2 + 1


def test_without_preemptions_nothing_is_stolen() -> None:
    journal = Journal()
    journal.step(StepPlan(1, 0, add_rows=(add(0),), chunks=(Chunk(0, 0, 40, True),), samples=((0, 0),)), 0.9)
    journal.step(StepPlan(1, 1), 0.010, num_decoding=1)
    assert journal.stolen().us_per_token is None
