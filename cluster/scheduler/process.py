"""The scheduler's only edge: its sockets, its clock, its loop. `python -m quire.cluster.scheduler.process`."""

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from quire.cluster.scheduler.journal import JournaledScheduler
from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common import metric_names as names
from quire.common.child_process import enter_child
from quire.common.clock import Clock, monotonic
from quire.common.curve import CurveKeys, Doorman, keys_for, secure_server
from quire.common.messages import (
    PROTOCOL_VERSION,
    AttachGroup,
    Cancel,
    DetachGroup,
    DrainGroup,
    Finish,
    Hello,
    RankHello,
    Status,
    StatusRequest,
    StepAck,
    StepResult,
    Submit,
    decode_control_down,
    decode_rank_up,
    decode_session_down,
    encode,
)
from quire.common.process_samples import own_samples

log = logging.getLogger("quire.scheduler")

# Messages that may wait in a socket for a peer that does not read. A gateway that leaves this many unread is given up: its
# requests are cancelled. One message carries a whole step, so this is minutes of decoding.
SEND_QUEUE_MESSAGES: Final = 10_000
# Messages taken from one socket before the others and the plans get their turn.
MAX_MESSAGES_PER_TURN: Final = 256
# Longest wait for a message, so that a termination signal is never missed for longer.
MAX_POLL_S: Final = 1.0
# Unexpected errors while handling messages, in a row, after which the process stops.
MAX_ERRORS_IN_A_ROW: Final = 10

# Plans of a group that are not answered at any time.
MAX_PLANS_OUTSTANDING: Final = 2

CONTROLLER_IDENTITY: Final = b"controller"

# A journal of this size is not continued: with 256 running sequences, hours of steps.
MAX_JOURNAL_BYTES: Final = 2**32


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """What the process is started with."""

    session_address: str  # ZeroMQ address that gateways connect to
    steps_address: str  # that ranks connect to
    control_address: str  # that the controller connects to
    log_level: str = "info"
    curve: dict[str, str] | None = None  # CurveKeys of the cluster, for addresses that are TCP


class SchedulerProcess:
    """Carries messages between sockets and the Scheduler."""

    def __init__(self, config: ProcessConfig, scheduler: Scheduler, *, clock: Clock = monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._poller = zmq.Poller()
        keys = CurveKeys.of_spec(config.curve) if config.curve is not None else None
        # Before any socket is bound: without it, whoever knows the scheduler's public key would be let in.
        self._doorman = Doorman(context, keys) if keys is not None else None
        if self._doorman is not None:
            self._poller.register(self._doorman.socket, zmq.POLLIN)
        self._session = _router(context, config.session_address, keys)
        self._steps = _router(context, config.steps_address, keys)
        self._control = _router(context, config.control_address, keys)
        self._handlers: dict[zmq.Socket[bytes], Callable[[bytes, bytes], None]] = {
            self._session: self._on_session,
            self._steps: self._on_steps,
            self._control: self._on_control,
        }
        for socket in self._handlers:
            self._poller.register(socket, zmq.POLLIN)
        # The latest plans of each group and their term, encoded: a rank whose link broke may have missed them.
        self._sent: dict[str, tuple[int, deque[bytes]]] = {}
        self._num_errors_in_a_row = 0
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop` is called."""
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        """Wait for messages or for the next thing that time alone does, take them in, and send what follows."""
        timeout_s = min(self._scheduler.next_wake_s(self._clock()), MAX_POLL_S)
        for socket, _ in self._poller.poll(int(timeout_s * 1000) + 1):
            if self._doorman is not None and socket is self._doorman.socket:
                self._doorman.answer()
                continue
            for _ in range(MAX_MESSAGES_PER_TURN):
                try:
                    peer, frame = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._handle(self._handlers[socket], peer, frame)
        now_s = self._clock()
        self._scheduler.tick(now_s)
        for group_id in list(self._scheduler.groups):
            self._send_plans(group_id, now_s)
        self._flush()

    def _handle(self, handler: Callable[[bytes, bytes], None], peer: bytes, frame: bytes) -> None:
        """One bad message must not end the loop. A broken invariant does: after it, tokens could be wrong. So do many errors in
        a row, which mean that we are broken in some other way."""
        try:
            handler(peer, frame)
            self._num_errors_in_a_row = 0
        except msgspec.DecodeError as error:
            log.warning("a message from %r is not one of ours: %s", peer, error)
        except AssertionError:
            raise
        except Exception:
            self._num_errors_in_a_row += 1
            log.exception("a message from %r could not be handled (%d in a row)", peer, self._num_errors_in_a_row)
            if self._num_errors_in_a_row >= MAX_ERRORS_IN_A_ROW:
                raise

    def _on_session(self, peer: bytes, frame: bytes) -> None:
        message = decode_session_down(frame)
        match message:
            case Hello():
                _warn_of_version(peer, message.version)
                self._scheduler.hello(peer, message)  # its Welcome names our version; the gateway refuses to go on
            case Submit():
                self._scheduler.submit(peer, message, self._clock())
            case Finish():
                self._scheduler.finish(peer, message, self._clock())
            case Cancel():
                self._scheduler.cancel(peer, message)

    def _on_steps(self, peer: bytes, frame: bytes) -> None:
        message = decode_rank_up(frame)
        group_id = peer.decode().rpartition("/")[0]
        match message:
            case RankHello():
                group = self._scheduler.groups.get(message.group_id)
                if group is None or not group.is_ready:  # else it only wants to know whether we have a plan
                    log.info("rank %r is there under term %d with %d blocks", peer.decode(), message.term, message.num_gpu_blocks)
                self._send_again(peer, message)
                self._scheduler.rank_hello(message, self._clock())
            case StepResult():
                self._scheduler.apply(group_id, message, self._clock())
            case StepAck():
                self._scheduler.ack(group_id, message, self._clock())
        # The ranks must not wait while other messages are handled. Tokens leave with the turn's end.
        self._send_plans(group_id, self._clock())

    def _on_control(self, peer: bytes, frame: bytes) -> None:
        message = decode_control_down(frame)
        match message:
            case AttachGroup():
                _warn_of_version(peer, message.version)
                self._scheduler.attach(message, self._clock())
            case DetachGroup():
                self._scheduler.detach(message, self._clock())
            case DrainGroup():
                self._scheduler.drain(message)
            case StatusRequest():
                samples = own_samples(names.SCHEDULER_CPU, names.SCHEDULER_MEMORY)
                self._scheduler.status(message.query_id, self._clock(), has_blocks=message.has_blocks, samples=samples)

    def _send_plans(self, group_id: str, now_s: float) -> None:
        group = self._scheduler.groups.get(group_id)
        if group is None or not group.is_ready:
            return
        while True:
            start_s = self._clock()
            plan = self._scheduler.next_plan(group_id, now_s)
            if plan is None:
                return
            group.counters.plan_s.observe(self._clock() - start_s)
            frame = encode(plan)
            term, frames = self._sent.get(group_id, (0, deque[bytes]()))
            if term != plan.term:
                frames = deque(maxlen=MAX_PLANS_OUTSTANDING)
            frames.append(frame)
            self._sent[group_id] = plan.term, frames
            for rank in range(group.config.tensor_parallel_size):
                # A rank that is gone cannot be reached; its silence ends the term, so nothing is to be done here.
                self._send(self._steps, f"{group_id}/{rank}".encode(), frame)

    def _send_again(self, peer: bytes, hello: RankHello) -> None:
        """A rank that says hello to a scheduler that plans for it already may have missed plans. It leaves out what it has."""
        group = self._scheduler.groups.get(hello.group_id)
        term, frames = self._sent.get(hello.group_id, (0, deque[bytes]()))
        if group is not None and group.is_ready and group.term == term and group.oldest_term <= hello.term <= term:
            for frame in frames:
                self._send(self._steps, peer, frame)

    def _flush(self) -> None:
        outbox = self._scheduler.take_outbox()
        lost: set[bytes] = set()
        for gateway, message in outbox.to_gateways:
            if gateway not in lost and not self._send(self._session, gateway, encode(message)):
                lost.add(gateway)
        for gateway in lost:
            log.warning("gateway %r is gone or does not read; its requests are cancelled", gateway)
            self._scheduler.gateway_lost(gateway)
        for control_message in outbox.to_controller:
            if not isinstance(control_message, Status):
                log.info("%s", control_message)
            self._send(self._control, CONTROLLER_IDENTITY, encode(control_message))

    @staticmethod
    def _send(socket: "zmq.Socket[bytes]", peer: bytes, frame: bytes) -> bool:
        """Whether the peer is there and had room for one more message."""
        try:
            socket.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True


def _warn_of_version(peer: bytes, version: int) -> None:
    if version != PROTOCOL_VERSION:
        log.error("%r speaks version %d, this scheduler %d; run one version of Quire on all hosts", peer, version, PROTOCOL_VERSION)


def _router(context: "zmq.Context[zmq.Socket[bytes]]", address: str, keys: CurveKeys | None) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.ROUTER)
    if (own_keys := keys_for(address, keys)) is not None:
        secure_server(socket, own_keys)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to someone who is gone is an error, not a silent loss
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that comes back under its name takes the place of its old link
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    return socket


class _JournalFile:
    """Where a journal goes, up to a bound."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: of a process that is killed, the last thing that it was told is the one to know.
        self._file = path.open("wb", buffering=0)
        self._num_bytes_left = MAX_JOURNAL_BYTES

    def write(self, record: bytes) -> None:
        if self._num_bytes_left <= 0:
            return
        try:
            self._file.write(record)
        except OSError as error:
            log.error("the journal ends here: %s", error)
            self._num_bytes_left = 0
            return
        self._num_bytes_left -= len(record)
        if self._num_bytes_left <= 0:
            log.warning("the journal ends here: it has %d bytes, as many as one may have", MAX_JOURNAL_BYTES)


def main(spec: dict[str, Any]) -> int:
    """Run until SIGTERM."""
    config = ProcessConfig(**spec["process"])
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s scheduler: %(message)s", stream=sys.stderr)
    scheduler_config = SchedulerConfig(**spec["scheduler"])
    journal = spec.get("journal")
    scheduler = JournaledScheduler(scheduler_config, _JournalFile(Path(journal)).write) if journal else Scheduler(scheduler_config)
    process = SchedulerProcess(config, scheduler)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: process.stop())
    log.info("pid %d serves %s", os.getpid(), config.session_address)
    process.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(enter_child()))
