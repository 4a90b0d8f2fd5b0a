"""A process that gateways take for a scheduler: `python -m quire.bench.gateway_engine`. It computes nothing and ticks.

Each tick is one Tokens message with one token of every request that runs, as a step of a real group is.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import zmq

from quire.bench.gateway_measures import EngineRecord
from quire.common.child_process import enter_child
from quire.common.clock import monotonic
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    EndReason,
    Finish,
    Finished,
    Hello,
    ModelLimits,
    SessionUp,
    Spans,
    Submit,
    Tokens,
    UsageCounts,
    Welcome,
    decode_session_down,
    encode,
)

# Longest wait for a message while nothing runs.
IDLE_POLL_S: Final = 0.1
# Messages that may wait for a gateway that is slower than the ticks; beyond them ticks wait.
SEND_QUEUE_MESSAGES: Final = 1_000
# Tokens are drawn from these ids of any vocabulary, in turn.
FIRST_TOKEN_ID: Final = 300
NUM_TOKEN_IDS: Final = 1_000


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What the process is started with."""

    session_address: str  # that gateways connect to
    report_address: str  # where it is told its tick, and tells what happened since it was told the last one
    model: str
    max_request_tokens: int


@dataclass(slots=True)
class _Running:
    submit: Submit
    gateway: bytes
    token_s: list[float]
    num_tokens: int = 0


class GatewayEngine:
    """Ticks for as long as something runs."""

    def __init__(self, spec: EngineSpec) -> None:
        self._limits = (ModelLimits(spec.model, 16, spec.max_request_tokens),)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._session = context.socket(zmq.ROUTER)
        self._session.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        self._session.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full queue makes the tick wait; else its tokens would be lost
        self._session.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._session.bind(spec.session_address)
        self._report = context.socket(zmq.REP)
        self._report.bind(spec.report_address)
        self._poller = zmq.Poller()
        for socket in (self._session, self._report):
            self._poller.register(socket, zmq.POLLIN)
        self._running: dict[int, _Running] = {}  # by handle
        self._handles: Iterator[int] = itertools.count()
        self._tick_s = 0.01
        self._next_tick_s = 0.0
        self._record = EngineRecord()

    def run(self) -> None:
        """Until the process is ended."""
        while True:
            self._turn()

    def _turn(self) -> None:
        timeout_s = max(0.0, self._next_tick_s - monotonic()) if self._running else IDLE_POLL_S
        # poll() counts whole milliseconds, so it waits for messages and the rest of the time is slept.
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._report in ready:
            self._tell()
        if self._session in ready:
            self._read()
        elif self._running:
            time.sleep(max(0.0, min(0.001, self._next_tick_s - monotonic())))
        if self._running and monotonic() >= self._next_tick_s:
            self._tick()

    def _read(self) -> None:
        gateway, frame = self._session.recv_multipart()
        message = decode_session_down(frame)
        match message:
            case Hello():
                self._running.clear()
                self._send(gateway, Welcome(PROTOCOL_VERSION, "bench-engine", self._limits, 1))
            case Submit():
                handle, now_s, seed = next(self._handles), monotonic(), message.sampling.seed
                if not self._running:
                    self._next_tick_s = now_s + self._tick_s
                self._record.submit_s[seed] = now_s
                token_s = self._record.token_s[seed] = []
                self._running[handle] = _Running(message, gateway, token_s)
                self._send(gateway, Accepted(message.request_id, message.attempt, handle))
            case Cancel() | Finish():
                self._record.num_cancels += 1
                for handle, running in list(self._running.items()):
                    if running.submit.request_id == message.request_id:
                        del self._running[handle]

    def _tick(self) -> None:
        """A token of each. A tick that comes late is not made up for: as with a real step, the next one waits for it."""
        now_s = monotonic()
        self._next_tick_s = max(self._next_tick_s + self._tick_s, now_s)
        by_gateway: dict[bytes, list[tuple[int, _Running]]] = {}
        for handle, running in self._running.items():
            running.token_s.append(now_s)
            by_gateway.setdefault(running.gateway, []).append((handle, running))
        for gateway, entries in by_gateway.items():
            ones = (1,) * len(entries)
            offsets = tuple(running.num_tokens for _, running in entries)
            token_ids = tuple(FIRST_TOKEN_ID + (7 * handle + running.num_tokens) % NUM_TOKEN_IDS for handle, running in entries)
            self._send(gateway, Tokens(tuple(handle for handle, _ in entries), (0,) * len(entries), offsets, ones, token_ids))
            for handle, running in entries:
                running.num_tokens += 1
                if running.num_tokens == running.submit.max_tokens:
                    usage = UsageCounts(len(running.submit.prompt_ids), 0, running.num_tokens)
                    self._send(gateway, Finished(handle, 0, EndReason.LENGTH, None, True, usage, Spans(0.0, 0.0, 0.0, 0.0)))
                    del self._running[handle]

    def _tell(self) -> None:
        """What happened so far; from now on there is another tick."""
        self._tick_s = float(json.loads(self._report.recv())["tick_s"])
        self._report.send(json.dumps(asdict(self._record)).encode())
        self._record = EngineRecord()

    def _send(self, gateway: bytes, message: SessionUp) -> None:
        self._session.send_multipart([gateway, encode(message)])


def main(spec: dict[str, Any]) -> int:
    """Run until SIGTERM ends the process."""
    GatewayEngine(EngineSpec(**spec)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(enter_child()))
