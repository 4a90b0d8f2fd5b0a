"""The benchmark of the scheduler measures what it says, on loads too small to say anything about speed."""

import json
import os
import signal
import time

import pytest
from fake_ranks import FakeRank
from quire_command import quire

from quire.bench.echo_rank import ECHO_TOKEN_ID, EchoRank
from quire.bench.process_cpu import process_cpu_s
from quire.bench.scheduler_alone import NUM_SHARED_TOKENS, AdmittingScheduler
from quire.bench.scheduler_child import SteadyProcess
from quire.bench.scheduler_feed import submit
from quire.bench.scheduler_load import AdmissionCost, SchedulerReport, StepCost, report_as_text
from quire.bench.steady_decode import SteadyDecode
from quire.cli import main
from quire.common.errors import InternalError
from quire.common.messages import Chunk, RowAdd, SamplingState, StepPlan

TINY = ("--running", "1,5", "--groups", "1,3", "--steps", "3", "--step-time", "0.001", "--requests", "2", "--rounds", "2")


def test_the_report_has_every_load_with_its_costs() -> None:
    done = quire("bench", "scheduler", *TINY, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    costs_of_steps = {"pure_us_per_sequence_step", "process_us_per_sequence_step", "paced_process_us_per_sequence_step"}
    costs_of_admission = {"us_per_admitted_request", "us_per_admitted_request_with_shared_prefix"}
    assert report.keys() == {"results", "admission"}
    assert [entry["running"] for entry in report["results"]] == [1, 5]
    assert [entry["groups"] for entry in report["admission"]] == [1, 3]
    assert all(entry.keys() == {"running", *costs_of_steps} for entry in report["results"])
    assert all(entry.keys() == {"groups", *costs_of_admission} for entry in report["admission"])
    assert all(value > 0 for entry in report["results"] + report["admission"] for value in entry.values())


def test_the_text_shows_targets_beside_values() -> None:
    report = SchedulerReport((StepCost(32, 1.0, 3.5, 5.0), StepCost(256, 0.5, 1.25, 2.0)), (AdmissionCost(10, 95.0, 108.125),))
    assert report_as_text(report).splitlines() == [
        "µs of CPU per sequence and step, steady decode from 1k tokens on",
        "",
        "running  pure  at most  process  at most  paced",
        "-------  ----  -------  -------  -------  -----",
        "     32  1.00        -     3.50        -   5.00",
        "    256  0.50        4     1.25        8   2.00",
        "",
        "µs of CPU per admitted request, from submission to its first plan, all groups idle",
        "",
        "groups  no shared prefix  prefix cached in every group",
        "------  ----------------  ----------------------------",
        "    10              95.0                         108.1",
    ]


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--running", "32,0", "'0' is not a number from 1 on"),
        ("--groups", "10,", "'' is not a number from 1 on"),
        ("--steps", "x", "'x' is not a number from 1 on"),
        ("--step-time", "nan", "'nan' is not a span of 0 s or more"),
    ],
)
def test_a_load_of_nothing_is_refused(flag: str, value: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["bench", "scheduler", flag, value])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def add(row: int) -> RowAdd:
    return RowAdd(row, (1, 2, 3), 3, 0, (row,), 0, SamplingState())


def test_an_echo_rank_gives_as_many_tokens_as_a_rank_that_computes() -> None:
    plans = [
        StepPlan(1, 0, add_rows=(add(0), add(1)), chunks=(Chunk(0, 0, 3, True), Chunk(1, 0, 2, False)), samples=((0, 0),)),
        StepPlan(1, 1, chunks=(Chunk(1, 2, 1, True),), samples=((1, 1),)),
        StepPlan(1, 2),
        StepPlan(1, 3, hold_rows=(0,)),
        StepPlan(1, 4, forks=((1, 2, 1),), cow=((2, 1, 2),)),
        StepPlan(1, 5, hold_rows=(~0,), remove_rows=(1,)),
        StepPlan(1, 6, remove_rows=(0, 2)),
    ]
    echo, rank = EchoRank(), FakeRank(block_size=16, num_blocks=4)
    counts = []
    for plan in plans:
        result, ack = echo.execute(plan)
        expected, expected_ack = rank.execute(plan)
        assert (result.step_id, result.counts, ack) == (expected.step_id, expected.counts, expected_ack)
        assert result.token_ids == (ECHO_TOKEN_ID,) * len(result.counts)
        counts.append(echo.num_samples)
    assert counts == [1, 2, 2, 1, 2, 2, 0]


def test_requests_differ_behind_what_they_share() -> None:
    first, second = (submit(number, num_prompt_tokens=100, max_tokens=1, num_shared_tokens=40) for number in (1, 2))
    assert first.prompt_ids[:40] == second.prompt_ids[:40]
    assert len(first.prompt_ids) == len(second.prompt_ids) == 100
    assert [a == b for a, b in zip(first.block_hashes, second.block_hashes, strict=True)] == [True, True, False, False, False, False]
    assert first == submit(1, num_prompt_tokens=100, max_tokens=1, num_shared_tokens=40)


def test_a_shared_prefix_is_cached_in_every_group_before_admission_is_measured() -> None:
    admitting = AdmittingScheduler(3, shares_prefix=True)
    groups = admitting._scheduler.groups.values()
    hashes = submit(99, num_prompt_tokens=1000, max_tokens=1, num_shared_tokens=NUM_SHARED_TOKENS).block_hashes
    assert [len(group.pool.find(hashes)) * group.pool.block_size for group in groups] == [NUM_SHARED_TOKENS] * 3
    assert [len(group.running) for group in groups] == [0] * 3


def test_a_scheduler_that_dies_is_named_not_waited_for() -> None:
    with SteadyProcess(SteadyDecode(2, num_steps=20)) as process:
        assert process.measure(3) > 0
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(InternalError, match="the scheduler process ended with code -9"):
            process.measure(3)


def test_the_clock_of_a_process_is_its_cpu_time() -> None:
    before_s, mine_s = process_cpu_s(os.getpid()), time.process_time()
    assert mine_s <= process_cpu_s(os.getpid())
    assert before_s <= mine_s
    with pytest.raises(ProcessLookupError):
        process_cpu_s(2**22 + 1)  # above every process id of Linux
