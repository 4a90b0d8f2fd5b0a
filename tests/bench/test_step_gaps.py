from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quire.bench.engine_cluster import Engine
from quire.bench.engine_run import RunMeter
from quire.bench.engine_workloads import fixed
from quire.bench.step_gaps import read_trace, step_gaps
from quire.common.config import plan_model, resolve_config
from quire.common.errors import InternalError
from quire.worker.rank_spec import TRACED_STEP


def event(category: str, name: str, start_us: float, length_us: float, correlation: int | None = None) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start_us, "dur": length_us, "args": {"correlation": correlation}}


def launched(step: int, *kernels_us: tuple[float, float]) -> list[dict[str, Any]]:
    """A step that the host launches as a graph a tenth of a millisecond after the one before."""
    at_us = 100.0 * step
    host = [event("user_annotation", TRACED_STEP, at_us, 50.0), event("cuda_runtime", "cudaGraphLaunch", at_us + 10, 5.0, step)]
    return host + [event("kernel", "k", start_us, length_us, step) for start_us, length_us in kernels_us]


def test_gaps_are_from_the_last_kernel_of_a_step_to_the_first_of_the_next() -> None:
    events = [
        *launched(0, (1000.0, 50.0), (1060.0, 100.0)),
        *launched(1, (1180.0, 80.0), (1200.0, 100.0)),  # 20 after; two streams at once
        *launched(2, (1290.0, 10.0)),  # began before the other had ended
        *launched(3, (1340.0, 60.0)),  # 40 after the last of all
        event("kernel", "of no step", 2000.0, 1.0, 99),
        event("gpu_memcpy", "copy", 1165.0, 10.0, 1),  # a copy is no kernel
        {"ph": "M", "name": "process_name"},
    ]
    gaps = step_gaps({"traceEvents": events}, step_name=TRACED_STEP)
    assert (gaps["steps"], gaps["gap_median_us"], gaps["gap_max_us"]) == (4, 20.0, 40.0)
    assert gaps["step_median_us"] == 110.0
    assert gaps["busy_share"] == pytest.approx((50 + 100 + 120 + 60) / 400)


def test_a_trace_without_kernels_says_so() -> None:
    with pytest.raises(InternalError, match="of 1 traced steps 0 have kernels, and 0 kernels were seen"):
        step_gaps({"traceEvents": launched(0)}, step_name=TRACED_STEP)


def test_a_rank_traces_so_many_steps_whenever_it_is_asked_and_goes_on(tmp_path: Path) -> None:
    plan = plan_model(resolve_config({"device": "cpu", "num_threads": 1, "max_model_len": 512}, environ={}).models[0])

    def have_begun(meter: RunMeter) -> bool:
        return all(len(request.token_times_s) >= 4 for request in meter.requests)

    def have_ended(meter: RunMeter) -> bool:
        return not meter.num_unfinished

    with Engine(plan, log_folder=tmp_path) as engine:
        for _ in range(2):
            meter = engine.begin(fixed((3, 20), num_tokens=450, vocab_size=plan.folder.vocab_size))
            engine.read_until(partial(have_begun, meter))
            path = engine.trace()
            engine.read_until(partial(have_ended, meter))
            assert [len(request.token_times_s) for request in meter.requests] == [450] * 3
            named = [event for event in read_trace(path)["traceEvents"] if event["name"] == TRACED_STEP]
            assert sum(event["cat"] == "user_annotation" for event in named) == 24
