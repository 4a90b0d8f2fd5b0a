"""The engine by itself: the real scheduler process and rank processes. This process stands in for controller and gateway."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import zmq

from quire.bench.dealer import connect_dealer
from quire.bench.engine_run import RunMeter
from quire.bench.engine_workloads import Request
from quire.cluster.scheduler.process import CONTROLLER_IDENTITY, ProcessConfig
from quire.cluster.scheduler.scheduler import SchedulerConfig
from quire.common.child_process import start_child, stop_child
from quire.common.config import ModelPlan
from quire.common.errors import InternalError, Unavailable
from quire.common.gpu import visible_gpus
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    Cancel,
    ControlUp,
    Failed,
    Finished,
    GroupLost,
    GroupReady,
    Hello,
    Rejected,
    SamplingState,
    SequenceStart,
    SessionUp,
    Status,
    StatusRequest,
    Submit,
    Tokens,
    Welcome,
    decode_control_up,
    decode_session_up,
    encode,
)
from quire.worker.rank_spec import RankSpec, make_rank_spec

GATEWAY: Final = b"bench-gateway"
TENANT: Final = "local"
TERM: Final = 1
# A rank that hears nothing for this long exits by itself; longer than a benchmark is ever silent.
RANK_LEASE_S: Final = 60.0
# How long a step may take before the group counts as hung: a rank on a busy CPU stands still for seconds.
MIN_STEP_TIMEOUT_S: Final = 60.0
# Longest silence while something runs.
MAX_SILENCE_S: Final = 120.0
# How often the processes are looked at while nothing comes.
POLL_S: Final = 1.0
# Nothing expires while it is measured.
TIME_LEFT_S: Final = 86_400.0
# How long the trace of a few steps may take: the rank begins to listen, goes on, and writes.
TRACE_TIMEOUT_S: Final = 90.0
# The end of a log that an error shows.
LOG_TAIL_CHARS: Final = 2000

_GREEDY: Final = SamplingState(temperature=0.0)
_PHASES: Final = re.compile(r"ready in ([\d.]+) s \(([^)]*)\)")


class Engine:
    """A scheduler and one group of ranks, for the time of a `with`, which loads the model.

    log_folder: where the processes' logs go, and stay; None: to a folder that goes with them
    journal:    file for everything that the scheduler is told and plans; None for none
    """

    def __init__(
        self,
        plan: ModelPlan,
        *,
        log_folder: Path | None = None,
        journal: Path | None = None,
        start_timeout_s: float = 600.0,
        log_level: str = "info",
    ) -> None:
        self.plan = plan
        self._log_folder = log_folder
        self._journal = journal
        self._start_timeout_s = start_timeout_s
        self._log_level = log_level
        self._group_id = f"{plan.name.replace('/', '-')}-0"
        self._exits = contextlib.ExitStack()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._is_welcome = False
        self._num_runs = 0
        self._num_queries = 0
        self._status: Status | None = None
        self._meter: RunMeter | None = None
        self._start_s = 0.0
        self.ready: GroupReady | None = None
        self.startup_s: dict[str, float] = {}  # from the first process to readiness, and the slowest rank's phases

    def __enter__(self) -> "Engine":
        with self._exits:
            self._start()
            self._exits = self._exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exits.close()

    @property
    def max_request_tokens(self) -> int:
        assert self.ready is not None, "only a started engine knows"
        return self.ready.max_request_tokens

    def run(self, requests: Sequence[Request]) -> RunMeter:
        """Submit all requests at once and wait until each has ended. Nothing that an earlier run computed is found again.

        Raises:
            InternalError: a process ended, is silent, or refuses what it is asked.
        """
        meter = self.begin(requests)
        while meter.num_unfinished:
            self._read()
        return meter

    def begin(self, requests: Sequence[Request]) -> RunMeter:
        """Submit all requests at once; `read_until` then takes in what follows."""
        meter, frames = self._new_run(requests)
        for frame in frames:
            self._gateway.send(frame)
        return meter

    def run_load(self, requests: Sequence[Request], *, concurrency: int | None = None, arrivals_s: Sequence[float] = ()) -> RunMeter:
        """Submit requests as a load does, and wait until each has ended.

        concurrency: a closed loop: so many run at once, and each that ends makes room for the next
        arrivals_s:  an open loop: when each request arrives, in seconds from the start, ascending

        Raises:
            InternalError: as `run`.
        """
        assert (concurrency is None) == bool(arrivals_s), "one loop is closed, the other has arrivals"
        meter, frames = self._new_run(requests)
        num_sent = 0
        while meter.num_unfinished:
            now_s = time.perf_counter() - self._start_s
            num_ended = len(requests) - meter.num_unfinished
            while num_sent < len(requests) and (
                arrivals_s[num_sent] <= now_s if concurrency is None else num_sent - num_ended < concurrency
            ):
                meter.requests[num_sent].submit_s = now_s if concurrency is not None else arrivals_s[num_sent]
                self._gateway.send(frames[num_sent])
                num_sent += 1
            wait_s = None if concurrency is not None or num_sent == len(requests) else arrivals_s[num_sent] - now_s
            self._read(wait_s=wait_s)
        return meter

    def _new_run(self, requests: Sequence[Request]) -> tuple[RunMeter, list[bytes]]:
        """A meter of requests, which are ready to be sent; its time begins now."""
        self._num_runs += 1
        submits = [self._submit(number, request) for number, request in enumerate(requests)]
        frames = [encode(submit) for submit in submits]
        meter = self._meter = RunMeter([submit.request_id for submit in submits])
        self._start_s = time.perf_counter()
        return meter, frames

    def read_until(self, is_done: Callable[[], bool]) -> None:
        """Take in messages until `is_done` says so. Those of requests that began before the last `begin` are not counted."""
        while not is_done():
            self._read()

    def cancel_run(self, number: int, num_requests: int) -> None:
        """End what is left of the requests of a run, counted from 1, and wait until nothing runs any more."""
        for index in range(num_requests):
            self._gateway.send(encode(Cancel(_request_id(number, index), 0, None, "it has done its part")))
        deadline_s = time.perf_counter() + MAX_SILENCE_S
        while time.perf_counter() < deadline_s:
            status = self._ask_status()
            if not status.queue.num_running_requests and not status.queue.num_waiting:
                return
        raise InternalError(f"cancelled requests still ran after {MAX_SILENCE_S:g} s; the logs are in {self._logs}")

    @property
    def num_runs(self) -> int:
        return self._num_runs

    def trace(self) -> Path:
        """Trace the next steps of rank 0, while messages are taken in; the file, which goes with the logs' folder.

        Raises:
            InternalError: there is no trace after TRACE_TIMEOUT_S; fewer steps may have followed than it wants.
        """
        path = self._trace_path(0)
        path.unlink(missing_ok=True)
        self._children["rank-0"].send_signal(signal.SIGUSR1)
        deadline_s = time.perf_counter() + TRACE_TIMEOUT_S
        while not path.exists():
            if time.perf_counter() > deadline_s:
                raise InternalError(f"rank 0 wrote no trace within {TRACE_TIMEOUT_S:g} s; the logs are in {self._logs}")
            self._read(wait_s=POLL_S)
        return path

    def _trace_path(self, rank: int) -> Path:
        return self._logs.absolute() / f"rank-{rank}.trace.json.gz"

    # -- start ---------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        started_s = time.perf_counter()
        folder = Path(self._exits.enter_context(tempfile.TemporaryDirectory(prefix="quire-bench-")))
        self._logs = self._log_folder or folder
        self._logs.mkdir(parents=True, exist_ok=True)
        addresses = {link: f"ipc://{folder / link}.sock" for link in ("session", "steps", "control")}
        process = ProcessConfig(addresses["session"], addresses["steps"], addresses["control"], log_level=self._log_level)
        scheduler = SchedulerConfig("bench", heartbeat_s=RANK_LEASE_S / 3, min_step_timeout_s=MIN_STEP_TIMEOUT_S)
        spec = {
            "process": asdict(process),
            "scheduler": asdict(scheduler),
            "journal": None if self._journal is None else str(self._journal),
        }
        self._start_process("scheduler", "quire.cluster.scheduler.process", spec)
        self._specs = [
            make_rank_spec(
                self.plan,
                group_id=self._group_id,
                term=TERM,
                rank=rank,
                scheduler_address=addresses["steps"],
                rank_lease_s=RANK_LEASE_S,
                log_level=self._log_level,
                folder=folder,
            )
            for rank in range(self.plan.tensor_parallel_size)
        ]
        self._specs = [replace(rank_spec, trace_path=str(self._trace_path(rank_spec.rank))) for rank_spec in self._specs]
        for rank_spec in self._specs:
            environ = {"CUDA_VISIBLE_DEVICES": _visible_gpus(rank_spec)} if rank_spec.device == "cuda" else {}
            self._start_process(f"rank-{rank_spec.rank}", "quire.worker.rank_process", asdict(rank_spec), environ)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._exits.callback(context.destroy, linger=0)
        self._gateway = connect_dealer(context, addresses["session"], GATEWAY)
        self._controller = connect_dealer(context, addresses["control"], CONTROLLER_IDENTITY)
        self._poller = zmq.Poller()
        for socket in (self._gateway, self._controller):
            self._poller.register(socket, zmq.POLLIN)
        self._controller.send(encode(self._attach_group()))
        self._gateway.send(encode(Hello(PROTOCOL_VERSION, GATEWAY.decode())))
        while self.ready is None or not self._is_welcome:
            if time.perf_counter() - started_s > self._start_timeout_s:
                raise Unavailable(f"the engine was not ready within {self._start_timeout_s:g} s; its logs are in {self._logs}")
            self._read(silence_s=self._start_timeout_s)
        self.startup_s = {"total": round(time.perf_counter() - started_s, 3)} | self._phases()

    def _start_process(self, name: str, module: str, spec: dict[str, Any], environ: dict[str, str] | None = None) -> None:
        child = start_child(module, spec, log_path=self._logs / f"{name}.log", environ=environ)
        self._children[name] = child
        self._exits.callback(stop_child, child)

    def _attach_group(self) -> AttachGroup:
        plan = self.plan
        return AttachGroup(
            version=PROTOCOL_VERSION,
            group_id=self._group_id,
            term=TERM,
            model=plan.name,
            tensor_parallel_size=plan.tensor_parallel_size,
            block_size=plan.block_size,
            max_model_len=plan.max_model_len,
            max_sequences=plan.max_sequences,
            max_batched_tokens=plan.max_batched_tokens,
            preemption=plan.preemption,
        )

    def _phases(self) -> dict[str, float]:
        """What the ranks say of their start in their logs, by phase: the longest of each."""
        phases: dict[str, float] = {}
        for rank in range(self.plan.tensor_parallel_size):
            found = _PHASES.findall((self._logs / f"rank-{rank}.log").read_text())
            for phase in found[-1][1].split(", ") if found else ():
                name, _, seconds = phase.rpartition(" ")
                phases[name] = max(phases.get(name, 0.0), float(seconds))
        return phases

    # -- messages ------------------------------------------------------------------------------------------------------

    def _submit(self, index: int, request: Request) -> Submit:
        prompt_ids, max_tokens = request
        # A salt per run, so that not even equal prompts of two runs share what was computed.
        root = cache_root(model=self.plan.name, adapter="", tenant_scope=TENANT, cache_salt=f"run {self._num_runs}")
        return Submit(
            request_id=_request_id(self._num_runs, index),
            attempt=0,
            tenant=TENANT,
            priority=2,
            model=self.plan.name,
            adapter="",
            prompt_ids=prompt_ids,
            block_hashes=tuple(hash_full_blocks(root, prompt_ids, block_size=self.plan.block_size)),
            cache_root=root,
            sequences=(SequenceStart(0),),
            n=1,
            sampling=_GREEDY,
            max_tokens=max_tokens,
            time_left_s=TIME_LEFT_S,
            age_s=0.0,
        )

    def _ask_status(self) -> Status:
        self._num_queries += 1
        self._status = None
        self._controller.send(encode(StatusRequest(self._num_queries)))
        while self._status is None or self._status.query_id != self._num_queries:
            self._read()
        return self._status

    def _read(self, *, silence_s: float = MAX_SILENCE_S, wait_s: float | None = None) -> None:
        """Wait for messages, and take in all that are there. wait_s: not longer than this"""
        if wait_s is not None and not self._poller.poll(max(0, int(wait_s * 1000))):
            return
        silent_since_s = time.perf_counter()
        while not (ready := self._poller.poll(int(POLL_S * 1000))):
            self._check_children()
            if time.perf_counter() - silent_since_s > silence_s:
                raise InternalError(f"the scheduler process said nothing for {silence_s:g} s; the logs are in {self._logs}")
        decode: dict[zmq.Socket[bytes], Callable[[bytes], SessionUp | ControlUp]] = {
            self._gateway: decode_session_up,
            self._controller: decode_control_up,
        }
        for socket, _ in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    frame = socket.recv(zmq.NOBLOCK)
                    self._take(decode[socket](frame), time.perf_counter() - self._start_s)

    def _take(self, message: SessionUp | ControlUp, now_s: float) -> None:
        match message:
            case Welcome():
                self._is_welcome = True
            case GroupReady():
                self.ready = message
            case Status():
                self._status = message
            case GroupLost():
                self._check_children()
                raise InternalError(f"the group is lost: {message.reason}; the logs are in {self._logs}")
            case Rejected() | Failed():
                raise InternalError(f"a request was not served: {message.message} ({message.reason})")
            case Accepted() if self._meter is not None:
                self._meter.on_accepted(message)
            case Tokens() if self._meter is not None:
                self._meter.on_tokens(message, now_s)
            case Finished() if self._meter is not None:
                self._meter.on_finished(message, now_s)

    def _check_children(self) -> None:
        """Raise if a process has ended, with what it said of it."""
        for name, child in self._children.items():
            if (code := child.poll()) is None:
                continue
            if name.startswith("rank-"):
                report = Path(self._specs[int(name.removeprefix("rank-"))].report_path)
                with contextlib.suppress(OSError, ValueError, KeyError):
                    raise Unavailable(f"{name} cannot start: {json.loads(report.read_text())['error']}", reason="RANK_NOT_STARTED")
            tail = (self._logs / f"{name}.log").read_text(errors="replace")[-LOG_TAIL_CHARS:]
            raise InternalError(f"{name} ended with code {code}; its log ends with:\n{tail}")


def _request_id(run: int, index: int) -> str:
    return f"run-{run}-{index}"


def _visible_gpus(spec: RankSpec) -> str:
    """The GPUs of a rank, of those that this process may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else []
    numbered = [gpus[rank] if rank < len(gpus) else str(rank) for rank in range(spec.tensor_parallel_size)]
    return visible_gpus(numbered, rank=spec.rank)
