"""`quire bench scheduler`: the CPU time that the scheduler takes per sequence and step, and per admitted request.

Needs no model and no running server. Values are medians over rounds in which all loads take turns, so that a busy machine
slows all of them alike.
"""

import argparse
import contextlib
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from quire.bench.table import format_table

# Steps before the first that is measured: caches are warm and running means are known.
WARM_UP_STEPS: Final = 16
# What must not be exceeded, in microseconds per sequence and step, by running sequences (docs/DESIGN.md S10).
PURE_TARGETS_US: Final[Mapping[int, float]] = {256: 4.0, 1024: 6.0}
PROCESS_TARGETS_US: Final[Mapping[int, float]] = {256: 8.0}


@dataclass(frozen=True, slots=True)
class StepCost:
    """Steady decode from 1k tokens of context on. Microseconds of CPU per sequence and step."""

    running: int
    pure_us_per_sequence_step: float  # the Scheduler object alone: plan + apply
    process_us_per_sequence_step: float  # the scheduler process, with sockets, encoding and token delivery; ranks answer at once
    paced_process_us_per_sequence_step: float  # the same, but ranks take a step's time, and the process wakes up with cold caches


@dataclass(frozen=True, slots=True)
class AdmissionCost:
    """The Scheduler object with idle groups. Microseconds of CPU from a request's submission to the first plan with it."""

    groups: int
    us_per_admitted_request: float  # no two prompts begin alike
    us_per_admitted_request_with_shared_prefix: float  # all prompts begin alike, and every group has that cached


@dataclass(frozen=True, slots=True)
class SchedulerReport:
    steps: tuple[StepCost, ...]
    admission: tuple[AdmissionCost, ...]


def measure_scheduler(
    *, running: Sequence[int], groups: Sequence[int], num_steps: int, step_s: float, num_requests: int, num_rounds: int
) -> SchedulerReport:
    """num_steps and num_requests are those of each load and round; step_s is what a paced rank takes for one."""
    return SchedulerReport(
        steps=measure_steps(running, num_steps=num_steps, step_s=step_s, num_rounds=num_rounds),
        admission=measure_admission(groups, num_requests=num_requests, num_rounds=num_rounds),
    )


def measure_steps(running: Sequence[int], *, num_steps: int, step_s: float, num_rounds: int) -> tuple[StepCost, ...]:
    # The SDK's part of this package must not need what serves.
    from quire.bench.scheduler_alone import SteadyScheduler
    from quire.bench.scheduler_child import SteadyProcess
    from quire.bench.steady_decode import SteadyDecode

    with contextlib.ExitStack() as exits:
        measures: list[Callable[[int], float]] = []
        for num_running in running:
            load = SteadyDecode(num_running, num_steps=2 * (WARM_UP_STEPS + num_steps * num_rounds))
            alone, process = SteadyScheduler(load), exits.enter_context(SteadyProcess(load))
            measures += [alone.measure, process.measure, functools.partial(process.measure, step_s=step_s)]
        for measure in measures:
            measure(WARM_UP_STEPS)
        costs = _medians(measures, num_steps, num_rounds=num_rounds)
    return tuple(StepCost(*values) for values in zip(running, costs[::3], costs[1::3], costs[2::3], strict=True))


def measure_admission(groups: Sequence[int], *, num_requests: int, num_rounds: int) -> tuple[AdmissionCost, ...]:
    from quire.bench.scheduler_alone import AdmittingScheduler

    measures = [
        AdmittingScheduler(num_groups, shares_prefix=shares_prefix).measure for num_groups in groups for shares_prefix in (False, True)
    ]
    costs = _medians(measures, num_requests, num_rounds=num_rounds)
    return tuple(AdmissionCost(*values) for values in zip(groups, costs[::2], costs[1::2], strict=True))


def _medians(measures: Sequence[Callable[[int], float]], amount: int, *, num_rounds: int) -> list[float]:
    """Of each measure, over rounds."""
    rounds = [[measure(amount) for measure in measures] for _ in range(num_rounds)]
    return [statistics.median(values) for values in zip(*rounds, strict=True)]


def report_as_json(report: SchedulerReport) -> dict[str, Any]:
    return {
        "results": [asdict(cost) for cost in report.steps],
        "admission": [asdict(cost) for cost in report.admission],
    }


def report_as_text(report: SchedulerReport) -> str:
    """Two tables: the costs of steps beside what they may be, and those of admission."""
    steps = [
        (
            str(cost.running),
            f"{cost.pure_us_per_sequence_step:.2f}",
            _target(PURE_TARGETS_US, cost.running),
            f"{cost.process_us_per_sequence_step:.2f}",
            _target(PROCESS_TARGETS_US, cost.running),
            f"{cost.paced_process_us_per_sequence_step:.2f}",
        )
        for cost in report.steps
    ]
    admission = [
        (str(cost.groups), f"{cost.us_per_admitted_request:.1f}", f"{cost.us_per_admitted_request_with_shared_prefix:.1f}")
        for cost in report.admission
    ]
    return "\n\n".join(
        (
            "µs of CPU per sequence and step, steady decode from 1k tokens on",
            format_table(("running", "pure", "at most", "process", "at most", "paced"), steps),
            "µs of CPU per admitted request, from submission to its first plan, all groups idle",
            format_table(("groups", "no shared prefix", "prefix cached in every group"), admission),
        )
    )


def _target(targets_us: Mapping[int, float], num_running: int) -> str:
    return f"{targets_us[num_running]:.0f}" if num_running in targets_us else "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--running", type=_counts, default=(32, 256, 1024), help="running sequences, by comma (default 32,256,1024)")
    parser.add_argument("--groups", type=_counts, default=(10, 1000), help="attached groups, by comma (default 10,1000)")
    parser.add_argument("--steps", type=_count, default=64, help="steps of each load and round (default 64)")
    parser.add_argument("--step-time", type=_seconds, default=0.01, help="seconds that a paced rank takes for a step (default 0.01)")
    parser.add_argument("--requests", type=_count, default=32, help="admitted requests of each load and round (default 32)")
    parser.add_argument("--rounds", type=_count, default=5, help="rounds, of which the median counts (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = measure_scheduler(
        running=args.running,
        groups=args.groups,
        num_steps=args.steps,
        step_s=args.step_time,
        num_requests=args.requests,
        num_rounds=args.rounds,
    )
    print(json.dumps(report_as_json(report)) if args.json else report_as_text(report))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span of 0 s or more")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))
