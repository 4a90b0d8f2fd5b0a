"""Somebody's Ray as a program of its own, clusters that join it, and gateways for them."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from serving import STOP_TIMEOUT_S, tagged_processes, wait_for

from quire.common.child_process import start_child, stop_child

READY_TIMEOUT_S: Final = 90.0
_TAG: Final = "QUIRE_TEST_TAG"


class RayProgram:
    """A program of this folder that runs a Ray and obeys lines on its input. It ends with the `with`, and everything on its Ray."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: paths of sockets are
        self.tag = uuid.uuid4().hex
        self.environ = {
            **os.environ,
            _TAG: self.tag,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "TMPDIR": str(self.folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name(name)), str(self.folder / "ray"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self.folder,
            env=self.environ,
        )
        try:
            self.address = str(self._read()["address"])
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `quire controller` with these arguments to its end."""
        command = self._command(*arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=READY_TIMEOUT_S, env=self.environ, check=False)

    def start(self, folder: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start `quire controller`; its process, and the address of its discovery once it is ready."""
        ready, output_path = folder / "ready.json", folder / "output"
        command = self._command("--discovery-listen", "127.0.0.1:0", "--ready-file", str(ready), *arguments)
        with output_path.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=self.environ)
        wait_for(lambda: ready.exists() or process.poll() is not None, timeout_s=READY_TIMEOUT_S)
        assert process.poll() is None, output_path.read_text()
        return process, str(json.loads(ready.read_text())["address"])

    def pids(self, word: str) -> list[int]:
        """Processes on this Ray, and of it, with this word in their command line."""
        found = tagged_processes(_TAG, self.tag, folder=self.folder)
        return [pid for pid, command in found.items() if word in command]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "quire.cli.main", "controller", "--ray-address", self.address, *arguments]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the Ray of this test is gone"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


@contextlib.contextmanager
def gateway(discovery_address: str, folder: Path) -> Iterator[str]:
    """An edge that asks this discovery; its address."""
    report = folder / "gateway.json"
    spec: Mapping[str, Any] = {
        "listen": "127.0.0.1:0",
        "discovery_address": discovery_address,
        "request_timeout_s": 60.0,
        "drain_timeout_s": 5.0,
        "log_level": "info",
        "report_path": str(report),
    }
    child = start_child("quire.cluster.gateway.main", spec, log_path=folder / "gateway.log")
    try:
        wait_for(report.exists, timeout_s=READY_TIMEOUT_S)
        yield str(json.loads(report.read_text())["address"])
    finally:
        stop_child(child)
