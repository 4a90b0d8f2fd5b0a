"""What is counted of one worker group: plain integers, for the scheduler's loop has no time for a metric library."""

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial

from quire.common import metric_names as names
from quire.common.messages import Distribution, Sample
from quire.common.metric_names import Metric


class Tally:
    """How many observations fell between which edges."""

    __slots__ = ("_edges", "counts", "total")

    def __init__(self, metric: Metric) -> None:
        self._edges = metric.edges
        self.counts = [0] * (len(metric.edges) + 1)  # the last one: above every edge
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._edges, value)] += 1
        self.total += value


@dataclass(slots=True)
class GroupCounters:
    """Counts of a group since the scheduler began: they go on over its terms."""

    queried_tokens: int = 0
    hit_tokens: int = 0
    num_swaps: int = 0  # preemptions by swap
    num_recomputes: int = 0  # preemptions by recompute
    num_failed_swaps: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    num_steps: int = 0
    host_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    step_s: Tally = field(default_factory=partial(Tally, names.STEP_TIME))
    plan_s: Tally = field(default_factory=partial(Tally, names.PLAN_TIME))
    batch_size: Tally = field(default_factory=partial(Tally, names.BATCH_SIZE))
    step_tokens: Tally = field(default_factory=partial(Tally, names.STEP_TOKENS))
    out_s: Tally = field(default_factory=partial(Tally, names.SWAP_TIME))
    in_s: Tally = field(default_factory=partial(Tally, names.SWAP_TIME))

    def step(self, *, device_s: float, host_s: float, num_prefill_tokens: int, num_decoding: int, num_chunks: int) -> None:
        """A plan was answered."""
        self.num_steps += 1
        if not (num_chunks or num_decoding):
            return
        self.host_s += host_s
        self.num_prefill_tokens += num_prefill_tokens
        self.num_decode_tokens += num_decoding
        self.step_s.observe(device_s)
        self.batch_size.observe(num_chunks + num_decoding)
        self.step_tokens.observe(num_prefill_tokens + num_decoding)

    def samples(self) -> tuple[Sample, ...]:
        """The counters, with the labels that follow those of the group."""
        return (
            Sample(names.PREFIX_QUERIES.name, (), self.queried_tokens),
            Sample(names.PREFIX_HITS.name, (), self.hit_tokens),
            Sample(names.PREEMPTIONS.name, ("swap",), self.num_swaps),
            Sample(names.PREEMPTIONS.name, ("recompute",), self.num_recomputes),
            Sample(names.FAILED_SWAPS.name, (), self.num_failed_swaps),
            Sample(names.SWAP_BYTES.name, ("out",), self.bytes_out),
            Sample(names.SWAP_BYTES.name, ("in",), self.bytes_in),
            Sample(names.STEPS.name, (), self.num_steps),
            Sample(names.STEP_HOST_TIME.name, (), self.host_s),
            Sample(names.COMPUTED_TOKENS.name, ("prefill",), self.num_prefill_tokens),
            Sample(names.COMPUTED_TOKENS.name, ("decode",), self.num_decode_tokens),
        )

    def distributions(self) -> tuple[Distribution, ...]:
        """The tallies, likewise."""
        named: tuple[tuple[Metric, tuple[str, ...], Tally], ...] = (
            (names.STEP_TIME, (), self.step_s),
            (names.PLAN_TIME, (), self.plan_s),
            (names.BATCH_SIZE, (), self.batch_size),
            (names.STEP_TOKENS, (), self.step_tokens),
            (names.SWAP_TIME, ("out",), self.out_s),
            (names.SWAP_TIME, ("in",), self.in_s),
        )
        return tuple(Distribution(metric.name, labels, tuple(tally.counts), tally.total) for metric, labels, tally in named)
