"""Workload `swap` of `quire bench engine`: what preemption costs, by swap, by recompute and as the scheduler chooses.

The same requests run on a pool that is too small for them, under each policy, and on one that is not, as few at once as the small one
holds half of the time, so that prompts are computed beside as many others as there. Each has an engine of its own.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from quire.bench.engine_cluster import Engine
from quire.bench.engine_measures import Settings
from quire.bench.engine_run import RunMeter
from quire.bench.engine_workloads import Request, fit, fixed, mixed256
from quire.bench.percentile import percentile
from quire.bench.stolen_time import StolenTime, stolen_time
from quire.common.config import ModelPlan

# The pool when nobody says: 16,000 tokens, an eighth of what the requests grow to.
SMALL_POOL_BLOCKS: Final = 1000
NUM_REQUESTS: Final = 96
POLICIES: Final = ("swap", "recompute", "auto")
LARGE: Final = "large pool, as few at once"


def measure_swap(
    plan: ModelPlan,
    settings: Settings,
    *,
    log_folder: Path | None,
    start_timeout_s: float,
    num_requests: int | None,
    repetitions: int,
) -> dict[str, Any]:
    """The first requests of mixed256. On a GPU the large pool is all that is free there, which may still preempt: see its row."""
    num_blocks = plan.num_gpu_blocks or SMALL_POOL_BLOCKS
    small = replace(plan, num_gpu_blocks=num_blocks, num_cpu_blocks=max(plan.num_cpu_blocks, num_blocks))
    max_request_tokens = min(plan.max_model_len, num_blocks * plan.block_size)
    requests, num_shortened = fit(mixed256(plan.folder.vocab_size)[: num_requests or NUM_REQUESTS], max_request_tokens=max_request_tokens)
    num_needed = sum(-(-(len(prompt) + count) // plan.block_size) for prompt, count in requests)
    large = replace(plan, num_gpu_blocks=None if plan.device == "cuda" else num_needed, preemption="recompute")
    runs: dict[str, dict[str, Any]] = {}
    for name in (*POLICIES, LARGE):
        if name == LARGE:
            run_plan = replace(large, max_sequences=max(1, round(runs["swap"]["median_running"])))
        else:
            run_plan = replace(small, preemption=name)
        logs = None if log_folder is None else log_folder / name.replace(" ", "-")
        runs[name] = measure_policy(run_plan, requests, logs=logs, start_timeout_s=start_timeout_s, repetitions=repetitions)
        run = runs[name]
        settings.on_progress(f"{name}: {run['median_total_s']:.2f} s, {run['preemptions']} preemptions")
    stolen = {policy: runs[policy]["stolen_us_per_token"] for policy in POLICIES}
    return {
        "requests": len(requests),
        "shortened": num_shortened,
        "needed_blocks": num_needed,
        "stolen_swap_by_recompute": _ratio(stolen["swap"], stolen["recompute"]),
        "auto_by_better": _ratio(runs["auto"]["median_total_s"], min(runs[policy]["median_total_s"] for policy in ("swap", "recompute"))),
        "spared_itl_p99_by_large_pool": {
            policy: _ratio(runs[policy]["spared_itl_p99_ms"], runs[LARGE]["spared_itl_p99_ms"]) for policy in POLICIES
        },
        "runs": runs,
    }


def measure_policy(
    plan: ModelPlan, requests: list[Request], *, logs: Path | None, start_timeout_s: float, repetitions: int
) -> dict[str, Any]:
    """An engine that runs by this plan, and what its preemptions took. Its scheduler writes a journal meanwhile, which stays in `logs`."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        journal = (logs or Path(folder)) / "journal"
        with Engine(plan, log_folder=logs, journal=journal, start_timeout_s=start_timeout_s) as engine:
            ready = engine.ready
            assert ready is not None, "an engine that was entered is ready"
            length = min(128, engine.max_request_tokens // 2)
            engine.run(fixed((1, length), num_tokens=8, vocab_size=plan.folder.vocab_size))
            runs = [engine.run(requests) for _ in range(repetitions)]
        with journal.open("rb") as file:
            stolen = stolen_time(file, block_size=plan.block_size)
    return {"gpu_blocks": ready.num_gpu_blocks, "swap_blocks": ready.num_cpu_blocks, **_numbers(runs, stolen)}


def _numbers(runs: list[RunMeter], stolen: StolenTime) -> dict[str, Any]:
    spared = [request for run in runs for request in run.requests if not request.num_preemptions]
    gaps_s = [gap_s for request in spared for gap_s in request.gaps_s]
    return {
        "median_total_s": statistics.median(run.total_s for run in runs),
        "total_s": [run.total_s for run in runs],
        "preemptions": sum(run.num_preemptions for run in runs),
        "spared_requests": len(spared),
        "median_running": statistics.median(count for run in runs for _, count in run.steps if count),  # of steps
        "spared_itl_p99_ms": 1e3 * percentile(gaps_s, 99) if gaps_s else None,
        "held": stolen.num_held,  # rows x steps
        "recomputed_tokens": stolen.num_recomputed_tokens,
        "swapped_tokens": stolen.num_swapped_tokens,
        "stolen_recompute_s": stolen.recompute_s,
        "stolen_swap_s": stolen.swap_s,
        "stolen_us_per_token": stolen.us_per_token,
    }


def _ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
