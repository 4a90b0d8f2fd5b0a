"""A rank's main loop: receive a plan, execute it, answer."""

import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from quire.common.curve import CurveKeys, keys_for, secure_client
from quire.common.errors import InternalError
from quire.common.messages import RankHello, StepAck, StepPlan, decode_rank_down, encode
from quire.worker.launched_step import LaunchedStep
from quire.worker.rank_gauges import RankGauges
from quire.worker.rank_spec import RankSpec
from quire.worker.runner import Runner
from quire.worker.step_trace import StepTrace

_log = logging.getLogger(__name__)

# Messages that may wait on the socket in either direction; the scheduler has at most two plans outstanding.
MAX_QUEUED_MESSAGES: Final = 64
# Steps that are under way at once: as many plans as a scheduler has outstanding.
MAX_STEPS_LAUNCHED: Final = 2
# A rank says hello this often until a scheduler has a plan for it: at its start, when the scheduler may not know its group yet,
# and when the scheduler is gone.
HELLO_AGAIN_S: Final = 0.5
# At its start sooner, each time twice as late: a scheduler that starts beside it knows the group in a moment.
FIRST_HELLO_AGAIN_S: Final = 0.02
# How long an exiting rank waits for its last messages to leave.
LINGER_S: Final = 1.0
# Bytes that signals left on the pair that wakes the loop, taken at a time.
WAKE_BYTES: Final = 64
# How long a message may wait for room on the socket before the scheduler counts as gone.
SEND_TIMEOUT_S: Final = 5.0


class RankLoop:
    """The link to the scheduler and what comes through it."""

    def __init__(self, spec: RankSpec, runner: Runner, *, phases_s: Mapping[str, float] | None = None) -> None:
        """phases_s: what the phases of the rank's start took, which it tells with its gauges."""
        self._spec = spec
        self._gauges = RankGauges(spec.device, phases_s or {})
        self._runner = runner
        self._trace = StepTrace(Path(spec.trace_path), device=spec.device) if spec.trace_path else None
        self._term = spec.term
        self._next_step_id = 0
        self._is_stopping = False
        self._hello_again_s: float | None = None  # when to say hello again; None while the scheduler knows us
        self._hello_pause_s = HELLO_AGAIN_S  # from that one to the next
        self._link_broke_s = 0.0

    def run(self, hello: RankHello) -> int:
        """Say hello and obey plans until the end; the process's exit code.

        0 after SIGTERM; 1 after an error, which the last StepAck names, and when no plan came for rank_lease_s.
        """
        # The handler's byte on this pair ends a poll that is under way: a flag alone could be set just before it.
        wake, wake_writer = socket.socketpair()
        wake_writer.setblocking(False)
        signal.set_wakeup_fd(wake_writer.fileno())
        signal.signal(signal.SIGTERM, self._stop)
        if self._trace is not None:
            signal.signal(signal.SIGUSR1, self._ask_for_trace)
        context = zmq.Context()
        link = context.socket(zmq.DEALER)
        link.setsockopt(zmq.IDENTITY, self._spec.name.encode())
        link.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        link.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
        link.setsockopt(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1000))
        link.setsockopt(zmq.LINGER, int(LINGER_S * 1000))
        keys = keys_for(self._spec.scheduler_address, CurveKeys.of_spec(self._spec.curve) if self._spec.curve is not None else None)
        if keys is not None:
            secure_client(link, keys)
        monitor = link.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        link.connect(self._spec.scheduler_address)
        try:
            link.send(encode(hello))
            self._hello_again_s = time.monotonic() + FIRST_HELLO_AGAIN_S
            self._hello_pause_s = 2 * FIRST_HELLO_AGAIN_S
            return self._obey(link, monitor, wake, hello)
        except zmq.Again:
            _log.error("the scheduler took no message for %g s; exiting", SEND_TIMEOUT_S)
            return 1
        finally:
            link.disable_monitor()
            monitor.close(linger=0)
            link.close()
            context.term()
            signal.set_wakeup_fd(-1)
            wake.close()
            wake_writer.close()

    def _obey(self, link: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]", wake: socket.socket, hello: RankHello) -> int:
        poller = zmq.Poller()
        poller.register(link, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        poller.register(wake.fileno(), zmq.POLLIN)
        launched: deque[LaunchedStep] = deque()
        lease_end_s = time.monotonic() + self._spec.rank_lease_s
        while not self._is_stopping:
            term, step_id = self._term, self._next_step_id
            try:
                if launched and (launched[0].is_done() or len(launched) >= MAX_STEPS_LAUNCHED):
                    self._answer(link, launched.popleft())
                    lease_end_s = time.monotonic() + self._spec.rank_lease_s
                    continue
                left_s = lease_end_s - time.monotonic()
                if left_s <= 0 and not launched:
                    _log.error("no plan for %g s (rank_lease_s); exiting", self._spec.rank_lease_s)
                    return 1
                if self._hello_again_s is not None:
                    left_s = min(left_s, self._say_hello_again(link, hello))
                # Rounded up: a poll of 0 ms would turn the last millisecond of the lease into a busy loop. While the device
                # computes, the next plan and its result are both awaited, and only asking for both by turns answers to both.
                ready = dict(poller.poll(0 if launched else int(left_s * 1000) + 1))
                if monitor in ready:
                    monitor.recv_multipart()
                    _log.warning("the scheduler is gone; the model stays for the next one")
                    self._hello_again_s = self._link_broke_s = time.monotonic()
                if wake.fileno() in ready:
                    wake.recv(WAKE_BYTES)
                if link not in ready:
                    continue
                plan = decode_rank_down(link.recv())
                if plan.term < self._term or (plan.term == self._term and plan.step_id < self._next_step_id):
                    continue  # of a scheduler that has been replaced; or sent again, because we said hello again
                term, step_id = plan.term, plan.step_id
                # Of our own term it may be one that the lost scheduler had sent; a scheduler that is still the same sends more.
                if plan.term > self._term or time.monotonic() - self._link_broke_s > self._spec.rank_lease_s / 3:
                    self._hello_again_s = None
                if plan.term > self._term:
                    launched.clear()  # nobody waits for them any more
                self._check_order(plan)
                launched.append(self._launch(plan))
            except zmq.Again:
                raise
            except Exception as error:
                _log.exception("step %d of term %d failed; exiting", step_id, term)
                link.send(encode(StepAck(term=term, step_id=step_id, rank=self._spec.rank, error=_describe(error))))
                return 1
        _log.info("stopped by SIGTERM after %d steps", self._next_step_id)
        return 0

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        if self._trace is None:
            return self._runner.launch(plan)
        with self._trace.step():
            return self._runner.launch(plan)

    def _say_hello_again(self, link: "zmq.Socket[bytes]", hello: RankHello) -> float:
        """Say hello if it is time; the seconds until it is time again."""
        assert self._hello_again_s is not None
        now_s = time.monotonic()
        if now_s >= self._hello_again_s:
            link.send(encode(msgspec.structs.replace(hello, term=self._term)))
            self._hello_again_s = now_s + self._hello_pause_s
            self._hello_pause_s = min(2 * self._hello_pause_s, HELLO_AGAIN_S)
        return max(0.0, self._hello_again_s - now_s)

    def _answer(self, link: "zmq.Socket[bytes]", step: LaunchedStep) -> None:
        result, ack = step.finish()
        if self._spec.rank == 0:
            link.send(encode(result))
        gauges = self._gauges.due()
        link.send(encode(msgspec.structs.replace(ack, gauges=gauges) if gauges else ack))

    def _check_order(self, plan: StepPlan) -> None:
        """Steps of a term are dense. A higher term starts anew: its scheduler knows nothing of the rows held here."""
        if plan.term > self._term:
            _log.info("term %d replaces term %d; rows and copies are forgotten", plan.term, self._term)
            self._term = plan.term
            self._next_step_id = 0
            self._runner.clear()
        if plan.step_id != self._next_step_id:
            raise InternalError(f"step {plan.step_id} came where step {self._next_step_id} was due; a plan was lost")
        self._next_step_id += 1

    def _stop(self, *_: Any) -> None:
        self._is_stopping = True

    def _ask_for_trace(self, *_: Any) -> None:
        assert self._trace is not None, "only then is there a handler"
        self._trace.ask()


def _describe(error: Exception) -> str:
    if isinstance(error, msgspec.MsgspecError):
        return f"a message could not be decoded: {error}; scheduler and rank may be of different versions"
    return f"{type(error).__name__}: {error}"
