"""The caller's trace, for the server: W3C trace context in a call's metadata, if the program uses OpenTelemetry."""

import sys
from typing import Final

_HEADERS: Final = ("traceparent", "tracestate")


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Of the span that is current where the call is made. Nothing in a program that has not loaded OpenTelemetry, which we do not."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((name, carrier[name]) for name in _HEADERS if name in carrier)
