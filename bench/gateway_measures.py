"""What a gateway adds to the times of an engine: the engine's times of each token beside those of its client."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quire.bench.percentile import percentile


@dataclass(frozen=True, slots=True)
class GatewayLoad:
    """Each of num_streams callers sends its next request when its last one has ended; they begin one tick after another."""

    num_streams: int
    num_tokens: int  # of each request
    num_requests: int  # of each caller
    tick_s: float


@dataclass(slots=True)
class EngineRecord:
    """What the engine did since it was asked the last time. Times are of the machine's monotonic clock, in seconds."""

    # By the request's seed, which is how its client knows it.
    submit_s: dict[int, float] = field(default_factory=dict)
    token_s: dict[int, list[float]] = field(default_factory=dict)  # when each token left
    num_cancels: int = 0  # requests that their gateway ended


@dataclass(slots=True)
class StreamTimes:
    """One stream as its client saw it. Times are of the machine's monotonic clock, in seconds."""

    call_s: float
    messages: list[tuple[float, int]] = field(default_factory=list)  # when each message with tokens came, and how many it had


@dataclass(frozen=True, slots=True)
class GatewayMeasures:
    """One run. Times are in seconds."""

    added_gap_p50_s: float  # a gap between two messages of a stream, less that between their last tokens at the engine
    added_gap_p99_s: float
    delay_p50_s: float  # from the engine's message to the client's, of each token
    delay_p99_s: float
    added_ttft_p50_s: float  # TTFT of the client, less that from the engine's receipt of the request to its first token
    added_ttft_p99_s: float
    coalesced_share: float  # of tokens that came in one message with the stream's token before them
    tokens_per_s: float
    messages_per_s: float
    gateway_us_per_token: float  # processor time of the gateway's process


def measure(streams: Mapping[int, StreamTimes], record: EngineRecord, *, gateway_cpu_s: float) -> GatewayMeasures:
    """streams: by seed, complete, each with two messages or more"""
    gaps, delays, ttfts = [], [], []
    num_messages = 0
    first_s, last_s = float("inf"), 0.0
    for seed, stream in streams.items():
        sent_s = record.token_s[seed]
        ttfts.append(stream.messages[0][0] - stream.call_s - (sent_s[0] - record.submit_s[seed]))
        last_sent_s, last_came_s, num_tokens = None, None, 0
        for came_s, count in stream.messages:
            delays += [came_s - token_s for token_s in sent_s[num_tokens : num_tokens + count]]
            num_tokens += count
            now_sent_s = sent_s[num_tokens - 1]
            if last_came_s is not None and last_sent_s is not None:
                gaps.append((came_s - last_came_s) - (now_sent_s - last_sent_s))
            last_sent_s, last_came_s = now_sent_s, came_s
        assert num_tokens == len(sent_s), (seed, num_tokens, len(sent_s))
        num_messages += len(stream.messages)
        first_s, last_s = min(first_s, stream.messages[0][0]), max(last_s, stream.messages[-1][0])
    num_tokens, span_s = len(delays), last_s - first_s
    return GatewayMeasures(
        added_gap_p50_s=percentile(gaps, 50),
        added_gap_p99_s=percentile(gaps, 99),
        delay_p50_s=percentile(delays, 50),
        delay_p99_s=percentile(delays, 99),
        added_ttft_p50_s=percentile(ttfts, 50),
        added_ttft_p99_s=percentile(ttfts, 99),
        coalesced_share=(num_tokens - num_messages) / num_tokens,
        tokens_per_s=num_tokens / span_s,
        messages_per_s=num_messages / span_s,
        gateway_us_per_token=1e6 * gateway_cpu_s / num_tokens,
    )


def median_measures(runs: Sequence[GatewayMeasures]) -> GatewayMeasures:
    """Each value's median over the runs."""
    return GatewayMeasures(**{name: statistics.median(getattr(run, name) for run in runs) for name in GatewayMeasures.__dataclass_fields__})
