"""Spans of requests, by OpenTelemetry over OTLP. Off unless an endpoint is set; then loaded, else not.

The gateway makes them all: the scheduler tells at a request's end where its time went, so the processes that plan and compute know
nothing of tracing. One request is

    generate MODEL                    SERVER, a child of the client's span, if it sent a traceparent
        quire.queue                   until a group took it
        quire.prefill                 until the scheduler had its first token
        quire.decode                  until its last
            quire.preempted           as long as it was preempted in all, at the end of decode: when exactly is not told
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from quire.cluster.gateway.metrics import RequestRecord
from quire.common.clock import Clock, monotonic
from quire.common.errors import ConfigError, QuireError
from quire.common.version import quire_version

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# Spans that wait to be sent, and how long they do; what comes beyond is dropped.
MAX_QUEUED_SPANS: Final = 4096
SEND_EVERY_S: Final = 2.0
# How long the collector may take for one batch, and the last ones at the end.
SEND_TIMEOUT_S: Final = 5.0
STOP_TIMEOUT_S: Final = 5.0
_NS: Final = 1_000_000_000

WallNs = Callable[[float], int]


class Tracing:
    """Makes spans and sends them on a thread of its own."""

    def __init__(self, endpoint: str, *, sample_ratio: float, clock: Clock = monotonic) -> None:
        """endpoint: "http://HOST:PORT" or "https://..." of an OTLP collector's gRPC port; sample_ratio: of requests whose client has
        not decided.

        Raises:
            ConfigError: the endpoint is no such address, or OpenTelemetry is not installed.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint is {endpoint!r}; it takes http://HOST:PORT or https://HOST:PORT")
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ModuleNotFoundError as error:
            raise ConfigError(f'otlp_endpoint needs {error.name}; install it with: pip install "quire[tracing]"') from error
        self._clock = clock
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create({"service.name": "quire-gateway", "service.version": quire_version()}),
            shutdown_on_exit=False,  # `stop` does so, within a bound
        )
        exporter = OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=SEND_EVERY_S * 1000)
        )
        self._tracer = self._provider.get_tracer("quire", quire_version())

    @contextlib.contextmanager
    def traced(self, record: RequestRecord, metadata: Mapping[str, str], *, method: str) -> Iterator[None]:
        """Around a request, inside what counts it: sets the record's trace, and ends the spans when the request ends."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        wall_ns = self._calendar()
        span = self._tracer.start_span(
            "generate",
            context=propagator.extract(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": "quire.v1.InferenceService", "rpc.method": method},
            start_time=wall_ns(record.arrival_s),
        )
        if not span.is_recording():
            span.end()
            yield
            return
        context = span.get_span_context()
        record.trace_id = f"{context.trace_id:032x}"
        record.traceparent = f"00-{record.trace_id}-{context.span_id:016x}-01"
        reason = ""
        try:
            yield
        except QuireError as error:
            reason = error.reason
            raise
        except asyncio.CancelledError:
            reason = "CLIENT_GONE"
            raise
        except Exception as error:
            reason = type(error).__name__
            raise
        finally:
            self._end(span, record, wall_ns, reason=reason)

    async def stop(self) -> None:
        """Send what waits, for at most STOP_TIMEOUT_S."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, STOP_TIMEOUT_S)

    def _end(self, span: "Span", record: RequestRecord, wall_ns: WallNs, *, reason: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        now_s = self._clock()
        if record.model:
            span.update_name(f"generate {record.model}")
        span.set_attributes(_attributes(record))
        if reason:
            span.set_attribute("error.type", reason)
            span.set_status(Status(StatusCode.ERROR, reason))
        if record.account is not None:
            self._add_phases(span, record, now_s, wall_ns)
        span.end(wall_ns(now_s))

    def _add_phases(self, span: "Span", record: RequestRecord, now_s: float, wall_ns: WallNs) -> None:
        """The scheduler's spans, backwards from the end: what lies before them is the gateway's own work."""
        assert record.account is not None
        spans = record.account.spans
        durations_s = (("quire.queue", spans.queue_s), ("quire.prefill", spans.prefill_s), ("quire.decode", spans.decode_s))
        start_s = max(record.arrival_s, now_s - sum(seconds for _, seconds in durations_s))
        for name, seconds in durations_s:
            end_s = min(start_s + seconds, now_s)
            phase = self._child(span, name, wall_ns(start_s))
            if name == "quire.decode" and record.account.num_preemptions:
                preempted = self._child(phase, "quire.preempted", wall_ns(max(start_s, end_s - spans.preempted_s)))
                preempted.set_attribute("quire.preemption.count", record.account.num_preemptions)
                preempted.end(wall_ns(end_s))
            phase.end(wall_ns(end_s))
            start_s = end_s

    def _child(self, parent: "Span", name: str, start_ns: int) -> "Span":
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, context=set_span_in_context(parent), start_time=start_ns)

    def _calendar(self) -> WallNs:
        """What makes of a time of our clock one of the calendar, in nanoseconds: by one look at both, so that order is kept."""
        offset_ns = time.time_ns() - int(self._clock() * _NS)
        return lambda at_s: offset_ns + int(at_s * _NS)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """By OpenTelemetry's conventions for generative AI, as far as they are known; nothing of the text."""
    attributes: dict[str, Any] = {"gen_ai.provider.name": "quire", "gen_ai.operation.name": record.operation}
    if record.model:
        attributes |= {"gen_ai.request.model": record.model, "gen_ai.response.model": record.model}
    if record.num_prompt_tokens:
        attributes |= {"gen_ai.usage.input_tokens": record.num_prompt_tokens, "gen_ai.usage.output_tokens": record.num_received}
    if record.account is not None:
        attributes["gen_ai.usage.cache_read.input_tokens"] = record.account.usage.num_cached_tokens
    if record.reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [record.reason.name.lower()]
    if record.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_token_s - record.arrival_s
    return attributes
