"""The one place of the gateway where errors become gRPC."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Never

import grpc

from quire.cluster.gateway.error_place import place_of
from quire.cluster.rich_status import status_of
from quire.common.errors import InternalError, QuireError

log = logging.getLogger("quire.gateway")

Context = grpc.aio.ServicerContext[Any, Any]


async def abort(context: Context, error: QuireError) -> Never:
    """End the call with this error.

    Raises:
        AbortError, CancelledError: always; gRPC ends the call without a word in its log.
    """
    try:
        await context.abort(*status_of(error))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:
        # The client is gone, or has no room for its first message yet and gRPC takes no status behind that.
        raise asyncio.CancelledError from None
    raise AssertionError("abort always raises")


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
        log.error("a call failed unexpectedly: %s", place_of(error))
        await abort(context, InternalError("something went wrong inside the gateway; its log has the details", reason="UNEXPECTED"))
