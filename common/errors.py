"""The one tree of errors that callers and load can meet, on both sides of the wire.

    QuireError
      ConfigError          FAILED_PRECONDITION  a setting, a folder or a wish that cannot work; found before anything starts
      InvalidRequest       INVALID_ARGUMENT     a request that can never be served as it is
      NotSupported         UNIMPLEMENTED        a field or call that no code honours yet, by name
      Unauthenticated      UNAUTHENTICATED      a call without a token that the server knows
      PermissionDenied     PERMISSION_DENIED    a call that takes another role
      NotFound             NOT_FOUND            a model or a group that is not there
      AlreadyExists        ALREADY_EXISTS       a request id in use
      Overloaded           RESOURCE_EXHAUSTED   a queue or a quota is full; carries a retry delay
      Unavailable          UNAVAILABLE          nothing can serve this now; carries a retry delay
      DeadlineExceeded     DEADLINE_EXCEEDED    the request's time ran out
      Cancelled            CANCELLED            the caller or an operator ended it
      InternalError        INTERNAL             a bug of ours

Servers raise them, the gateway alone maps them to gRPC, and the SDK raises the same classes again from what it receives.
Messages say what happened, the values, and what to do; never prompts, paths or tracebacks.
"""

import enum
from collections.abc import Mapping
from typing import ClassVar, Final


class StatusCode(enum.IntEnum):
    """gRPC's status codes, by gRPC's own numbers, for code that must not import grpc."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class QuireError(Exception):
    """Root of the tree.

    message:        what happened, the values, what to do
    reason:         UPPER_SNAKE, stable, for programs
    metadata:       the numbers in the message, by name
    field:          the request field that is at fault, if one is
    retry_after_s:  when trying again may help; None when it will not
    """

    code: ClassVar[StatusCode] = StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.field = field
        self.retry_after_s = retry_after_s


class ConfigError(QuireError):
    code = StatusCode.FAILED_PRECONDITION
    default_reason = "INVALID_CONFIG"


class InvalidRequest(QuireError):
    code = StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"


class NotSupported(QuireError):
    code = StatusCode.UNIMPLEMENTED
    default_reason = "NOT_SUPPORTED"


class Unauthenticated(QuireError):
    code = StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(QuireError):
    code = StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class NotFound(QuireError):
    code = StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(QuireError):
    code = StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class Overloaded(QuireError):
    code = StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class Unavailable(QuireError):
    code = StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(QuireError):
    code = StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(QuireError):
    code = StatusCode.CANCELLED
    default_reason = "CANCELLED"


class InternalError(QuireError):
    code = StatusCode.INTERNAL
    default_reason = "INTERNAL"


# The `domain` of every google.rpc.ErrorInfo that Quire sends.
ERROR_DOMAIN: Final = "quire.dev"

ERROR_BY_CODE: Final[Mapping[int, type[QuireError]]] = {
    int(error.code): error
    for error in (
        ConfigError,
        InvalidRequest,
        NotSupported,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}


def error_from_code(
    code: int,
    message: str,
    *,
    reason: str | None = None,
    metadata: Mapping[str, str] | None = None,
    field: str | None = None,
    retry_after_s: float | None = None,
) -> QuireError:
    """The error of the tree for a gRPC status code; InternalError for a code that has no class of its own."""
    return ERROR_BY_CODE.get(code, InternalError)(message, reason=reason, metadata=metadata, field=field, retry_after_s=retry_after_s)
