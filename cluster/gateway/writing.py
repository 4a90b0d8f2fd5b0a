"""Messages to a client, which may not read them."""

import asyncio

import grpc
from google.protobuf.message import Message

from quire.cluster.gateway.grpc_errors import Context
from quire.common.errors import Cancelled


async def write(context: Context, message: Message, *, timeout_s: float) -> None:
    """Hand a message to the transport, which waits for the client to make room.

    Raises:
        Cancelled: it made none in time, or it is gone.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        raise Cancelled(f"the client took nothing for {timeout_s:g} s", reason="CLIENT_NOT_READING") from None
    except grpc.aio.BaseError:
        raise Cancelled("the connection to the client broke", reason="CLIENT_GONE") from None
