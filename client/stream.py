"""A stream of one request's deltas, for threads."""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import grpc

from quire.client import wire
from quire.client.results import Delta
from quire.client.retries import Tries
from quire.common.errors import QuireError
from quire.v1 import inference_pb2


class ResponseCall(Protocol):
    """What a stream needs of gRPC's call object."""

    def __next__(self) -> inference_pb2.GenerateStreamResponse: ...

    def cancel(self) -> bool: ...


class Stream(Iterator[Delta]):
    """The deltas of one request, as the server makes them.

    The request runs from the start, and ends at the server when the stream is cancelled, its `with` block is left, an
    exception (Ctrl-C too) interrupts the iteration, or its timeout runs out.

    Raises:
        QuireError: from the iteration; its subclass says what happened.
    """

    def __init__(
        self, open_call: Callable[[float | None], ResponseCall], *, tries: Tries, as_error: Callable[[grpc.RpcError], QuireError]
    ) -> None:
        """`open_call` starts the request with a timeout in seconds."""
        self._open_call = open_call
        self._tries = tries
        self._as_error = as_error
        self._received = False
        self._ended = False
        self._cancelled = threading.Event()
        self._call = self._open()

    def cancel(self) -> None:
        """End the request at the server. The iteration then ends without an error. May be called from any thread, and twice."""
        self._cancelled.set()
        self._call.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while not self._ended:
            try:
                response = next(self._call)
            except StopIteration:
                break
            except grpc.RpcError as rpc_error:
                if not self._cancelled.is_set():
                    self._prepare_retry(rpc_error)
                if self._cancelled.is_set():
                    break
                self._call = self._open()
            except BaseException:  # Ctrl-C
                self.cancel()
                raise
            else:
                self._received = True
                return wire.delta(response)
        self._ended = True
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.cancel()

    def _open(self) -> ResponseCall:
        call = self._open_call(self._tries.time_left_s(time.monotonic()))
        if self._cancelled.is_set():  # while it was opened
            call.cancel()
        return call

    def _prepare_retry(self, rpc_error: grpc.RpcError) -> None:
        """Wait until the next try, or until somebody cancels; raise the error if there is none."""
        error = self._as_error(rpc_error)
        delay_s = None if self._received else self._tries.delay_after_s(error, now_s=time.monotonic())
        if delay_s is None:
            self._ended = True
            raise error from rpc_error
        self._cancelled.wait(delay_s)
