"""A Ray of two hosts: this machine's own network namespace, and another one behind a cable that can be cut."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from serving import STOP_TIMEOUT_S, tagged_processes, wait_for

from quire.common.curve import CurveKeys

READY_TIMEOUT_S: Final = 120.0
_TAG: Final = "QUIRE_TEST_TAG"
# What Ray's daemons need to be told so that they do without much memory.
_OBJECT_STORE_BYTES: Final = 80 * 2**20
_RAY: Final = str(Path(sys.executable).with_name("ray"))
_RAY_FLAGS: Final = ("--disable-usage-stats", "--block")


class TwoHosts:
    """The head in this namespace and a worker in its own. All of it ends with the `with`.

    Needs root, and Debian's iproute2.
    """

    def __init__(
        self,
        *,
        num_cpus: int = 0,
        head_flags: Sequence[str] = (),
        worker_flags: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """
        num_cpus: Ray's CPUs of each host
        head_flags, worker_flags: of `ray start` instead, without addresses
        """
        self.folder = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: paths of sockets are
        self.tag = uuid.uuid4().hex
        name = self.tag[:6]
        self._namespace = f"quire-{name}"
        self._ends = f"qa{name}", f"qb{name}"
        subnet = f"10.{64 + int(name[:2], 16) % 64}.{int(name[2:4], 16)}"  # inside no network that this machine is likely to be in
        self.head_ip, self.worker_ip = f"{subnet}.1", f"{subnet}.2"
        self.environ = {
            **os.environ,
            _TAG: self.tag,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "TMPDIR": str(self.folder),
            **(environ or {}),
        }
        own = ["--num-cpus", str(num_cpus), "--num-gpus", "0", "--object-store-memory", str(_OBJECT_STORE_BYTES)]
        self._head_flags, self._worker_flags = list(head_flags or own), list(worker_flags or own)
        self._num_workers = 0
        self._keys = self.folder / "keys"
        self._keys.mkdir()
        CurveKeys.of_hosts().put_into(self._keys)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.end)
            self._lay_cable()
            port = self._start_ray()
            self.ray_address = f"{self.head_ip}:{port}"
            on_error.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def cut(self) -> None:
        """Nothing passes between the hosts any more."""
        _run("ip", "link", "set", self._ends[0], "down")

    def mend(self) -> None:
        _run("ip", "link", "set", self._ends[0], "up")

    def on_worker(self, *command: str) -> list[str]:
        """A command on the second host."""
        return ["ip", "netns", "exec", self._namespace, *command]

    def start(self, folder: Path, *arguments: str) -> dict[str, Any]:
        """Start `quire controller` on the head; what it writes once it is ready."""
        ready, output_path = folder / "ready.json", folder / "output"
        command = [sys.executable, "-P", "-m", "quire.cli.main", "controller", "--ray-address", self.ray_address]
        command += ["--discovery-listen", f"{self.head_ip}:0", "--scheduler-listen", f"{self.head_ip}:0", "--ready-file", str(ready)]
        command += ["--cluster-key", str(self._keys / "cluster_key")]
        process = self.spawn([*command, *arguments], output_path, folder)
        wait_for(lambda: ready.exists() or process.poll() is not None, timeout_s=READY_TIMEOUT_S)
        assert process.poll() is None, output_path.read_text()
        found = json.loads(ready.read_text())
        assert isinstance(found, dict)
        return found

    def gateway(self, folder: Path, found: dict[str, Any], *, on_worker: bool) -> str:
        """Start `quire gateway` on one of the hosts; its address. It asks the discovery of a controller that `start` found."""
        name = "worker" if on_worker else "head"
        ready, output_path = folder / f"gateway-{name}.json", folder / f"gateway-{name}.log"
        host = self.worker_ip if on_worker else self.head_ip
        command = [sys.executable, "-P", "-m", "quire.cli.main", "gateway", "--discovery", found["address"], "--insecure"]
        command += ["--cluster-key", str(self._keys / "client_key"), "--listen", f"{host}:0", "--ready-file", str(ready)]
        process = self.spawn(self.on_worker(*command) if on_worker else command, output_path, folder)
        wait_for(lambda: ready.exists() or process.poll() is not None, timeout_s=READY_TIMEOUT_S)
        assert process.poll() is None, output_path.read_text()
        return str(json.loads(ready.read_text())["address"])

    def host_of(self, pid: int) -> str:
        """head or worker, by the namespace that a process is in."""
        is_own = Path(f"/proc/{pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink()
        return "head" if is_own else "worker"

    def pids(self, word: str) -> list[int]:
        """Processes of this Ray, and on it, with this word in their command line."""
        found = tagged_processes(_TAG, self.tag, folder=self.folder)
        return [pid for pid, command in found.items() if word in command]

    def end(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", self._namespace], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["ip", "link", "del", self._ends[0]], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lay_cable(self) -> None:
        own, other = self._ends
        _run("ip", "netns", "add", self._namespace)
        _run("ip", "link", "add", own, "type", "veth", "peer", "name", other)
        _run("ip", "link", "set", other, "netns", self._namespace)
        _run("ip", "addr", "add", f"{self.head_ip}/24", "dev", own)
        _run("ip", "link", "set", own, "up")
        _run(*self.on_worker("ip", "addr", "add", f"{self.worker_ip}/24", "dev", other))
        _run(*self.on_worker("ip", "link", "set", other, "up"))
        _run(*self.on_worker("ip", "link", "set", "lo", "up"))

    def _start_ray(self) -> int:
        """Start Ray on both hosts; the port of its store."""
        head = [_RAY, "start", "--head", "--port", "0", "--node-ip-address", self.head_ip, "--include-dashboard", "false", *_RAY_FLAGS]
        self.spawn([*head, *self._head_flags, "--temp-dir", str(self.folder / "ray")], self.folder / "head.log", self.folder)
        port_file = self.folder / "port"
        wait_for(lambda: self._find_port(port_file), timeout_s=READY_TIMEOUT_S)
        port = int(port_file.read_text())
        self.start_worker(f"{self.head_ip}:{port}")
        return port

    def start_worker(self, ray_address: str) -> "subprocess.Popen[bytes]":
        """One more node of Ray on the second host; its `ray start`, which ends it at SIGTERM."""
        self._num_workers += 1
        name = f"worker{self._num_workers}"
        where = ["--address", ray_address, "--node-ip-address", self.worker_ip, "--temp-dir", str(self.folder / name)]
        command = self.on_worker(_RAY, "start", *where, *_RAY_FLAGS, *self._worker_flags)
        return self.spawn(command, self.folder / f"{name}.log", self.folder)

    def _find_port(self, port_file: Path) -> bool:
        """Ray says its address only in its output."""
        text = (self.folder / "head.log").read_text()
        _, found, rest = text.partition(f"--address='{self.head_ip}:")
        if found:
            port_file.write_text(rest.partition("'")[0])
        return bool(found)

    def spawn(self, command: list[str], output_path: Path, folder: Path, **environ: str) -> "subprocess.Popen[bytes]":
        """Start a program, which ends with the rest. environ: more variables"""
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**self.environ, **environ},
                start_new_session=True,
            )
        self._processes.append(process)
        return process


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
