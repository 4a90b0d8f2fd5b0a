"""The gateway processes of one machine, which share one address. One that dies is started anew; the others go on.

The kernel shares out new connections among them (SO_REUSEPORT). The address is held by a socket of ours that never listens, so it
is still ours when a gateway is dead, and port 0 becomes the same port for all.
"""

import contextlib
import json
import logging
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quire.cluster.controller.groups import MAX_RESTARTS_IN_A_ROW, STEADY_S, restart_pause_s
from quire.cluster.controller.listen_address import split_address
from quire.common.child_process import start_child
from quire.common.config import DEFAULT_METRICS_LISTEN, MAX_REQUEST_BYTES, ServeConfig
from quire.common.errors import ConfigError, Unavailable

log = logging.getLogger("quire.gateways")

# How long a gateway may take to end beside what its streams get.
STOP_TIMEOUT_S: Final = 30.0
# How often processes are looked at while they end.
POLL_S: Final = 0.2


@dataclass(slots=True)
class GatewayLife:
    """What is known of one gateway; it is dead and waits, or runs, or is given up."""

    index: int
    process: "subprocess.Popen[bytes] | None" = None
    ready_at_s: float | None = None  # since when it serves, None while it does not
    was_ready: bool = False  # at any time
    num_failures: int = 0  # in a row
    restart_at_s: float | None = None  # when it is started anew, None if it runs or is given up
    reason: str = ""  # why it was given up

    def die(self, reason: str, *, now_s: float) -> float | None:
        """It is dead: the pause until it is started anew, None if it is given up. The rules are those of worker groups."""
        is_steady = self.ready_at_s is not None and now_s - self.ready_at_s >= STEADY_S
        self.num_failures = 1 if is_steady else self.num_failures + 1
        self.ready_at_s = self.process = None
        if not self.was_ready or self.num_failures > MAX_RESTARTS_IN_A_ROW:
            self.reason = reason
            return None
        pause_s = restart_pause_s(self.num_failures)
        self.restart_at_s = now_s + pause_s
        return pause_s


class Gateways:
    """Starts the processes, and starts them anew when `tend` finds one dead.

    Call everything from the main thread: a child's life is tied to that of the thread that started it.
    """

    def __init__(self, spec: Mapping[str, Any], *, listen: str, count: int, folder: Path, logs: Path | None) -> None:
        """
        spec: see `gateway_spec`
        folder: for reports
        logs: folder for a log of each; None: where our own errors go

        Raises:
            ConfigError: the address cannot be bound.
        """
        assert count >= 1, count
        self._held = hold_address(listen)
        host = listen.rpartition(":")[0]
        self._spec = {**spec, "listen": f"{host}:{self._held[0].getsockname()[1]}", "shares_port": True}
        self._folder = folder
        self._logs = logs
        self.lives = [GatewayLife(index) for index in range(count)]

    def start(self) -> None:
        for life in self.lives:
            self._start(life)

    @property
    def address(self) -> str | None:
        """Where they answer, once all of them do; None until then, and while one is started anew."""
        if any(life.ready_at_s is None for life in self.lives if not life.reason):
            return None
        return str(self._spec["listen"])

    @property
    def metrics_addresses(self) -> dict[str, str]:
        """Where each shows its metrics, by its name; of those that serve."""
        return {
            "gateway" if len(self.lives) == 1 else f"gateway {life.index}": str(self._reported(life)["metrics_address"])
            for life in self.lives
            if life.ready_at_s is not None
        }

    def tend(self, now_s: float) -> None:
        """Look at every process once; start what is to be started.

        Raises:
            Unavailable: one never became ready, so none of them will, or all are given up. The message says why.
        """
        for life in self.lives:
            if life.process is not None:
                self._look_at(life, now_s)
            elif life.restart_at_s is not None and now_s >= life.restart_at_s:
                self._start(life)
        if all(life.reason for life in self.lives):
            raise Unavailable(self.lives[0].reason)

    def stop(self, *, drain_timeout_s: float, at_once: Callable[[], bool]) -> bool:
        """Let all finish their streams, unless `at_once` says otherwise meanwhile; whether they ended as they should."""
        running = [life.process for life in self.lives if life.process is not None]
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline_s = time.monotonic() + drain_timeout_s + STOP_TIMEOUT_S
        while any(process.poll() is None for process in running) and time.monotonic() < deadline_s and not at_once():
            time.sleep(POLL_S)
        is_clean = not any(life.reason for life in self.lives)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
                is_clean = is_clean and at_once()
            else:
                is_clean = is_clean and process.returncode == 0
        for held in self._held:
            held.close()
        return is_clean

    def _start(self, life: GatewayLife) -> None:
        report = self._report(life)
        report.unlink(missing_ok=True)
        life.restart_at_s = None
        metrics = {"metrics_listen": metrics_address(listen, life.index)} if (listen := self._spec.get("metrics_listen")) else {}
        life.process = start_child(
            "quire.cluster.gateway.main",
            {**self._spec, **metrics, "report_path": str(report)},
            log_path=None if self._logs is None else self._logs / f"gateway-{life.index}.log",
        )

    def _look_at(self, life: GatewayLife, now_s: float) -> None:
        assert life.process is not None
        code = life.process.poll()
        if code is None:
            if life.ready_at_s is None and "address" in self._reported(life):
                life.ready_at_s, life.was_ready = now_s, True
            return
        error = self._reported(life).get("error")
        reason = f"the gateway cannot start: {error}" if error else f"the gateway ended with code {code}"
        pause_s = life.die(reason, now_s=now_s)
        if pause_s is not None:
            log.warning("gateway %d ended with code %d and is started anew in %g s", life.index, code, pause_s)
        elif not life.was_ready:
            raise Unavailable(reason)
        else:
            log.error("gateway %d is given up after %d failures in a row: %s", life.index, life.num_failures, reason)

    def _reported(self, life: GatewayLife) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            report = json.loads(self._report(life).read_text())
            if isinstance(report, dict):
                return report
        return {}

    def _report(self, life: GatewayLife) -> Path:
        return self._folder / f"gateway-{life.index}.json"


def gateway_spec(
    config: ServeConfig, discovery_address: str, *, cluster_key: str | None, max_request_bytes: int | None = None
) -> dict[str, Any]:
    """What every gateway is started with: a GatewayConfig without address and report. Secrets stay in files that it names.

    max_request_bytes: where the model is known; None takes what the setting says, else what no model exceeds
    """
    paths = {name: getattr(config, name) for name in ("token_file", "tls_cert", "tls_key", "tls_client_ca")}
    paths["cluster_key"] = cluster_key
    return {
        "discovery_address": discovery_address,
        "max_request_bytes": max_request_bytes or config.max_request_bytes or MAX_REQUEST_BYTES,
        "request_timeout_s": config.request_timeout_s,
        "drain_timeout_s": config.drain_timeout_s,
        "log_level": config.log_level,
        "metrics_listen": config.metrics_listen or DEFAULT_METRICS_LISTEN["gateway"],
        "metrics_port_is_free": config.metrics_listen is None,
        "otlp_endpoint": config.otlp_endpoint,
        "trace_sample_ratio": config.trace_sample_ratio,
        # Absolute, for gateways start in another folder.
        **{name: None if path is None else str(Path(path).expanduser().absolute()) for name, path in paths.items()},
    }


def metrics_address(listen: str, index: int) -> str:
    """Where gateway `index` of a machine shows its metrics: they share one address for requests, but each counts for itself. The
    port after the first one's is left out: by default it is the controller's."""
    host, port = split_address(listen)
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port + index + (index > 0) if port else 0}"


def hold_address(listen: str) -> list[socket.socket]:
    """Sockets that hold every address that the host's name has, without listening. Port 0 is one free port for all of them.

    Raises:
        ConfigError: another program has it.
    """
    host, port = split_address(listen)
    held: list[socket.socket] = []
    for family, _, _, _, resolved in dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            holder.bind((resolved[0], port or (held[0].getsockname()[1] if held else 0), *resolved[2:]))
        except OSError as error:
            holder.close()
            if held:  # a name whose second address this machine does not have
                continue
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --listen") from None
        held.append(holder)
    return held
