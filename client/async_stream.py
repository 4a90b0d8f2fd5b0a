"""A stream of one request's deltas, for asyncio."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final, Self, cast

import grpc
import grpc.aio

from quire.client import wire
from quire.client.results import Delta
from quire.client.retries import Tries
from quire.common.errors import Cancelled, QuireError
from quire.v1 import inference_pb2

CLOSED: Final = "the client was closed during the call"

ResponseCall = grpc.aio.UnaryStreamCall


class AsyncStream(AsyncIterator[Delta]):
    """The deltas of one request, as the server makes them. As `Stream`, within one event loop."""

    def __init__(
        self,
        open_call: Callable[[float | None], "ResponseCall[Any, inference_pb2.GenerateStreamResponse]"],
        *,
        tries: Tries,
        as_error: Callable[[grpc.RpcError], QuireError],
    ) -> None:
        """`open_call` starts the request with a timeout in seconds."""
        self._open_call = open_call
        self._tries = tries
        self._as_error = as_error
        self._received = False
        self._ended = False
        self._cancelled = asyncio.Event()
        self._call = self._open()

    def cancel(self) -> None:
        """End the request at the server. The iteration then ends without an error. May be called twice."""
        self._cancelled.set()
        self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._ended:
            try:
                response = await self._call.read()
            except grpc.RpcError as rpc_error:
                if not self._cancelled.is_set():
                    await self._prepare_retry(rpc_error)
                if self._cancelled.is_set():
                    break
                self._call = self._open()
            except asyncio.CancelledError:
                if task_is_cancelled():
                    self.cancel()
                    raise
                if not self._cancelled.is_set():
                    raise Cancelled(CLOSED) from None
                break
            else:
                if response is grpc.aio.EOF:
                    break
                self._received = True
                return wire.delta(cast(inference_pb2.GenerateStreamResponse, response))
        self._ended = True
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.cancel()

    def _open(self) -> "ResponseCall[Any, inference_pb2.GenerateStreamResponse]":
        return self._open_call(self._tries.time_left_s(time.monotonic()))

    async def _prepare_retry(self, rpc_error: grpc.RpcError) -> None:
        """Wait until the next try, or until somebody cancels; raise the error if there is none."""
        error = self._as_error(rpc_error)
        delay_s = None if self._received else self._tries.delay_after_s(error, now_s=time.monotonic())
        if delay_s is None:
            self._ended = True
            raise error from rpc_error
        try:
            await asyncio.wait_for(self._cancelled.wait(), delay_s)
        except TimeoutError:
            return


def task_is_cancelled() -> bool:
    """Whether a CancelledError is the task's own; gRPC also raises one when a call or its channel was ended on this side."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
