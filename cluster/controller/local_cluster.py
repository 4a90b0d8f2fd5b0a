"""A whole cluster on this machine: a Ray of its own, the controller, and the gateways. What `quire serve` runs."""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

import ray
from ray._private import ray_constants

from quire.cluster.controller.actor_wait import ActorWait
from quire.cluster.controller.controller import CONTROLLER_NAME, NAMESPACE, Controller, discovery_address
from quire.cluster.controller.early_ranks import EarlyRanks
from quire.cluster.controller.gateways import Gateways, gateway_spec
from quire.cluster.controller.reaper import let_go, start_reaper
from quire.cluster.controller.stop_signals import StopSignals
from quire.common.child_process import start_child, stop_child
from quire.common.config import ModelPlan, ServeConfig, request_bytes
from quire.common.curve import CLIENT_KEY, CurveKeys
from quire.common.errors import Unavailable
from quire.worker.rank_spec import make_rank_spec

# Ray's object store carries nothing of ours but actor arguments; this is the smallest size that Ray takes.
OBJECT_STORE_BYTES: Final = 80 * 2**20
# Longest temporary folder that ours can lie in: the path of a Unix socket has at most 107 bytes, and Ray adds 69 to ours.
MAX_BASE_CHARS: Final = 20
# What a rank without a GPU takes of our own Ray, which only counts: so many ranks per core are slow, and still start.
CPU_RANK_RESOURCE: Final = "rank_place"
MAX_RANKS_PER_CPU: Final = 4
# How long ranks that begin early may take until they listen; Ray takes longer to start.
EARLY_TIMEOUT_S: Final = 10.0
# How long the controller may take to end what it started.
STOP_TIMEOUT_S: Final = 30.0
# How long its answer may take once it has closed its socket, which is the last thing it does.
LAST_WORD_TIMEOUT_S: Final = 2.0
# How often the processes are looked at while waiting.
POLL_S: Final = 0.2


class LocalCluster:
    """Starts everything in `start` and ends everything that it started in `stop`.

    prepare_local_ray() (ray_environment.py) comes before this module is imported. `start` changes the process's working folder.
    """

    def __init__(self, config: ServeConfig, plan: ModelPlan, stop: StopSignals) -> None:
        self._config = config
        self._plan = plan
        self._stop = stop
        base = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="quire-", dir=base if len(base) <= MAX_BASE_CHARS else "/tmp"))  # mode 0700
        (self.folder / "logs").mkdir()
        self._reaper = start_reaper(self.folder)
        self._controller: Any = None
        self._gateways: Gateways | None = None
        self._compiler: subprocess.Popen[bytes] | None = None
        self._early: EarlyRanks | None = None
        self._over: ActorWait
        self.metrics_addresses: dict[str, str] = {}  # of the gateways and the controller, once they serve

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.stop(keep_logs=error is not None)

    def start(self) -> str:
        """Start everything and wait until it serves; the gateways' address. "" when a signal came meanwhile.

        Raises:
            QuireError: it cannot serve; the message says why and where the logs are.
        """
        deadline_s = time.monotonic() + self._config.start_timeout_s
        CurveKeys.of_folder(self.folder)  # before gateways, which read their part
        # The gateways come first and wait for the controller: their start costs nothing while Ray starts.
        self._gateways = Gateways(
            gateway_spec(
                self._config,
                discovery_address(self.folder),
                cluster_key=str(self.folder / CLIENT_KEY),
                max_request_bytes=request_bytes(
                    self._config, max_model_len=self._plan.max_model_len, vocab_size=self._plan.folder.vocab_size
                ),
            ),
            listen=self._config.listen,
            count=self._config.gateways,
            folder=self.folder,
            logs=self._logs(),
        )
        self._gateways.start()
        self._early = EarlyRanks(
            self._plan, folder=self.folder, logs=self._logs(), log_level=self._config.log_level, gpus=visible_gpu_names()
        )
        if self._plan.device == "cuda" and self._early.count == 0:
            self._compiler = self._start_compiler()
        self._stop.install()
        try:
            self._start_ray()
        except SystemExit:  # while it starts, Ray's own handler answers SIGTERM, by this
            self._stop.set()
        self._stop.install()
        if self._stop.is_set():
            return ""
        self._early.wait_listening(timeout_s=EARLY_TIMEOUT_S, is_over=self._stop.is_set)
        rank_resource = "GPU" if self._plan.device == "cuda" else CPU_RANK_RESOURCE
        options = Controller.options(name=CONTROLLER_NAME, lifetime="detached")
        self._controller = options.remote(self._config, self._plan, str(self.folder), rank_resource, discovery_address(self.folder))
        try:
            _, metrics_address = ray.get(self._controller.wait_listening.remote(), timeout=self._config.start_timeout_s)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise Unavailable(self._explain(f"the controller could not start: {error}")) from error
        self._over = ActorWait(self._controller.wait_over)
        ready = ActorWait(self._controller.wait_ready)
        is_ready = False
        while not (is_ready and self._gateways.address):
            if self._stop.is_set():
                return ""
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the cluster was not ready within {self._config.start_timeout_s:g} s; its logs are in {self._logs()}")
            self._raise_if_over()
            if not is_ready and (reason := ready.poll(timeout_s=POLL_S)) is not None:
                if reason:
                    raise Unavailable(self._explain(reason))
                is_ready = True
                self._early.end_unused()
            elif is_ready:
                time.sleep(POLL_S)
        self.metrics_addresses = {**self._gateways.metrics_addresses, "controller": str(metrics_address)}
        return self._gateways.address

    def run(self) -> None:
        """Wait for a signal.

        Raises:
            QuireError: a part died that the cluster cannot go on without.
        """
        while not self._stop.is_set():
            self._raise_if_over()

    def stop(self, *, keep_logs: bool = False) -> None:
        """End everything, clients' streams first; at once if asked a second time. The folder goes too, unless something went
        wrong."""
        is_clean = not keep_logs
        if self._gateways is not None:
            has_ended_well = self._gateways.stop(drain_timeout_s=self._config.drain_timeout_s, at_once=lambda: self._stop.count > 1)
            is_clean = has_ended_well and is_clean
        if self._compiler is not None:
            stop_child(self._compiler)
        if self._controller is not None:
            self._stop_controller()
        if self._early is not None:
            self._early.end()
        if ray.is_initialized():
            ray.shutdown()
        let_go(self._reaper)
        if is_clean:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stop_controller(self) -> None:
        """Have the controller end what it started. A SIGTERM to all our processes may have ended it before us, and Ray with it,
        which then answers nothing: so its socket is looked at too."""
        done = self._controller.stop.remote()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        with contextlib.suppress(ray.exceptions.RayError):
            while time.monotonic() < deadline_s and not ray.wait([done], timeout=POLL_S)[0]:
                if not self._controller_listens():  # it closes its socket last
                    deadline_s = min(deadline_s, time.monotonic() + LAST_WORD_TIMEOUT_S)

    def _controller_listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(discovery_address(self.folder).removeprefix("unix:")) == 0

    def _start_compiler(self) -> "subprocess.Popen[bytes]":
        """Begin with the kernels of ranks that have to wait for Ray."""
        spec = make_rank_spec(
            self._plan,
            group_id="compile",
            term=0,
            rank=0,
            scheduler_address="",
            rank_lease_s=0.0,
            log_level=self._config.log_level,
            folder=self.folder,
        )
        return start_child("quire.worker.compile_ahead", asdict(spec), log_path=self.folder / "logs" / "compile.log")

    def _start_ray(self) -> None:
        # Ray's workers can import from the folder that their driver is in, and the caller's may hold a `kernels` or `proto` of
        # its own. A runtime_env with a working_dir would do as well, but then no worker is started ahead: 2.3 s more.
        empty = self.folder / "empty"
        empty.mkdir()
        os.chdir(empty)
        num_ranks = self._plan.groups * self._plan.tensor_parallel_size
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=num_ranks,  # Ray starts so many workers ahead; ranks take none of these CPUs
                num_gpus=max(num_ranks, num_visible_gpus()) if self._plan.device == "cuda" else 0,
                resources={CPU_RANK_RESOURCE: max(num_ranks, MAX_RANKS_PER_CPU * (os.cpu_count() or 1))},
                include_dashboard=False,
                _temp_dir=str(self.folder / "ray"),  # its sockets and logs go when ours go
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # whatever Ray raises here, the message is what the user can act on
            raise Unavailable(f"Ray could not start on this machine: {error}") from error

    def _raise_if_over(self) -> None:
        assert self._gateways is not None
        try:
            self._gateways.tend(time.monotonic())
        except Unavailable as error:
            raise Unavailable(self._explain(error.message)) from None
        if (code := _store_exit_code()) is not None:
            # Actors go on for a minute without it; then Ray would abort us and end them in disorder.
            raise Unavailable(self._explain(f"Ray's store (gcs_server) ended with code {code}, and nothing can be started any more"))
        try:
            if (reason := self._over.poll(timeout_s=POLL_S)) is not None:
                raise Unavailable(self._explain(reason))
        except ray.exceptions.RayError as error:
            raise Unavailable(self._explain(f"the controller is gone: {error}")) from error

    def _explain(self, reason: str) -> str:
        return f"{reason} (logs: {self._logs()})"

    def _logs(self) -> Path:
        return self.folder / "logs"


def _store_exit_code() -> int | None:
    """How the store of our own Ray ended, None if it lives."""
    node = ray._private.worker._global_node
    assert node is not None, "Ray is started"
    (store,) = node.all_processes[ray_constants.PROCESS_TYPE_GCS_SERVER]
    code: int | None = store.process.poll()
    return code


def num_visible_gpus() -> int:
    """How many GPUs this process may use."""
    return len(visible_gpu_names())


def visible_gpu_names() -> list[str]:
    """The GPUs that this process may use, as CUDA names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    numbers = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return [str(number) for number in range(len([number for number in numbers if number.isdigit()]))]
