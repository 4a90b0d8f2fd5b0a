"""What a GPU does between the steps of a trace."""

import gzip
import itertools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from quire.bench.percentile import percentile
from quire.common.errors import InternalError

_LAUNCHES: Final = ("cuda_runtime", "cuda_driver")


def read_trace(path: Path) -> dict[str, Any]:
    """A trace as worker/step_trace.py writes it."""
    with gzip.open(path, "rt") as file:
        trace: dict[str, Any] = json.load(file)
    return trace


def step_gaps(trace: Mapping[str, Any], *, step_name: str) -> dict[str, Any]:
    """The time in which no kernel ran between one step and the next, in microseconds; copies count as nothing running.

    A kernel belongs to the step in whose launch the host launched it, alone or as part of a graph: both have one correlation number.

    Raises:
        InternalError: there are no two steps with kernels.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = sorted((event for event in events if event.get("cat") == "user_annotation" and event["name"] == step_name), key=_start_us)
    launches = {event["args"]["correlation"]: event for event in events if event.get("cat") in _LAUNCHES}
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=_start_us)
    spans: dict[int, list[float]] = {}  # of each step, from its first kernel to its last
    for kernel in kernels:
        launch = launches.get(kernel["args"]["correlation"])
        if launch is None:
            continue
        number = next((number for number, step in enumerate(steps) if _start_us(step) <= _start_us(launch) <= _end_us(step)), None)
        if number is not None:
            span = spans.setdefault(number, [_start_us(kernel), 0.0])
            span[1] = max(span[1], _end_us(kernel))
    ordered = [spans[number] for number in sorted(spans)]
    if len(ordered) < 2:
        raise InternalError(f"of {len(steps)} traced steps {len(ordered)} have kernels, and {len(kernels)} kernels were seen")
    gaps_us, end_us = [], ordered[0][1]
    for start_us, last_us in ordered[1:]:
        gaps_us.append(max(0.0, start_us - end_us))
        end_us = max(end_us, last_us)
    between_us = [later[0] - sooner[0] for sooner, later in itertools.pairwise(ordered)]
    return {
        "steps": len(ordered),
        "kernels": len(kernels),
        "step_median_us": statistics.median(between_us),
        "gap_median_us": statistics.median(gaps_us),
        "gap_p99_us": percentile(gaps_us, 99),
        "gap_max_us": max(gaps_us),
        "busy_share": _busy_us(kernels, ordered[0][0], end_us) / (end_us - ordered[0][0]),
    }


def _busy_us(kernels: list[dict[str, Any]], start_us: float, end_us: float) -> float:
    """How long at least one kernel ran between two times. kernels: by their starts"""
    busy_us, until_us = 0.0, start_us
    for kernel in kernels:
        first_us, last_us = max(until_us, _start_us(kernel)), min(end_us, _end_us(kernel))
        if last_us > first_us:
            busy_us += last_us - first_us
            until_us = last_us
    return busy_us


def _start_us(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _end_us(event: Mapping[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])
