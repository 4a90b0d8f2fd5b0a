"""A span for each request, in programs that use OpenTelemetry: a child of the one that the call is made in, and the server's parent."""

import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

from quire.v1 import inference_pb2

Call = TypeVar("Call")
Metadata = tuple[tuple[str, str], ...]

_HEADERS: Final = ("traceparent", "tracestate")  # W3C trace context


def traced(make: Callable[[Metadata], Call], metadata: Metadata, request: object) -> Call:
    """The call that `make` begins with this metadata, in a span that ends when the call does. Each try of a GenerateRequest is one;
    other calls have none.

    Without OpenTelemetry in the program, which we do not load, there is no span and nothing more in the metadata.
    """
    if "opentelemetry.trace" not in sys.modules or not isinstance(request, inference_pb2.GenerateRequest):
        return make(metadata)
    from opentelemetry import propagate, trace

    operation = "chat" if request.HasField("chat") else "text_completion"
    attributes = {"gen_ai.provider.name": "quire", "gen_ai.operation.name": operation, "gen_ai.request.model": request.model}
    span = trace.get_tracer("quire").start_span(f"{operation} {request.model}".strip(), kind=trace.SpanKind.CLIENT, attributes=attributes)
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    try:
        call: Any = make(metadata + tuple((name, carrier[name]) for name in _HEADERS if name in carrier))
    except BaseException:
        span.end()
        raise
    call.add_done_callback(lambda _: span.end())
    ended: Call = call
    return ended
