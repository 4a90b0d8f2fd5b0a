"""QuireError as a gRPC status: a code, a message, and google.rpc details for programs. Used by every server of the cluster."""

from typing import Any, Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from quire.common.errors import ERROR_DOMAIN, QuireError

DETAILS_KEY: Final = "grpc-status-details-bin"
# Clients take 8 KiB of metadata by default, and the message travels twice: in the status and in its details.
MAX_MESSAGE_CHARS: Final = 1000
MAX_METADATA_ENTRIES: Final = 16
MAX_METADATA_CHARS: Final = 64

_GRPC_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: QuireError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """What `context.abort` takes: the code, the message, and trailing metadata with the serialized google.rpc.Status.

    Its details are ErrorInfo always, BadRequest where a field is at fault, RetryInfo where retrying helps.
    """
    message = error.message[:MAX_MESSAGE_CHARS]
    metadata = {key: value[:MAX_METADATA_CHARS] for key, value in list(error.metadata.items())[:MAX_METADATA_ENTRIES]}
    status = status_pb2.Status(code=int(error.code), message=message)
    _attach(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        _attach(status, error_details_pb2.RetryInfo(retry_delay=duration_of(error.retry_after_s)))
    return _GRPC_CODES[status.code], message, ((DETAILS_KEY, status.SerializeToString()),)


def duration_of(seconds: float) -> duration_pb2.Duration:
    """A span as protobuf has it. Negative ones, which can come from rounding alone, are 0."""
    nanos = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def _attach(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
