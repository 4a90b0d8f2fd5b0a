"""The requests of `quire bench serve`: the same ones each time, made from seeds, for every client process alike."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from quire.bench.engine_workloads import azure_conv400, fit, fixed

# Seeds of arrivals and of what else is drawn.
ARRIVAL_SEED: Final = 3


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A load. It travels as JSON to the client processes."""

    address: str | None  # None: what the SDK takes for itself
    model: str | None
    num_requests: int
    num_processes: int
    concurrency: int | None  # closed loop: so many callers, each of which sends its next request when its last one has ended
    rate_per_s: float | None  # open loop: requests arrive by a Poisson process, whatever has become of those before
    prompts: tuple[str, ...]  # taken in turn; empty: random token ids
    prompt_tokens: int | None  # how many of them, where there are no prompts; None: as many as in the Azure trace
    max_tokens: int
    cache_salt: str | None  # requests share cached prompts with others of this salt alone; None: with all that have none
    temperature: float | None
    ignore_eos: bool | None
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request. Its number is its seed."""

    number: int
    prompt: str | tuple[int, ...]
    max_tokens: int
    ignore_eos: bool | None
    arrival_s: float  # since the start of the load; 0 in a closed loop


def plan_requests(spec: LoadSpec) -> list[PlannedRequest]:
    """All requests, by number."""
    arrivals_s = [0.0] * spec.num_requests if spec.rate_per_s is None else arrival_times(spec.num_requests, rate_per_s=spec.rate_per_s)
    if spec.prompts:
        prompts = spec.prompts
        return [
            PlannedRequest(number, prompts[number % len(prompts)], spec.max_tokens, spec.ignore_eos, arrivals_s[number])
            for number in range(spec.num_requests)
        ]
    if spec.prompt_tokens is not None:
        requests = fixed((spec.num_requests, spec.prompt_tokens), num_tokens=spec.max_tokens, vocab_size=spec.vocab_size)
        return [
            PlannedRequest(number, prompt, num_tokens, True, arrivals_s[number]) for number, (prompt, num_tokens) in enumerate(requests)
        ]
    trace, _ = fit(azure_conv400(spec.vocab_size), max_request_tokens=spec.max_model_len)
    planned = []
    for number in range(spec.num_requests):
        prompt, num_tokens = trace[number % len(trace)]
        # The trace says how many tokens were generated, so an end token must not end it sooner.
        planned.append(PlannedRequest(number, prompt, num_tokens, True, arrivals_s[number]))
    return planned


def share_of(planned: Sequence[PlannedRequest], spec: LoadSpec, *, process: int) -> tuple[list[PlannedRequest], int]:
    """The requests of one client process, and how many callers it has in a closed loop."""
    num_callers = 0
    if spec.concurrency is not None:
        num_callers = spec.concurrency // spec.num_processes + (process < spec.concurrency % spec.num_processes)
    return list(planned[process :: spec.num_processes]), num_callers


def arrival_times(num_requests: int, *, rate_per_s: float) -> list[float]:
    """When each request of an open loop arrives, in seconds from its start: a Poisson process."""
    rng = random.Random(ARRIVAL_SEED)
    arrivals_s, now_s = [], 0.0
    for _ in range(num_requests):
        now_s += rng.expovariate(rate_per_s)
        arrivals_s.append(now_s)
    return arrivals_s
