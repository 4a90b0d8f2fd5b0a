"""The real scheduler process over real sockets, with a rank that computes nothing and a gateway that only counts tokens."""

import contextlib
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

import zmq

from quire.bench.dealer import connect_dealer
from quire.bench.echo_rank import EchoRank
from quire.bench.process_cpu import process_cpu_s
from quire.bench.scheduler_feed import GATEWAY
from quire.bench.steady_decode import GROUP_ID, MAX_PROMPT_TOKENS, SteadyDecode
from quire.cluster.scheduler.process import CONTROLLER_IDENTITY
from quire.common.child_process import start_child, stop_child
from quire.common.errors import InternalError
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    ControlUp,
    Failed,
    Finished,
    GroupLost,
    GroupReady,
    Hello,
    Rejected,
    SessionUp,
    Status,
    StatusRequest,
    StepPlan,
    Tokens,
    Welcome,
    decode_control_up,
    decode_rank_down,
    decode_session_up,
    encode,
)

# Longest silence of the process while it owes an answer, its start included; it is looked for each second.
MAX_SILENCE_S: Final = 60
# Plans of a group that may wait for their answers.
PLANS_AHEAD: Final = 2
# Rest before the process's clock is read: by then it has done what the last message asked for, and sleeps.
SETTLE_S: Final = 0.02
# Several processes take turns in being measured; none may take its rank for dead while it waits.
STEP_TIMEOUT_S: Final = 3600.0


class SteadyProcess:
    """A scheduler process in steady decode, for the time of a `with`."""

    def __init__(self, load: SteadyDecode) -> None:
        self._load = load
        self._rank = EchoRank()
        self._plans: deque[StepPlan] = deque()  # not answered
        self._num_tokens = 0  # received
        self._num_seen: Counter[type] = Counter()  # other messages
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> "SteadyProcess":
        with self._exits:
            self._start()
            self._fill()
            self._exits = self._exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exits.close()

    @property
    def pid(self) -> int:
        return self._child.pid

    def measure(self, num_steps: int, *, step_s: float = 0.0) -> float:
        """Microseconds of the process's CPU per sequence and step, of the next `num_steps` ones: results received, plans made
        and sent, tokens delivered. The rank takes step_s for each; meanwhile the process sleeps and its caches grow cold.

        Raises:
            InternalError: the process ended, is silent, or refuses what it is asked.
        """
        num_running = self._load.num_running
        time.sleep(SETTLE_S)
        for socket in self._decoders:
            self._drain(socket)
        num_expected = self._num_tokens + num_running * num_steps
        start_s = process_cpu_s(self.pid)
        for _ in range(num_steps):
            time.sleep(step_s)
            self._step()
            assert self._rank.num_samples == num_running, "a sequence ended, or was not planned"
        while self._num_tokens < num_expected:
            self._read()
        time.sleep(SETTLE_S)
        spent_s = process_cpu_s(self.pid) - start_s
        assert self._num_tokens == num_expected, (self._num_tokens, num_expected)
        return spent_s * 1e6 / (num_running * num_steps)

    def _start(self) -> None:
        """The process, its group, and its gateway."""
        folder = self._exits.enter_context(tempfile.TemporaryDirectory(prefix="quire-bench-"))
        addresses = {link: f"ipc://{Path(folder, link)}" for link in ("session", "steps", "control")}
        spec = {
            "process": {f"{link}_address": address for link, address in addresses.items()} | {"log_level": "warning"},
            "scheduler": {
                "scheduler_id": "bench",
                "max_waiting_requests": self._load.num_running,
                "max_waiting_tokens": self._load.num_running * MAX_PROMPT_TOKENS,
                "first_step_timeout_s": STEP_TIMEOUT_S,
            },
        }
        self._child = start_child("quire.cluster.scheduler.process", spec)
        self._exits.callback(stop_child, self._child)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._exits.callback(context.destroy, linger=0)
        self._to_gateway = connect_dealer(context, addresses["session"], GATEWAY)
        self._to_rank = connect_dealer(context, addresses["steps"], f"{GROUP_ID}/0".encode())
        controller = connect_dealer(context, addresses["control"], CONTROLLER_IDENTITY)
        self._decoders: dict[zmq.Socket[bytes], Callable[[bytes], StepPlan | SessionUp | ControlUp]] = {
            self._to_gateway: decode_session_up,
            self._to_rank: decode_rank_down,
            controller: decode_control_up,
        }
        self._poller = zmq.Poller()
        for socket in self._decoders:
            self._poller.register(socket, zmq.POLLIN)

        controller.send(encode(self._load.attach()))
        controller.send(encode(StatusRequest(0)))  # answered behind the attachment: the rank is known from here on
        self._await(Status)
        self._to_rank.send(encode(self._load.hello()))
        self._await(GroupReady)
        self._to_gateway.send(encode(Hello(PROTOCOL_VERSION, GATEWAY.decode())))
        self._await(Welcome)

    def _fill(self) -> None:
        """Submit every request, and answer plans until the next ones decode all of them and nothing else."""
        for number, request in enumerate(self._load.submits(), 1):
            self._to_gateway.send(encode(request))
            self._await(Accepted, number)  # so that no queue on the way can run over
        while len(self._plans) < PLANS_AHEAD:
            self._read()
        while self._rank.num_samples < self._load.num_running or any(plan.chunks for plan in self._plans):
            self._step()

    def _step(self) -> None:
        """Answer the oldest plan, and wait for the next one."""
        result, ack = self._rank.execute(self._plans.popleft())
        self._to_rank.send(encode(result))
        self._to_rank.send(encode(ack))
        while len(self._plans) < PLANS_AHEAD:
            self._read()

    def _await(self, kind: type, count: int = 1) -> None:
        """Until so many messages of a kind were received in all."""
        while self._num_seen[kind] < count:
            self._read()

    def _read(self) -> None:
        """Wait for messages, and take in all that are there."""
        for socket in self._readable():
            self._drain(socket)

    def _drain(self, socket: "zmq.Socket[bytes]") -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._take(self._decoders[socket](socket.recv(zmq.NOBLOCK)))

    def _readable(self) -> "list[zmq.Socket[bytes]]":
        for _ in range(MAX_SILENCE_S):
            if ready := self._poller.poll(1000):
                return [socket for socket, _ in ready]
            if (code := self._child.poll()) is not None:
                raise InternalError(f"the scheduler process ended with code {code}; its log is above")
        raise InternalError(f"the scheduler process said nothing for {MAX_SILENCE_S} s")

    def _take(self, message: StepPlan | SessionUp | ControlUp) -> None:
        match message:
            case StepPlan():
                self._plans.append(message)
            case Tokens():
                self._num_tokens += len(message.token_ids)
            case Rejected() | Failed() | Finished() | GroupLost():
                raise InternalError(f"the scheduler process says {message}, which no load of this benchmark leads to")
            case _:
                self._num_seen[type(message)] += 1
