"""gRPC's errors as ours: by google.rpc.Status where the server sent one, else by code and what gRPC itself says."""

import re
from collections.abc import Iterable
from typing import Final, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from quire.common.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotSupported,
    Overloaded,
    QuireError,
    StatusCode,
    Unavailable,
    error_from_code,
)

_DETAILS_KEY: Final = "grpc-status-details-bin"


def error_from_rpc(error: grpc.RpcError, *, address: str, timeout_s: float) -> QuireError:
    """The error of the tree for what a call raised. `address` and `timeout_s` go into the messages of errors made on this side."""
    code = error.code()
    assert code is not None, "a call that raised has a code"
    number = int(code.value[0])
    status = _rich_status(error)
    if status is not None:
        return _from_status(number, status)
    return _from_plain(number, error.details() or code.name, address=address, timeout_s=timeout_s)


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    for key, value in cast(Iterable[tuple[str, bytes]], error.trailing_metadata() or ()):
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _from_status(code: int, status: status_pb2.Status) -> QuireError:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        has_retry = detail.Unpack(retry) or has_retry
    return error_from_code(
        code,
        status.message,
        reason=info.reason or None,
        metadata=dict(info.metadata),
        field=next((violation.field for violation in bad_request.field_violations), None),
        retry_after_s=retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9 if has_retry else None,
    )


def _from_plain(code: int, details: str, *, address: str, timeout_s: float) -> QuireError:
    """An error that no part of Quire wrote. One that may pass carries a retry delay of 0: the client's own back-off."""
    lower = details.lower()
    if code == StatusCode.UNAVAILABLE:
        return Unavailable(_unavailable_message(details, address=address), reason=_unavailable_reason(lower), retry_after_s=0.0)
    if code == StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{address} did not finish within {timeout_s:g} s; give a longer timeout_s")
    if code == StatusCode.RESOURCE_EXHAUSTED and "larger than max" in lower:
        return InvalidRequest(_too_large_message(details), reason="MESSAGE_TOO_LARGE")
    if code == StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details, retry_after_s=0.0)
    if code == StatusCode.UNIMPLEMENTED:
        return NotSupported(f"{address} does not have this call: {details}; is it a Quire server of this version?", reason="NO_SUCH_CALL")
    return error_from_code(code, details)


def _too_large_message(details: str) -> str:
    """gRPC tells the size of what it refuses, and the bound of who refused it."""
    sizes = re.search(r"server: .*larger than max \((\d+) vs\. (\d+)\)", details, re.IGNORECASE)
    if sizes is None:
        return f"a message is too large: {details}"
    return f"the request has {sizes[1]} bytes, and this server takes {sizes[2]} (max_request_bytes); shorten it"


def _unavailable_reason(lower: str) -> str:
    if "resolution failed" in lower:
        return "NAME_NOT_FOUND"
    if "handshake" in lower:
        return "TLS_HANDSHAKE_FAILED"
    return "NOTHING_ANSWERS" if "failed to connect" in lower else "CONNECTION_LOST"


def _unavailable_message(details: str, *, address: str) -> str:
    reason = _unavailable_reason(details.lower())
    if reason == "NAME_NOT_FOUND":
        return f"the name in {address} is not known here; check the address"
    if reason == "TLS_HANDSHAKE_FAILED":
        return f"{address} and this client cannot agree on TLS; check secure and tls_ca ({details})"
    if reason == "NOTHING_ANSWERS":
        return f"nothing answers at {address}; start a server with `quire serve`"
    return f"the connection to {address} was lost: {details}"
