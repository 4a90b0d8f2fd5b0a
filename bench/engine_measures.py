"""What `quire bench engine` measures of a running engine, a function per workload; each returns what goes into the JSON."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from quire.bench.engine_cluster import Engine
from quire.bench.engine_run import RunMeter
from quire.bench.engine_workloads import Case, Request, azure_conv400, fit, fixed, mixed256
from quire.bench.percentile import percentile
from quire.bench.serve_requests import arrival_times
from quire.bench.step_gaps import read_trace, step_gaps
from quire.common.errors import ConfigError, InternalError
from quire.worker.rank_spec import TRACED_STEP

# The cost of a decode step is the difference between runs of so many tokens and of so few, by the steps between.
LONG_TOKENS: Final = 130
SHORT_TOKENS: Final = 2
# A prompt whose first token is waited for.
TTFT_PROMPT_TOKENS: Final = 128
# Requests that run before a workload of many is measured: kernels and caches have seen their kind.
NUM_WARM_UP: Final = 16
# Steps that all sequences decode together before the gaps between steps are traced, and what each may generate at most.
GAPS_AFTER_TOKENS: Final = 32
GAPS_TOKENS: Final = 512
# Requests of a load per caller of its closed loop.
LOAD_REQUESTS_PER_CALLER: Final = 3
# The open loop's share of what the last closed loop carried.
OPEN_LOOP_SHARE: Final = 0.7

LoadCase: TypeAlias = tuple[int, int, int]  # (callers, prompt tokens, tokens to generate)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A load in which each request arrives when it once did elsewhere."""

    prompt_tokens: int
    num_tokens: int  # to generate
    arrivals_s: tuple[float, ...]  # since the start, ascending


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    decode_cases: tuple[Case, ...] = ((1, 128), (1, 4096), (32, 1024), (128, 1024), (256, 1024))
    prefill_cases: tuple[Case, ...] = ((1, 8000), (8, 8000))
    repetitions: int = 2  # of decode, mixed256 and azure_conv400
    prefill_repetitions: int = 3
    ttft_repetitions: int = 10
    ttft_beside: int = 64  # sequences that decode beside
    gaps_case: Case = (64, 1024)  # a batch in steady decode and its context
    load_cases: tuple[LoadCase, ...] = ((64, 128, 128), (256, 128, 128))
    arrivals: tuple[Arrivals, ...] = ()  # loads instead of these cases
    num_requests: int | None = None  # of mixed256 and azure_conv400, from the front; None: all
    on_progress: Callable[[str], None] = field(default=lambda _: None)


def measure_decode(engine: Engine, settings: Settings) -> list[dict[str, Any]]:
    """Of each case the milliseconds of a step, by difference and by the gaps between steps in which all decode."""
    rows = []
    for case in settings.decode_cases:
        batch, context = case
        if batch > engine.plan.max_sequences:
            raise ConfigError(f"a decode case of {batch} sequences is more than max_sequences {engine.plan.max_sequences}; raise that")
        _check_length(engine, context, LONG_TOKENS)
        short, long = (fixed(case, num_tokens=count, vocab_size=engine.plan.folder.vocab_size) for count in (SHORT_TOKENS, LONG_TOKENS))
        engine.run(short)
        repetitions = []
        for _ in range(settings.repetitions):
            short_run, long_run = engine.run(short), engine.run(long)
            steady_s = long_run.steady_step_s()
            repetitions.append(
                {
                    "decode_ms": 1e3 * (long_run.total_s - short_run.total_s) / (LONG_TOKENS - SHORT_TOKENS),
                    "steady_step_ms": None if steady_s is None else 1e3 * steady_s,
                    "long_s": long_run.total_s,
                    "short_s": short_run.total_s,
                    "preemptions": long_run.num_preemptions + short_run.num_preemptions,
                    "cached_tokens": long_run.num_cached_tokens + short_run.num_cached_tokens,  # 0, or the cost is not the whole cost
                }
            )
        medians = {f"median_{name}": _median(repetition[name] for repetition in repetitions) for name in ("decode_ms", "steady_step_ms")}
        rows.append({"batch": batch, "context": context, **medians, "repetitions": repetitions})
        settings.on_progress(f"decode {batch} x {context}: {medians['median_decode_ms']:.2f} ms")
    return rows


def measure_prefill(engine: Engine, settings: Settings) -> list[dict[str, Any]]:
    """Prompt tokens per second, of prompts with one output token each."""
    rows = []
    for case in settings.prefill_cases:
        _check_length(engine, case[1], 1)
        requests = fixed(case, num_tokens=1, vocab_size=engine.plan.folder.vocab_size)
        engine.run(requests)
        times_s = [engine.run(requests).total_s for _ in range(settings.prefill_repetitions)]
        speeds = [case[0] * case[1] / time_s for time_s in times_s]
        row = {"prompts": case[0], "length": case[1], "best_tokens_per_s": max(speeds), "median_tokens_per_s": statistics.median(speeds)}
        rows.append({**row, "repetitions_s": times_s})
        settings.on_progress(f"prefill {case[0]} x {case[1]}: {row['median_tokens_per_s']:.0f} tokens/s")
    return rows


def measure_mixed256(engine: Engine, settings: Settings) -> dict[str, Any]:
    return _measure_many(engine, mixed256(engine.plan.folder.vocab_size), settings, name="mixed256")


def measure_azure_conv400(engine: Engine, settings: Settings) -> dict[str, Any]:
    return _measure_many(engine, azure_conv400(engine.plan.folder.vocab_size), settings, name="azure_conv400")


def _measure_many(engine: Engine, requests: Sequence[Request], settings: Settings, *, name: str) -> dict[str, Any]:
    """All at once, from the first submission to the last end."""
    fitted, num_shortened = fit(requests[: settings.num_requests], max_request_tokens=engine.max_request_tokens)
    engine.run(fitted[:NUM_WARM_UP])
    runs = []
    for _ in range(settings.repetitions):
        runs.append(run_as_dict(engine.run(fitted), fitted))
        settings.on_progress(f"{name}: {runs[-1]['total_s']:.2f} s")
    medians = {f"median_{key}": _median(run[key] for run in runs) for key in ("total_s", "output_tokens_per_s", "total_tokens_per_s")}
    return {"requests": len(fitted), "shortened": num_shortened, **medians, "repetitions": runs}


def run_as_dict(run: RunMeter, requests: Sequence[Request]) -> dict[str, Any]:
    """A run's numbers. itl: over all gaps between tokens of one request, in seconds."""
    num_prompt_tokens = sum(len(prompt) for prompt, _ in requests)
    gaps_s = [gap_s for request in run.requests for gap_s in request.gaps_s]
    firsts_s = [request.token_times_s[0] for request in run.requests if request.token_times_s]
    return {
        "total_s": run.total_s,
        "output_tokens": run.num_tokens,
        "prompt_tokens": num_prompt_tokens,
        "output_tokens_per_s": run.num_tokens / run.total_s,
        "total_tokens_per_s": (run.num_tokens + num_prompt_tokens) / run.total_s,
        "preemptions": run.num_preemptions,
        "cached_tokens": run.num_cached_tokens,  # after preemptions some are found again
        "ttft_p50_s": percentile(firsts_s, 50),
        "itl_p50_s": percentile(gaps_s, 50) if gaps_s else None,
        "itl_p99_s": percentile(gaps_s, 99) if gaps_s else None,
    }


def measure_ttft(engine: Engine, settings: Settings) -> dict[str, Any]:
    """Seconds to the first token of a prompt of 128 tokens: on an idle engine, and beside sequences that decode."""
    length = min(TTFT_PROMPT_TOKENS, engine.max_request_tokens // 2)
    vocab_size = engine.plan.folder.vocab_size
    one = fixed((1, length), num_tokens=SHORT_TOKENS, vocab_size=vocab_size)
    engine.run(one)
    idle_s = [engine.run(one).requests[0].token_times_s[0] for _ in range(settings.ttft_repetitions)]
    num_beside = min(settings.ttft_beside, engine.plan.max_sequences - 1)
    if num_beside < 1:
        raise ConfigError(f"max_sequences {engine.plan.max_sequences} leaves no room for decodes beside a prompt; give 2 at least")
    background = fixed((num_beside, length), num_tokens=engine.max_request_tokens - length, vocab_size=vocab_size)
    decoding = engine.begin(background)
    number = engine.num_runs
    engine.read_until(lambda: any(rows == num_beside for _, rows in decoding.steps) or not decoding.num_unfinished)
    beside_s, least_beside = [], num_beside
    for _ in range(settings.ttft_repetitions):
        run = engine.run(one)
        beside_s.append(run.requests[0].token_times_s[0])
        least_beside = min(least_beside, min((max(0, rows - 1) for at_s, rows in run.steps if at_s == beside_s[-1]), default=0))
    engine.cancel_run(number, num_beside)
    result: dict[str, Any] = {
        "prompt_tokens": length,
        "idle_median_s": statistics.median(idle_s),
        "beside_median_s": statistics.median(beside_s),
        "beside": num_beside,
        "least_beside": least_beside,  # of the steps that brought a first token; less than `beside` where decodes had ended
        "idle_repetitions_s": idle_s,
        "beside_repetitions_s": beside_s,
    }
    settings.on_progress(f"ttft: {1e3 * result['idle_median_s']:.1f} ms idle, {1e3 * result['beside_median_s']:.1f} ms beside {num_beside}")
    return result


def measure_load(engine: Engine, settings: Settings) -> list[dict[str, Any]]:
    """What `quire bench serve` measures through the edge, of the engine alone: a row per closed loop, and one of an open loop at
    OPEN_LOOP_SHARE of what the last closed loop carried. If there are arrivals, a row for each of those instead."""
    rows: list[dict[str, Any]] = []
    for load in settings.arrivals:
        _check_length(engine, load.prompt_tokens, load.num_tokens)
        case = len(load.arrivals_s), load.prompt_tokens
        requests = fixed(case, num_tokens=load.num_tokens, vocab_size=engine.plan.folder.vocab_size)
        engine.run(requests[:NUM_WARM_UP])
        run = engine.run_load(requests, arrivals_s=load.arrivals_s)
        rows.append({"callers": None, "rate_per_s": None, **_load_row(run, requests)})
        settings.on_progress(f"load of {len(requests)} arrivals: {rows[-1]['output_tokens_per_s']:.0f} tokens/s")
    if rows:
        return rows
    for callers, prompt_tokens, num_tokens in settings.load_cases:
        _check_length(engine, prompt_tokens, num_tokens)
        num_requests = settings.num_requests or LOAD_REQUESTS_PER_CALLER * callers
        requests = fixed((num_requests, prompt_tokens), num_tokens=num_tokens, vocab_size=engine.plan.folder.vocab_size)
        engine.run(requests[:NUM_WARM_UP])
        run = engine.run_load(requests, concurrency=callers)
        rows.append({"callers": callers, "rate_per_s": None, **_load_row(run, requests)})
        settings.on_progress(f"load of {callers} callers: {rows[-1]['output_tokens_per_s']:.0f} tokens/s")
    rate_per_s = OPEN_LOOP_SHARE * rows[-1]["requests"] / rows[-1]["total_s"]
    run = engine.run_load(requests, arrivals_s=arrival_times(len(requests), rate_per_s=rate_per_s))
    rows.append({"callers": None, "rate_per_s": rate_per_s, **_load_row(run, requests)})
    settings.on_progress(f"load of {rate_per_s:.1f} requests/s: {rows[-1]['output_tokens_per_s']:.0f} tokens/s")
    return rows


def _load_row(run: RunMeter, requests: Sequence[Request]) -> dict[str, Any]:
    times: dict[str, list[float]] = {
        "ttft": [request.ttft_s for request in run.requests if request.ttft_s is not None],
        "tpot": [request.tpot_s for request in run.requests if request.tpot_s is not None],
        "itl": [gap_s for request in run.requests for gap_s in request.gaps_s],
    }
    numbers = {
        f"{name}_p{share}_ms": 1e3 * percentile(values, share) if values else None for name, values in times.items() for share in (50, 99)
    }
    return {
        "requests": len(requests),
        "prompt_tokens": len(requests[0][0]),
        "tokens": requests[0][1],
        "total_s": run.total_s,
        "output_tokens_per_s": run.num_tokens / run.total_s,
        **numbers,
    }


def measure_gaps(engine: Engine, settings: Settings) -> dict[str, Any]:
    """How long the GPU runs no kernel between steps of steady decode, by a trace of rank 0."""
    batch, context = settings.gaps_case
    if batch > engine.plan.max_sequences:
        raise ConfigError(f"gaps between steps of {batch} sequences need max_sequences {batch}, which is {engine.plan.max_sequences}")
    _check_length(engine, context, GAPS_TOKENS)
    meter = engine.begin(fixed(settings.gaps_case, num_tokens=GAPS_TOKENS, vocab_size=engine.plan.folder.vocab_size))
    engine.read_until(lambda: all(len(request.token_times_s) >= GAPS_AFTER_TOKENS for request in meter.requests))
    path = engine.trace()
    num_left = meter.num_unfinished
    engine.cancel_run(engine.num_runs, batch)
    if num_left < batch:
        raise InternalError(f"{batch - num_left} of {batch} sequences ended before {path} was written, so its steps are not all alike")
    result = {"batch": batch, "context": context, **step_gaps(read_trace(path), step_name=TRACED_STEP), "trace": path.name}
    settings.on_progress(f"gaps: {result['gap_median_us']:.1f} us, {result['gap_max_us']:.1f} at most")
    return result


MEASURES: Final[Mapping[str, Callable[[Engine, Settings], Any]]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "mixed256": measure_mixed256,
    "azure_conv400": measure_azure_conv400,
    "ttft": measure_ttft,
    "load": measure_load,
    "gaps": measure_gaps,
}


def _check_length(engine: Engine, num_prompt_tokens: int, num_tokens: int) -> None:
    if num_prompt_tokens + num_tokens > engine.max_request_tokens:
        raise ConfigError(
            f"a case of {num_prompt_tokens} prompt tokens and {num_tokens} to generate is longer than the {engine.max_request_tokens} "
            "tokens that a request may have here; leave it out, or raise max_model_len or gpu_blocks"
        )


def _median(values: Any) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
