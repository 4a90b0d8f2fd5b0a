"""A real scheduler process and a real rank process for a gateway, without Ray: the test kills, restarts and attaches them."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import zmq

from quire.bench.dealer import connect_dealer
from quire.cluster.scheduler.process import CONTROLLER_IDENTITY
from quire.common.child_process import start_child, stop_child
from quire.common.config import ModelConfig, plan_model
from quire.common.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    AttachGroup,
    GroupReady,
    RankHello,
    Status,
    StatusRequest,
    decode_control_up,
    encode,
)
from quire.worker.rank_spec import make_rank_spec

GROUP: Final = "quire-tales-0"
RANK: Final = b"quire-tales-0/0"
START_TIMEOUT_S: Final = 120.0
# Longer than a scheduler is gone in a test.
RANK_LEASE_S: Final = 60.0
# How often the relay looks whether it is to end.
RELAY_POLL_MS: Final = 50


class EngineProcesses:
    """The built-in model on one CPU rank, in float32."""

    def __init__(self, folder: Path) -> None:
        self.plan = plan_model(ModelConfig(device="cpu", gpu_blocks=600, num_threads=1, max_sequences=32))
        self.addresses = {link: f"ipc://{folder / link}" for link in ("session", "steps", "control")}
        self._folder = folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = connect_dealer(self._context, self.addresses["control"], CONTROLLER_IDENTITY)
        self.term = 0
        self._num_queries = 0
        self._rank_link = self._context.socket(zmq.ROUTER)
        self._rank_link.setsockopt(zmq.LINGER, 0)
        self._rank_link.bind(f"ipc://{folder / 'rank'}")
        self._start_scheduler()
        spec = make_rank_spec(
            self.plan, group_id=GROUP, term=1, rank=0, scheduler_address=f"ipc://{folder / 'rank'}",
            rank_lease_s=RANK_LEASE_S, log_level="info", folder=folder,
        )  # fmt: skip
        self._attach()
        self.rank = start_child("quire.worker.rank_process", asdict(spec), log_path=folder / "rank.log")
        self._await_ready()

    async def restart_scheduler(self) -> None:
        """kill -9, a new process at the same addresses, and the rank, which lives, under a higher term.

        Processes are started on the main thread, for they end with the thread that starts them; the gateway runs on meanwhile.
        """
        self.scheduler.kill()
        self.scheduler.wait()
        self._start_scheduler()
        await asyncio.to_thread(self._attach_again)

    def _attach_again(self) -> None:
        self._stop_relay()
        self._attach()
        self._say_hello_again()
        self._await_ready()

    def status(self) -> Status:
        self._num_queries += 1
        self._control.send(encode(StatusRequest(self._num_queries)))
        while True:
            message = self._receive()
            if isinstance(message, Status) and message.query_id == self._num_queries:
                return message

    def close(self) -> None:
        for child in (self.rank, self.scheduler):
            stop_child(child)
        self._stop_relay()
        self._context.destroy(linger=0)

    def _start_scheduler(self) -> None:
        process = {f"{link}_address": address for link, address in self.addresses.items()}
        scheduler = {"scheduler_id": f"scheduler-{self.term + 1}", "heartbeat_s": RANK_LEASE_S / 3, "min_step_timeout_s": 60.0}
        spec = {"process": process, "scheduler": scheduler}
        self.scheduler = start_child("quire.cluster.scheduler.process", spec, log_path=self._folder / "scheduler.log")

    def _attach(self) -> None:
        """Have the scheduler know the group, and then its rank's messages reach it."""
        plan = self.plan
        self.term += 1
        self._control.send(
            encode(
                AttachGroup(
                    PROTOCOL_VERSION, GROUP, self.term, plan.name, 1, plan.block_size, plan.max_model_len, plan.max_sequences,
                    plan.max_batched_tokens, plan.preemption,
                )
            )
        )  # fmt: skip
        self.status()  # answered behind the attachment
        self._steps = connect_dealer(self._context, self.addresses["steps"], RANK)
        self._relay_ends = threading.Event()
        self._relay = threading.Thread(target=self._run_relay)
        self._relay.start()

    def _run_relay(self) -> None:
        """Carry messages between rank and scheduler. So a hello in the rank's name comes on the connection that plans go by."""
        poller = zmq.Poller()
        for socket in (self._rank_link, self._steps):
            poller.register(socket, zmq.POLLIN)
        while not self._relay_ends.is_set():
            for socket, _ in poller.poll(RELAY_POLL_MS):
                if socket is self._steps:
                    self._rank_link.send_multipart([RANK, self._steps.recv()])
                else:
                    self._steps.send(self._rank_link.recv_multipart()[1])

    def _stop_relay(self) -> None:
        self._relay_ends.set()
        self._relay.join()
        self._steps.close()

    def _say_hello_again(self) -> None:
        """In the place of whoever attaches ranks that outlived their scheduler: a rank says hello once in its life."""
        socket = connect_dealer(self._context, f"ipc://{self._folder / 'rank'}", f"attaches-{self.term}".encode())
        socket.send(
            encode(
                RankHello(
                    PROTOCOL_VERSION, GROUP, self.term, 0, self.plan.num_gpu_blocks or 0, self.plan.num_cpu_blocks, self.plan.block_bytes,
                    0.0, 0.0, (), self.plan.max_sequences, "the same", LAYOUT_VERSION,
                )
            )
        )  # fmt: skip
        self._hello_socket = socket  # closed with the context: it must live until the message has left

    def _await_ready(self) -> None:
        while not isinstance(message := self._receive(), GroupReady) or message.term != self.term:
            pass

    def _receive(self) -> Any:
        assert self._control.poll(int(START_TIMEOUT_S * 1000)), f"the scheduler is silent; logs are in {self._folder}"
        return decode_control_up(self._control.recv())


@contextlib.contextmanager
def engine_processes() -> Iterator[EngineProcesses]:
    """Ready; ended with the context. Paths of sockets are short, so the folder is not the test's own."""
    with tempfile.TemporaryDirectory(prefix="q", dir="/tmp") as folder:
        engine = EngineProcesses(Path(folder))
        try:
            yield engine
        finally:
            engine.close()
