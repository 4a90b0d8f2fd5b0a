"""How the request of every call is read: within a time, and so that bytes that are no message get an answer.

grpc.aio reads a unary request before it calls the handler: a call whose message never comes waits for ever, and bytes that
cannot be decoded end as UNKNOWN with a traceback in the log. On the wire a unary call is a stream of one message, so each
handler is replaced here by one that takes a stream and reads that message itself.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from quire.cluster.gateway.grpc_errors import Context, errors_as_status
from quire.cluster.gateway.wire_scan import check_num_ids
from quire.cluster.gateway.writing import write
from quire.common.errors import DeadlineExceeded, InvalidRequest, Overloaded

log = logging.getLogger("quire.gateway")

# From the call's headers to the end of its message: 4 MiB at 1.1 Mbit/s. In a stream of requests, between two of them.
READ_TIMEOUT_S: Final = 30.0
# Calls that wait for their message, none of which counts among those of the CallGate yet: twice as many as that lets in.
MAX_UNREAD_CALLS: Final = 16384
RETRY_AFTER_S: Final = 1.0
# A client that takes no answer of a stream of requests for so long is given up.
WRITE_TIMEOUT_S: Final = 30.0


class RequestReader(grpc.aio.ServerInterceptor):
    """Stands before the handlers of all services."""

    def __init__(
        self,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        max_unread_calls: int = MAX_UNREAD_CALLS,
        max_model_len: Callable[[], int] = lambda: 0,
    ) -> None:
        """max_model_len: tokens that the longest served model takes, 0 while none is known"""
        self._max_model_len = max_model_len
        self._timeout_s = timeout_s
        self._max_unread_calls = max_unread_calls
        self.num_unread_calls = 0

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The handler of a call, or None if nobody has one."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        behaviour = self._of_stream(handler) if handler.request_streaming else self._of_one_message(handler, handler_call_details.method)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        return make(behaviour, request_deserializer=None, response_serializer=handler.response_serializer)

    def _of_one_message(self, handler: Any, method: str) -> Any:
        def deserialize(frame: bytes) -> Any:
            check_num_ids(method, frame, max_model_len=self._max_model_len())
            return handler.request_deserializer(frame)

        async def behaviour(_: Any, context: Context) -> Any:
            async with errors_as_status(context):
                request = await self._read(context, deserialize)
                if request is grpc.aio.EOF:
                    raise InvalidRequest("the call ended without a request message; send one", reason="NO_REQUEST")
            return await (handler.unary_stream if handler.response_streaming else handler.unary_unary)(request, context)

        return behaviour

    def _of_stream(self, handler: Any) -> Any:
        """For reflection, the one service with streams of requests: an async generator of answers."""
        assert handler.response_streaming, "no method of ours takes a stream and gives one answer"

        async def requests(context: Context) -> AsyncIterator[Any]:
            while (request := await self._read(context, handler.request_deserializer)) is not grpc.aio.EOF:
                yield request

        async def behaviour(_: Any, context: Context) -> None:
            async with errors_as_status(context):
                async for response in handler.stream_stream(requests(context), context):
                    await write(context, response, timeout_s=WRITE_TIMEOUT_S)

        return behaviour

    async def _read(self, context: Context, deserialize: Callable[[bytes], Any]) -> Any:
        if self.num_unread_calls >= self._max_unread_calls:
            text = f"{self.num_unread_calls} calls wait for their request messages; try again"
            raise Overloaded(text, reason="TOO_MANY_CALLS", retry_after_s=RETRY_AFTER_S)
        self.num_unread_calls += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                frame: Any = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no request message came within {self._timeout_s:g} s", reason="NO_REQUEST") from None
        finally:
            self.num_unread_calls -= 1
        if frame is grpc.aio.EOF:
            return frame
        try:
            return deserialize(frame)
        except DecodeError:
            log.debug("a request of %d bytes cannot be decoded", len(frame))
            text = f"the request has {len(frame)} bytes that are not a message of this method; check the versions of client and server"
            raise InvalidRequest(text, reason="UNDECODABLE_REQUEST", metadata={"bytes": str(len(frame))}) from None
