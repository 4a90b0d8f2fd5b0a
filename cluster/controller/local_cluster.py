"""A whole cluster on this machine: a Ray of its own, the controller, and one gateway. What `quire serve` runs."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Self

import ray

from quire.cluster.controller.controller import Controller, discovery_address
from quire.cluster.controller.reaper import let_go, start_reaper
from quire.cluster.controller.stop_signals import StopSignals
from quire.common.child_process import start_child
from quire.common.config import DEFAULT_METRICS_LISTEN, ModelPlan, ServeConfig
from quire.common.errors import Unavailable

# Ray's object store carries nothing of ours but actor arguments; this is the smallest size that Ray takes.
OBJECT_STORE_BYTES: Final = 80 * 2**20
# Longest temporary folder that ours can lie in: the path of a Unix socket has at most 107 bytes, and Ray adds 69 to ours.
MAX_BASE_CHARS: Final = 20
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
        self._gateway: subprocess.Popen[bytes] | None = None
        self._over: Any = None
        self.metrics_addresses: dict[str, str] = {}  # of the gateway and the controller, once they serve

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.stop(keep_logs=error is not None)

    def start(self) -> str:
        """Start everything and wait until it serves; the gateway's address. "" when a signal came meanwhile.

        Raises:
            QuireError: it cannot serve; the message says why and where the logs are.
        """
        deadline_s = time.monotonic() + self._config.start_timeout_s
        # The gateway comes first and waits for the controller: its start costs nothing while Ray starts.
        report = self.folder / "gateway.json"
        self._gateway = start_child(
            "quire.cluster.gateway.main",
            {
                "listen": self._config.listen,
                "discovery_address": discovery_address(self.folder),
                "request_timeout_s": self._config.request_timeout_s,
                "drain_timeout_s": self._config.drain_timeout_s,
                "log_level": self._config.log_level,
                "metrics_listen": self._config.metrics_listen or DEFAULT_METRICS_LISTEN["gateway"],
                "metrics_port_is_free": self._config.metrics_listen is None,
                # Paths: what is secret stays in the files.
                **{name: _absolute(getattr(self._config, name)) for name in ("token_file", "tls_cert", "tls_key", "tls_client_ca")},
                "report_path": str(report),
            },
            log_path=self.folder / "logs" / "gateway.log",
        )
        self._stop.install()
        try:
            self._start_ray()
        except SystemExit:  # while it starts, Ray's own handler answers SIGTERM, by this
            self._stop.set()
        self._stop.install()
        if self._stop.is_set():
            return ""
        self._controller = Controller.options(name="quire-controller").remote(self._config, self._plan, str(self.folder))
        try:
            metrics_address = ray.get(self._controller.start.remote(), timeout=self._config.start_timeout_s)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise Unavailable(self._explain(f"the controller could not start: {error}")) from error
        self._over = self._controller.wait_over.remote()
        ready = self._controller.wait_ready.remote()
        is_ready = False
        while not (is_ready and report.exists()):
            if self._stop.is_set():
                return ""
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the cluster was not ready within {self._config.start_timeout_s:g} s; its logs are in {self._logs()}")
            self._raise_if_over()
            if not is_ready and ray.wait([ready], timeout=POLL_S)[0]:
                reason = ray.get(ready)
                if reason:
                    raise Unavailable(self._explain(reason))
                is_ready = True
            elif is_ready:
                time.sleep(POLL_S)
        outcome = json.loads(report.read_text())
        if "error" in outcome:
            raise Unavailable(self._explain(f"the gateway cannot start: {outcome['error']}"))
        self.metrics_addresses = {"gateway": str(outcome["metrics_address"]), "controller": str(metrics_address)}
        return str(outcome["address"])

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
        if self._gateway is not None:
            is_clean = self._stop_gateway() and is_clean
        if self._controller is not None:
            self._stop_controller()
        if ray.is_initialized():
            ray.shutdown()
        let_go(self._reaper)
        if is_clean:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stop_gateway(self) -> bool:
        """Let the gateway finish its streams; whether it ended as it should."""
        assert self._gateway is not None
        if self._gateway.poll() is None:
            self._gateway.terminate()
        deadline_s = time.monotonic() + self._config.drain_timeout_s + STOP_TIMEOUT_S
        while self._gateway.poll() is None and time.monotonic() < deadline_s and self._stop.count < 2:
            time.sleep(POLL_S)
        if self._gateway.poll() is None:
            self._gateway.kill()
            self._gateway.wait()
            return self._stop.count > 1
        return self._gateway.returncode == 0

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
                num_cpus=num_ranks,  # a rank takes one of Ray's CPUs, whatever the machine has: it only counts them
                num_gpus=num_ranks if self._plan.device == "cuda" else 0,
                include_dashboard=False,
                _temp_dir=str(self.folder / "ray"),  # its sockets and logs go when ours go
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # whatever Ray raises here, the message is what the user can act on
            raise Unavailable(f"Ray could not start on this machine: {error}") from error

    def _raise_if_over(self) -> None:
        assert self._gateway is not None
        if self._gateway.poll() is not None:
            report = self.folder / "gateway.json"
            with contextlib.suppress(OSError, ValueError, KeyError):
                raise Unavailable(self._explain(f"the gateway cannot start: {json.loads(report.read_text())['error']}"))
            raise Unavailable(self._explain(f"the gateway ended with code {self._gateway.returncode}"))
        try:
            if ray.wait([self._over], timeout=POLL_S)[0]:
                raise Unavailable(self._explain(ray.get(self._over)))
        except ray.exceptions.RayError as error:
            raise Unavailable(self._explain(f"the controller is gone: {error}")) from error

    def _explain(self, reason: str) -> str:
        return f"{reason} (logs: {self._logs()})"

    def _logs(self) -> Path:
        return self.folder / "logs"


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())
