"""The link to the scheduler: one DEALER socket, requests down, tokens up (common/messages.py, session)."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from quire.cluster.gateway.error_place import place_of
from quire.cluster.gateway.request_stream import RequestStream, token_entries
from quire.cluster.gateway.resubmission import MAX_LOSSES, end_what_has_ended, next_attempt
from quire.common.curve import CurveKeys, keys_for, secure_client
from quire.common.errors import InternalError, Overloaded, QuireError, Unavailable, error_from_code
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    EndReason,
    Failed,
    Finish,
    Finished,
    Hello,
    ModelLimits,
    PromptLogprobs,
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
# Messages handled before other work gets its turn on the loop.
MAX_MESSAGES_PER_TURN: Final = 64
# A scheduler whose process is stopped or whose machine is cut off answers no heartbeat; then the link counts as broken. One
# that merely computes, or hangs, still answers: ZeroMQ's I/O thread does that. Such a one is noticed by accept_timeout_s.
HEARTBEAT_INTERVAL_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 8_000
# A Hello without Welcome is said again after this.
WELCOME_TIMEOUT_S: Final = 5.0
# Pause of ZeroMQ between attempts to connect: first, and longest.
RECONNECT_MS: Final = 100
MAX_RECONNECT_MS: Final = 2_000
# What a client is told to wait after the scheduler was lost: about as long as one takes to start.
RETRY_AFTER_S: Final = 2.0
# How long the last messages of a gateway that stops may take to leave.
LINGER_MS: Final = 200

_LOST: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST


@dataclass(frozen=True, slots=True)
class LinkBounds:
    """The bounds of a link."""

    # Messages that may wait for ZeroMQ to take them; a Submit beyond is refused. Cancel and Finish always go: at most one Finish
    # per sequence, and one Cancel per request.
    max_outbox_messages: int = 10_000
    # A Submit is accepted or rejected at once unless the scheduler hangs.
    accept_timeout_s: float = 20.0
    # How long a request whose scheduler was lost waits for one that takes it; longer than a scheduler and its groups need to
    # come back.
    recovery_timeout_s: float = 60.0
    # Undecodable messages in a row after which the link is given up: then the versions differ in more than their numbers.
    max_bad_messages: int = 100
    # Failures of the link's own loops, which are bugs: the link is opened anew after each, later each time, until there were
    # more than max_failures of them within failure_window_s. Then the process should end.
    max_failures: int = 5
    failure_window_s: float = 60.0
    first_backoff_s: float = 0.1  # doubled with each failure in the window


DEFAULT_BOUNDS: Final = LinkBounds()


class SchedulerStream(RequestStream):
    """A RequestStream whose reader can wait for news, and what it takes to submit the request again."""

    def __init__(self, submit: Submit, *, now_s: float) -> None:
        sampling = submit.sampling
        super().__init__(
            submit.request_id,
            submit.attempt,
            max_tokens=submit.max_tokens,
            num_sequences=submit.n if submit.beam is not None else len(submit.sequences),
            has_entries=sampling.num_logprobs is not None and submit.beam is None,
            num_prompt_entries=len(submit.prompt_ids) - 1 if sampling.num_prompt_logprobs is not None else 0,
        )
        self.submit = submit  # the first one
        self.submitted_s = now_s  # loop time of that
        self.is_lost = False  # it is at no scheduler, and waits for one
        self.num_losses = 0
        self.recover_by_s: float | None = None  # loop time; from the loss of its scheduler until another one accepts it
        self._news = asyncio.Event()
        self._answer_timer: asyncio.TimerHandle | None = None

    async def wait_for_news(self) -> None:
        """Until something changes that the reader has not seen: it looks first, and then waits."""
        self._news.clear()
        await self._news.wait()

    def wake(self) -> None:
        """After each change: lets the reader look again."""
        self._news.set()

    def expect_answer(self, timer: asyncio.TimerHandle) -> None:
        """Until a scheduler has accepted or rejected the request, this timer runs."""
        self.answered()
        self._answer_timer = timer

    def answered(self) -> None:
        """The scheduler spoke of the request, or nobody waits for that any more."""
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None


class SchedulerLink:
    """Gives requests to the scheduler and its answers to their streams.

    A broken link loses no request: the scheduler cancels them when it notices, or is gone, and each is submitted again, with
    the tokens that came, to the one that welcomes this gateway next.
    """

    # Invariant: while _address is set, either the loops in _tasks run, or _reopening does, or has_failed is set.

    def __init__(
        self,
        *,
        gateway_id: str,
        on_change: Callable[[], None] = lambda: None,
        bounds: LinkBounds = DEFAULT_BOUNDS,
        keys: CurveKeys | None = None,
    ) -> None:
        """keys: of the cluster, for a scheduler that is reached by TCP"""
        self._keys = keys
        self._gateway_id = gateway_id
        self._on_change = on_change  # called after each change of is_up
        self._bounds = bounds
        self._context = zmq.asyncio.Context()
        self._address: str | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._reopening: asyncio.Task[None] | None = None
        self._failure_times_s: deque[float] = deque()  # within the window
        self._has_failed = asyncio.Event()
        self._outbox: deque[SessionDown] = deque()
        self._has_outbox = asyncio.Event()
        self._by_id: dict[str, SchedulerStream] = {}  # not over, by the gateway's request id
        self._by_handle: dict[int, SchedulerStream] = {}  # those of them that were accepted
        self._limits: Mapping[str, ModelLimits] = MappingProxyType({})
        self._num_bad_messages = 0
        self._hello_timer: asyncio.TimerHandle | None = None
        self._retry_timer: asyncio.TimerHandle | None = None  # runs while lost requests wait that a scheduler would not take yet
        self._waits_for_schedulers = True
        self._session = 0  # the number that the last Welcome had
        self.scheduler_id: str | None = None  # None while the link is down

    @property
    def is_up(self) -> bool:
        """Whether the scheduler has welcomed this gateway and is still there."""
        return self.scheduler_id is not None

    def limits_of(self, model: str) -> ModelLimits | None:
        """What the scheduler said of a model; None if it does not know it."""
        return self._limits.get(model)

    @property
    def num_requests(self) -> int:
        """Those in flight: submitted and not over."""
        return len(self._by_id)

    def stop_waiting(self) -> None:
        """For a gateway that is about to end: what is at no scheduler now, or loses its own, fails, so that its client can go to
        another gateway."""
        self._waits_for_schedulers = False
        for stream in [stream for stream in self._by_id.values() if stream.is_lost]:
            self._give_up(stream)

    async def watch(self) -> None:
        """Wait for ever, as long as the link works or can be opened anew.

        Raises:
            InternalError: its own loops failed too often.
        """
        await self._has_failed.wait()
        text = f"the link to the scheduler failed {len(self._failure_times_s)} times within {self._bounds.failure_window_s:g} s"
        raise InternalError(text, reason="LINK_FAILED")

    async def connect(self, address: str) -> None:
        """Use the scheduler at this address from now on; nothing happens if it is the one in use.

        Raises:
            ConfigError: it is on another machine, and this gateway has no cluster key.
        """
        if address == self._address:
            return
        keys_for(address, self._keys)
        await self._stop_reopening()
        await self._disconnect(f"the scheduler moved to {address}")
        self._address = address
        self._open(address)

    async def close(self) -> None:
        """Cancel what is in flight and let the messages for that leave, for a moment."""
        await self._stop_reopening()
        for stream in list(self._by_id.values()):
            self.cancel(stream, reason="gateway stops")
        await self._stop_loops()
        if self._socket is not None and self.is_up:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_MS / 1000):
                    while self._outbox:
                        await self._socket.send(encode(self._outbox.popleft()))
        await self._disconnect("the gateway stops", linger_ms=LINGER_MS)
        self._context.destroy(linger=LINGER_MS)

    def submit(self, message: Submit) -> SchedulerStream:
        """Give a request to the scheduler.

        Raises:
            Unavailable: no scheduler is there.
            Overloaded: too many messages wait to leave.
        """
        if not self.is_up:
            raise Unavailable("the scheduler cannot be reached; try again", reason="NO_SCHEDULER", retry_after_s=RETRY_AFTER_S)
        if len(self._outbox) >= self._bounds.max_outbox_messages:
            raise Overloaded(
                f"{len(self._outbox)} messages wait to reach the scheduler; try again", reason="LINK_FULL", retry_after_s=RETRY_AFTER_S
            )
        stream = SchedulerStream(message, now_s=asyncio.get_running_loop().time())
        self._by_id[stream.request_id] = stream
        self._put_submit(stream, message)
        return stream

    def finish(self, stream: SchedulerStream, *, sequence: int, kept_tokens: int) -> None:
        """Tell the scheduler that a sequence ended after its first kept_tokens tokens. Its Finished still comes."""
        if stream.is_over or stream.sequences[sequence].finished is not None:
            return
        if stream.is_lost:
            stream.end_here(sequence, EndReason.STOP)
            self._after_news(stream)
        else:
            self._put(Finish(stream.request_id, stream.attempt, sequence, kept_tokens))

    def cancel(self, stream: SchedulerStream, *, reason: str) -> None:
        """End a request that nobody waits for any more; nothing happens if it is over."""
        if not stream.is_over:
            if not stream.is_lost:
                self._put(Cancel(stream.request_id, stream.attempt, None, reason))
            self._end(stream, Unavailable(f"the request was cancelled: {reason}", reason="CANCELLED"))

    # -- the socket ---------------------------------------------------------------------------------------------------

    def _open(self, address: str) -> None:
        socket = self._context.socket(zmq.DEALER)
        self._socket = socket
        socket.setsockopt(zmq.IDENTITY, self._gateway_id.encode())
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if (keys := keys_for(address, self._keys)) is not None:
            secure_client(socket, keys)
        monitor = socket.get_monitor_socket(_EVENTS)
        loops: tuple[Coroutine[Any, Any, None], ...] = (self._watch(monitor), self._send(socket), self._receive(socket))
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self._on_loop_end)
        socket.connect(address)

    def _on_loop_end(self, task: asyncio.Task[None]) -> None:
        """A loop ends by being cancelled, or by a bug: then the link is opened anew, a bounded number of times."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error("the link to the scheduler failed: %s", place_of(error))
        self._lose("one of its loops failed")
        now_s = asyncio.get_running_loop().time()
        times_s = self._failure_times_s
        times_s.append(now_s)
        while times_s[0] < now_s - self._bounds.failure_window_s:
            times_s.popleft()
        if len(times_s) > self._bounds.max_failures:
            self._has_failed.set()
            self.stop_waiting()
        elif self._reopening is None or self._reopening is task:
            backoff_s = self._bounds.first_backoff_s * 2 ** (len(times_s) - 1)
            self._reopening = asyncio.create_task(self._reopen(backoff_s))
            self._reopening.add_done_callback(self._on_loop_end)

    async def _reopen(self, backoff_s: float) -> None:
        await self._disconnect("it is opened anew")
        await asyncio.sleep(backoff_s)
        assert self._address is not None, "loops run only after connect"
        self._reopening = None
        self._open(self._address)

    async def _stop_reopening(self) -> None:
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
            self._reopening = None

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Say Hello on each new connection, and notice when it breaks."""
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                # Messages from before the break must not reach the scheduler: their requests are submitted anew.
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

    async def _stop_loops(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _disconnect(self, why: str, *, linger_ms: int = 0) -> None:
        await self._stop_loops()
        self._stop_hello()
        self._stop_retrying()
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
            log.error("a message of the scheduler cannot be used: %s", place_of(error))
            if self._num_bad_messages >= self._bounds.max_bad_messages:
                self._num_bad_messages = 0
                self._lose(f"{self._bounds.max_bad_messages} messages in a row could not be used")
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
                    stream.recover_by_s = None
                    self._by_handle[message.handle] = stream
            case Rejected():
                stream = self._by_id.get(message.request_id)
                if stream is not None and stream.attempt == message.attempt:
                    self._on_rejected(stream, message)
            case Finished():
                stream = self._by_handle.get(message.handle)
                if stream is not None:
                    stream.finish(message)
                    self._after_news(stream)
            case Failed():
                stream = self._by_handle.get(message.handle)
                if stream is not None:
                    self._end(stream, _error_of(message))
            case PromptLogprobs():
                stream = self._by_handle.get(message.handle)
                if stream is not None:
                    stream.receive_prompt(first_position=message.first_position, entries=token_entries(message.logprobs))
                    self._after_news(stream)

    def _on_rejected(self, stream: SchedulerStream, message: Rejected) -> None:
        """A request that ran before its scheduler was lost is not refused for what passes: no group yet, a full queue."""
        if stream.recover_by_s is None or message.retry_after_s is None:
            self._end(stream, _error_of(message))
            return
        self._await_scheduler(stream)
        if self._retry_timer is None:
            self._retry_timer = asyncio.get_running_loop().call_later(message.retry_after_s, self._retry)

    def _on_tokens(self, message: Tokens) -> None:
        position = 0
        logprobs = dict(message.logprobs)
        begun: dict[SchedulerStream, None] = {}
        going_on: dict[SchedulerStream, None] = {}
        columns = zip(message.handles, message.sequences, message.first_offsets, message.counts, strict=True)
        for index, (handle, sequence, offset, count) in enumerate(columns):
            token_ids = message.token_ids[position : position + count]
            position += count
            stream = self._by_handle.get(handle)
            if stream is None:
                continue  # it was cancelled, and this crossed the Cancel on the wire
            entries = token_entries(logprobs[index]) if index in logprobs else ()
            stream.receive(sequence=sequence, first_offset=offset, token_ids=token_ids, entries=entries)
            (begun if offset == 0 else going_on)[stream] = None
        # Readers run in the order in which they are woken: a first token, which nothing has hidden yet, does not wait for all others.
        for stream in begun | going_on:
            self._after_news(stream)

    def _after_news(self, stream: SchedulerStream) -> None:
        """Let the reader look. What does not fit together has ended the request here, and must end it there."""
        if stream.error is not None:
            self._put(Cancel(stream.request_id, stream.attempt, None, "its tokens do not fit together"))
        if stream.is_over:
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
            log.info("scheduler %s welcomed this gateway", message.scheduler_id)
        elif message.session != self._session:
            self._lose_session()
        self.scheduler_id, self._session = message.scheduler_id, message.session
        self._resubmit_lost()
        self._on_change()

    def _lose_session(self) -> None:
        """The scheduler gave this gateway up and hears of it again. Requests that were on their way when the new session began
        may have been accepted in it: the next attempt supersedes those that go on, and those that end here are cancelled."""
        cancels = [message for message in self._outbox if isinstance(message, Cancel)]
        streams = list(self._by_id.values())
        self._lose("the scheduler began another session")
        cancels += [Cancel(stream.request_id, stream.attempt, None, "its session was lost") for stream in streams if stream.is_over]
        for cancel in cancels:
            self._put(cancel)

    def _lose(self, why: str) -> None:
        """The scheduler is gone, or everything that it knew of this gateway's requests is."""
        if self.is_up:
            level = logging.WARNING if self._by_id else logging.INFO
            log.log(level, "the link to the scheduler is down with %d requests in flight: %s", len(self._by_id), why)
        was_up = self.is_up
        self.scheduler_id = None
        self._outbox.clear()
        self._by_handle.clear()
        self._stop_retrying()
        for stream in [stream for stream in self._by_id.values() if not stream.is_lost]:
            self._lose_stream(stream)
        if was_up:
            self._on_change()

    # -- requests without a scheduler ---------------------------------------------------------------------------------

    def _lose_stream(self, stream: SchedulerStream) -> None:
        end_what_has_ended(stream.submit, stream)
        if stream.is_over:
            self._forget(stream)
            return
        stream.num_losses += 1
        if stream.recover_by_s is None:
            stream.recover_by_s = asyncio.get_running_loop().time() + self._bounds.recovery_timeout_s
        if stream.num_losses >= MAX_LOSSES or not self._waits_for_schedulers:
            self._give_up(stream)
        else:
            self._await_scheduler(stream)

    def _await_scheduler(self, stream: SchedulerStream) -> None:
        assert stream.recover_by_s is not None, "it is set when the scheduler is lost"
        stream.is_lost, stream.handle = True, None
        stream.expect_answer(asyncio.get_running_loop().call_at(stream.recover_by_s, self._give_up, stream))

    def _resubmit_lost(self) -> None:
        """Those whose model the scheduler can serve; the others wait for a Welcome that says so."""
        now_s = asyncio.get_running_loop().time()
        num_submitted = 0
        for stream in self._by_id.values():
            limits = self._limits.get(stream.submit.model)
            if stream.is_lost and limits is not None and limits.max_request_tokens > 0:
                stream.is_lost = False
                self._put_submit(stream, next_attempt(stream.submit, stream, elapsed_s=now_s - stream.submitted_s))
                num_submitted += 1
        if num_submitted:
            log.info("%d requests go on at scheduler %s", num_submitted, self.scheduler_id)

    def _retry(self) -> None:
        self._retry_timer = None
        if self.is_up:
            self._resubmit_lost()

    def _stop_retrying(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None

    def _give_up(self, stream: SchedulerStream) -> None:
        text = f"the scheduler was lost while it had the request (losses: {stream.num_losses}), and no other took it; try again"
        self._end(stream, Unavailable(text, reason="SCHEDULER_LOST", retry_after_s=RETRY_AFTER_S))

    def _put_submit(self, stream: SchedulerStream, message: Submit) -> None:
        stream.expect_answer(asyncio.get_running_loop().call_later(self._bounds.accept_timeout_s, self._no_answer, stream))
        self._put(message)

    def _no_answer(self, stream: SchedulerStream) -> None:
        self._put(Cancel(stream.request_id, stream.attempt, None, "not answered in time"))
        text = f"the scheduler did not answer within {self._bounds.accept_timeout_s:g} s; try again"
        self._end(stream, Unavailable(text, reason="SCHEDULER_SILENT", retry_after_s=RETRY_AFTER_S))

    def _end(self, stream: SchedulerStream, error: QuireError) -> None:
        stream.fail(error)
        self._forget(stream)

    def _forget(self, stream: SchedulerStream) -> None:
        stream.answered()
        self._by_id.pop(stream.request_id, None)
        if stream.handle is not None:
            self._by_handle.pop(stream.handle, None)
        stream.wake()


def _error_of(message: Rejected | Failed) -> QuireError:
    return error_from_code(
        message.code, message.message, reason=message.reason, metadata=message.numbers, retry_after_s=message.retry_after_s
    )
