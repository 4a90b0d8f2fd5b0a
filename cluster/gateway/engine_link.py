"""The link to the scheduler: one DEALER socket, requests down, tokens up (common/messages.py, session)."""

import asyncio
import contextlib
import logging
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from quire.cluster.gateway.request_stream import RequestStream
from quire.common.errors import Overloaded, QuireError, Unavailable, error_from_code
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    Failed,
    Finish,
    Finished,
    Hello,
    ModelLimits,
    Rejected,
    SessionDown,
    SessionUp,
    Submit,
    Tokens,
    Welcome,
    decode_session_up,
    encode,
)

log = logging.getLogger("quire.gateway")

# Messages that ZeroMQ may hold per direction. Up: a message is a whole step, so this is minutes of decoding. Down: the
# scheduler reads at once or is gone.
SEND_QUEUE_MESSAGES: Final = 10_000
RECEIVE_QUEUE_MESSAGES: Final = 10_000
# Messages that may wait for ZeroMQ to take them; a Submit beyond is refused. Cancel and Finish always go, at most two per request.
MAX_OUTBOX_MESSAGES: Final = 10_000
# Messages handled before other work gets its turn on the loop.
MAX_MESSAGES_PER_TURN: Final = 64
# A scheduler that is stopped or cut off answers no heartbeat; then the link counts as broken. Longer than its longest pause.
HEARTBEAT_INTERVAL_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 8_000
# A Hello without Welcome is said again after this.
WELCOME_TIMEOUT_S: Final = 5.0
# A Submit is accepted or rejected at once unless the scheduler hangs.
ACCEPT_TIMEOUT_S: Final = 20.0
# Pause of ZeroMQ between attempts to connect: first, and longest.
RECONNECT_MS: Final = 100
MAX_RECONNECT_MS: Final = 2_000
# What a client is told to wait after the scheduler was lost: about as long as one takes to start.
RETRY_AFTER_S: Final = 2.0
# How long the last messages of a gateway that stops may take to leave.
LINGER_MS: Final = 200
# Undecodable messages in a row after which the link is given up: then the versions differ in more than their numbers.
MAX_BAD_MESSAGES: Final = 100

_LOST: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST


class EngineStream(RequestStream):
    """A RequestStream whose reader can wait for news."""

    __slots__ = ("_accept_timer", "_news")

    def __init__(self, *, request_id: str, attempt: int, max_tokens: int) -> None:
        super().__init__(request_id, attempt, max_tokens)
        self._news = asyncio.Event()
        self._accept_timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        """Until there are unsent tokens or the request is over."""
        while not self.unsent and not self.is_over:
            self._news.clear()
            await self._news.wait()

    async def wait_until_over(self) -> None:
        """Until nothing more will come."""
        while not self.is_over:
            self._news.clear()
            await self._news.wait()

    def wake(self) -> None:
        """After each change: lets the reader look again."""
        self._news.set()

    def expect_answer(self, timer: asyncio.TimerHandle) -> None:
        """Until the scheduler has accepted or rejected the request, this timer runs."""
        self._accept_timer = timer

    def answered(self) -> None:
        """The scheduler spoke of the request, or nobody waits for that any more."""
        if self._accept_timer is not None:
            self._accept_timer.cancel()
            self._accept_timer = None


class EngineLink:
    """Gives requests to the scheduler and its answers to their streams.

    A broken link fails every request on it: the scheduler cancels them when it notices, or is gone.
    """

    def __init__(self, *, gateway_id: str, on_change: Callable[[], None] = lambda: None) -> None:
        self._gateway_id = gateway_id
        self._on_change = on_change  # called after each change of is_up
        self._context = zmq.asyncio.Context()
        self._address: str | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox: deque[SessionDown] = deque()
        self._has_outbox = asyncio.Event()
        self._by_id: dict[str, EngineStream] = {}  # not over, by the gateway's request id
        self._by_handle: dict[int, EngineStream] = {}  # those of them that were accepted
        self._limits: Mapping[str, ModelLimits] = MappingProxyType({})
        self._num_bad_messages = 0
        self._hello_timer: asyncio.TimerHandle | None = None
        self.scheduler_id: str | None = None  # None while the link is down

    @property
    def is_up(self) -> bool:
        """Whether the scheduler has welcomed this gateway and is still there."""
        return self.scheduler_id is not None

    def limits_of(self, model: str) -> ModelLimits | None:
        """What the scheduler said of a model; None if it does not know it."""
        return self._limits.get(model)

    async def connect(self, address: str) -> None:
        """Use the scheduler at this address from now on; nothing happens if it is the one in use."""
        if address == self._address:
            return
        await self._disconnect(f"the scheduler moved to {address}")
        self._address = address
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._gateway_id.encode())
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self._socket = socket
        monitor = socket.get_monitor_socket(_EVENTS)
        loops: tuple[Coroutine[Any, Any, None], ...] = (self._watch(monitor), self._send(socket), self._receive(socket))
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        socket.connect(address)

    async def close(self) -> None:
        """Cancel what is in flight and let the messages for that leave, for a moment."""
        for stream in list(self._by_id.values()):
            self.cancel(stream, reason="gateway stops")
        for task in self._tasks:
            task.cancel()
        if self._socket is not None and self.is_up:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_MS / 1000):
                    while self._outbox:
                        await self._socket.send(encode(self._outbox.popleft()))
        await self._disconnect("the gateway stops", linger_ms=LINGER_MS)
        self._context.destroy(linger=LINGER_MS)

    def submit(self, message: Submit) -> EngineStream:
        """Give a request to the scheduler.

        Raises:
            Unavailable: no scheduler is there.
            Overloaded: too many messages wait to leave.
        """
        if not self.is_up:
            raise Unavailable("the scheduler cannot be reached; try again", reason="NO_SCHEDULER", retry_after_s=RETRY_AFTER_S)
        if len(self._outbox) >= MAX_OUTBOX_MESSAGES:
            raise Overloaded(
                f"{len(self._outbox)} messages wait to reach the scheduler; try again", reason="LINK_FULL", retry_after_s=RETRY_AFTER_S
            )
        stream = EngineStream(request_id=message.request_id, attempt=message.attempt, max_tokens=message.max_tokens)
        self._by_id[stream.request_id] = stream
        loop = asyncio.get_running_loop()
        stream.expect_answer(loop.call_later(ACCEPT_TIMEOUT_S, self._no_answer, stream))
        self._put(message)
        return stream

    def finish(self, stream: EngineStream, *, kept_tokens: int) -> None:
        """Tell the scheduler that the sequence ended after its first kept_tokens tokens. Its Finished still comes."""
        if not stream.is_over:
            self._put(Finish(stream.request_id, stream.attempt, 0, kept_tokens))

    def cancel(self, stream: EngineStream, *, reason: str) -> None:
        """End a request that nobody waits for any more; nothing happens if it is over."""
        if not stream.is_over:
            self._put(Cancel(stream.request_id, stream.attempt, None, reason))
            self._end(stream, Unavailable(f"the request was cancelled: {reason}", reason="CANCELLED"))

    # -- the socket ---------------------------------------------------------------------------------------------------

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Say Hello on each new connection, and notice when it breaks."""
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                # Messages from before the break must not reach the scheduler: their requests have failed.
                self._lose("a new connection was made")
                self._say_hello()
            elif event & _LOST:
                self._lose("the connection to the scheduler broke")

    def _say_hello(self) -> None:
        """Again and again until it is answered. Only while the link is down: a Hello ends what was submitted before it."""
        self._stop_hello()
        if not self.is_up:
            self._put(Hello(PROTOCOL_VERSION, self._gateway_id))
            self._hello_timer = asyncio.get_running_loop().call_later(WELCOME_TIMEOUT_S, self._say_hello)

    def _stop_hello(self) -> None:
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None

    async def _send(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            while self._outbox:
                await socket.send(encode(self._outbox.popleft()))
            self._has_outbox.clear()
            await self._has_outbox.wait()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        num_messages = 0
        while True:
            frame = await socket.recv()
            self._handle_frame(frame)
            num_messages += 1
            if num_messages % MAX_MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _put(self, message: SessionDown) -> None:
        self._outbox.append(message)
        self._has_outbox.set()

    async def _disconnect(self, why: str, *, linger_ms: int = 0) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._stop_hello()
        self._lose(why)
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=linger_ms)
            self._socket = None

    # -- messages -----------------------------------------------------------------------------------------------------

    def _handle_frame(self, frame: bytes) -> None:
        """One bad message must not end the link; many in a row do."""
        try:
            self._handle(decode_session_up(frame))
            self._num_bad_messages = 0
        except Exception as error:
            self._num_bad_messages += 1
            where = "" if isinstance(error, msgspec.DecodeError) else "\n" + "".join(traceback.format_tb(error.__traceback__))
            log.error("a message of the scheduler cannot be used: %s%s", type(error).__name__, where)
            if self._num_bad_messages >= MAX_BAD_MESSAGES:
                self._num_bad_messages = 0
                self._lose(f"{MAX_BAD_MESSAGES} messages in a row could not be used")
                self._say_hello()

    def _handle(self, message: SessionUp) -> None:
        match message:
            case Tokens():
                self._on_tokens(message)
            case Welcome():
                self._on_welcome(message)
            case Accepted():
                stream = self._by_id.get(message.request_id)
                if stream is not None and stream.attempt == message.attempt:
                    stream.handle = message.handle
                    stream.answered()
                    self._by_handle[message.handle] = stream
            case Rejected():
                stream = self._by_id.get(message.request_id)
                if stream is not None and stream.attempt == message.attempt:
                    self._end(stream, _error_of(message))
            case Finished():
                stream = self._by_handle.get(message.handle)
                if stream is not None:
                    stream.finish(message)
                    self._forget(stream)
            case Failed():
                stream = self._by_handle.get(message.handle)
                if stream is not None:
                    self._end(stream, _error_of(message))

    def _on_tokens(self, message: Tokens) -> None:
        position = 0
        for handle, sequence, offset, count in zip(message.handles, message.sequences, message.first_offsets, message.counts, strict=True):
            token_ids = message.token_ids[position : position + count]
            position += count
            stream = self._by_handle.get(handle)
            if stream is None:
                continue  # it was cancelled, and this crossed the Cancel on the wire
            stream.receive(sequence=sequence, first_offset=offset, token_ids=token_ids)
            if stream.is_over:
                self._put(Cancel(stream.request_id, stream.attempt, None, "its tokens do not fit together"))
                self._forget(stream)
            stream.wake()

    def _on_welcome(self, message: Welcome) -> None:
        if message.version != PROTOCOL_VERSION:
            log.error("the scheduler speaks version %d, this gateway %d; run one version of Quire", message.version, PROTOCOL_VERSION)
            self._lose("the versions differ")
            return
        self._limits = MappingProxyType({limits.model: limits for limits in message.models})
        if message.scheduler_id != self.scheduler_id:
            if self.is_up:
                self._lose("the scheduler was restarted")
            self.scheduler_id = message.scheduler_id
            log.info("scheduler %s welcomed this gateway", message.scheduler_id)
        self._on_change()

    def _lose(self, why: str) -> None:
        """The scheduler is gone, or everything that it knew of this gateway's requests is."""
        if self.is_up:
            level = logging.WARNING if self._by_id else logging.INFO
            log.log(level, "the link to the scheduler is down with %d requests in flight: %s", len(self._by_id), why)
        was_up = self.is_up
        self.scheduler_id = None
        self._outbox.clear()
        for stream in list(self._by_id.values()):
            text = "the scheduler was lost while it had the request; try again"
            self._end(stream, Unavailable(text, reason="SCHEDULER_LOST", retry_after_s=RETRY_AFTER_S))
        if was_up:
            self._on_change()

    def _no_answer(self, stream: EngineStream) -> None:
        self._put(Cancel(stream.request_id, stream.attempt, None, "not answered in time"))
        text = f"the scheduler did not answer within {ACCEPT_TIMEOUT_S:g} s; try again"
        self._end(stream, Unavailable(text, reason="SCHEDULER_SILENT", retry_after_s=RETRY_AFTER_S))

    def _end(self, stream: EngineStream, error: QuireError) -> None:
        stream.fail(error)
        self._forget(stream)

    def _forget(self, stream: EngineStream) -> None:
        stream.answered()
        self._by_id.pop(stream.request_id, None)
        if stream.handle is not None:
            self._by_handle.pop(stream.handle, None)
        stream.wake()


def _error_of(message: Rejected | Failed) -> QuireError:
    return error_from_code(
        message.code, message.message, reason=message.reason, metadata=message.numbers, retry_after_s=message.retry_after_s
    )
