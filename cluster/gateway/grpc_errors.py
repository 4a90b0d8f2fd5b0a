"""The one place where errors become gRPC: a status code, a message, and google.rpc details for programs."""

import contextlib
import logging
import traceback
from collections.abc import AsyncIterator
from typing import Any, Final, Never

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from quire.common.errors import ERROR_DOMAIN, InternalError, QuireError

log = logging.getLogger("quire.gateway")

Context = grpc.aio.ServicerContext[Any, Any]

DETAILS_KEY: Final = "grpc-status-details-bin"
# Clients take 8 KiB of metadata by default, and the message travels twice: in the status and in its details.
MAX_MESSAGE_CHARS: Final = 1000
MAX_METADATA_ENTRIES: Final = 16
MAX_METADATA_CHARS: Final = 64

_GRPC_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: QuireError) -> status_pb2.Status:
    """The error as google.rpc.Status: ErrorInfo always, BadRequest where a field is at fault, RetryInfo where retrying helps."""
    message = error.message[:MAX_MESSAGE_CHARS]
    metadata = {key: value[:MAX_METADATA_CHARS] for key, value in list(error.metadata.items())[:MAX_METADATA_ENTRIES]}
    status = status_pb2.Status(code=int(error.code), message=message)
    _attach(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        _attach(status, error_details_pb2.RetryInfo(retry_delay=duration_of(error.retry_after_s)))
    return status


async def abort(context: Context, error: QuireError) -> Never:
    """End the call with this error."""
    status = status_of(error)
    await context.abort(_GRPC_CODES[status.code], status.message, ((DETAILS_KEY, status.SerializeToString()),))


@contextlib.asynccontextmanager
async def errors_as_status(context: Context) -> AsyncIterator[None]:
    """Around every call: our errors go out as they are, anything else as INTERNAL without a word of what was inside.

    The log gets the type and the place of an unexpected error but not its message, which may quote a prompt.
    """
    try:
        yield
    except QuireError as error:
        if isinstance(error, InternalError):
            log.error("a call ended with an error of ours: %s", error.message)
        await abort(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        log.error("unexpected %s in a call\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        await abort(context, InternalError("something went wrong inside the gateway; its log has the details", reason="UNEXPECTED"))


def duration_of(seconds: float) -> duration_pb2.Duration:
    """A span as protobuf has it. Negative ones, which can come from rounding alone, are 0."""
    nanos = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def _attach(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
