"""What a gateway counts of requests: a few numbers when one ends, nothing per token."""

import asyncio
import contextlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector

from quire.cluster.gateway.generation import Account
from quire.cluster.metric_page import page_of
from quire.common import metric_names as names
from quire.common.clock import Clock, monotonic
from quire.common.errors import QuireError
from quire.common.http_pages import Page
from quire.common.messages import EndReason
from quire.common.metric_names import Metric
from quire.common.version import quire_version

OK: Final = "ok"
# Ends that are there with 0 from the start: the rate of a counter that appears with its first event misses that one.
_EXPECTED_ENDS: Final = (("resource_exhausted", "QUEUE_FULL"), ("internal", "UNEXPECTED"), ("unavailable", "NO_READY_GROUP"))


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request when it ends. Its model stays "" while none was found: names that clients make up are no labels."""

    arrival_s: float
    model: str = ""
    priority: int = 0
    num_prompt_tokens: int = 0
    num_received: int = 0  # tokens of all its sequences
    num_longest: int = 0  # tokens of its longest sequence, if they came as they were generated
    first_token_s: float | None = None
    account: Account | None = None
    reason: EndReason | None = None
    operation: str = "text_completion"  # or "chat"
    trace_id: str = ""  # in hexadecimal; "" if the request is not traced
    traceparent: str = ""  # W3C's, of its span


class GatewayMetrics:
    """The counters, and their page."""

    def __init__(self, *, clock: Clock = monotonic) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody reads
        self._clock = clock
        self._registry = CollectorRegistry(auto_describe=False)
        self._requests = _counter(names.REQUESTS, self._registry)
        self._ttft = _histogram(names.TIME_TO_FIRST_TOKEN, self._registry)
        self._per_token = _histogram(names.TIME_PER_OUTPUT_TOKEN, self._registry)
        self._duration = _histogram(names.REQUEST_DURATION, self._registry)
        self._queue = _histogram(names.QUEUE_TIME, self._registry)
        self._preempted = _histogram(names.PREEMPTED_TIME, self._registry)
        self._prompt_tokens = _counter(names.PROMPT_TOKENS, self._registry)
        self._cached_tokens = _counter(names.CACHED_PROMPT_TOKENS, self._registry)
        self._completion_tokens = _counter(names.COMPLETION_TOKENS, self._registry)
        self._calls = Gauge(names.GATEWAY_CALLS.name, names.GATEWAY_CALLS.meaning, registry=self._registry)
        self._ready = Gauge(names.GATEWAY_READY.name, names.GATEWAY_READY.meaning, registry=self._registry)
        build = Gauge(names.BUILD_INFO.name, names.BUILD_INFO.meaning, names.BUILD_INFO.labels, registry=self._registry)
        build.labels(quire_version(), platform.python_version(), "gateway").set(1)
        ProcessCollector(registry=self._registry)
        for outcome, reason in _EXPECTED_ENDS:
            self._requests.labels("", outcome, reason)

    @contextlib.contextmanager
    def counted(self, record: RequestRecord) -> Iterator[None]:
        """Around a request: counts it when it ends, in whatever way."""
        outcome, reason = OK, ""
        try:
            yield
            reason = record.reason.name if record.reason is not None else ""
        except QuireError as error:
            outcome, reason = error.code.name.lower(), error.reason
            raise
        except asyncio.CancelledError:
            outcome, reason = "cancelled", "CLIENT_GONE"
            raise
        except Exception:
            outcome, reason = "internal", "UNEXPECTED"
            raise
        finally:
            self._requests.labels(record.model, outcome, reason).inc()
            if record.model:
                self._observe(record, is_ok=outcome == OK)

    def page(self, headers: Mapping[str, str], *, num_calls: int, is_ready: bool) -> Page:
        """What Prometheus scrapes."""
        self._calls.set(num_calls)
        self._ready.set(is_ready)
        return page_of([self._registry], headers)

    def _observe(self, record: RequestRecord, *, is_ok: bool) -> None:
        model, now_s = record.model, self._clock()
        exemplar = {"trace_id": record.trace_id} if record.trace_id else None
        self._prompt_tokens.labels(model).inc(record.num_prompt_tokens)
        self._completion_tokens.labels(model).inc(record.num_received)
        if record.first_token_s is not None:
            self._ttft.labels(model).observe(record.first_token_s - record.arrival_s, exemplar)
        if not is_ok or record.account is None:
            return
        account = record.account
        self._duration.labels(model).observe(now_s - record.arrival_s, exemplar)
        self._queue.labels(model, names.PRIORITY_LABELS.get(record.priority, "other")).observe(account.spans.queue_s)
        self._cached_tokens.labels(model).inc(account.usage.num_cached_tokens)
        if account.num_preemptions:
            self._preempted.labels(model).observe(account.spans.preempted_s)
        if record.first_token_s is not None and record.num_longest > 1:
            self._per_token.labels(model).observe((now_s - record.first_token_s) / (record.num_longest - 1))


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.meaning, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.meaning, metric.labels, registry=registry, buckets=metric.edges)
