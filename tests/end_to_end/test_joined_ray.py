"""A cluster on somebody's Ray: it serves, outlives what started it, and leaves nothing behind when it goes."""

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
from typing import Any, Final

import pytest
from serving import STOP_TIMEOUT_S, tagged_processes, wait_for
from streams import Streams

from quire.client import Client
from quire.common.child_process import start_child, stop_child

pytestmark = pytest.mark.chaos

NUM_STREAMS: Final = 8
NUM_TOKENS: Final = 60
TIMEOUT_S: Final = 90.0
NUM_CPUS: Final = 6  # of other_ray.py, whose actor takes one
TAG: Final = "QUIRE_TEST_TAG"


class OtherRay:
    """Ends with the `with`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: paths of sockets are
        self.tag = uuid.uuid4().hex
        self.environ = {
            **os.environ,
            TAG: self.tag,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "TMPDIR": str(self.folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).parents[1] / "support" / "other_ray.py"), str(self.folder / "ray")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=self.folder, env=self.environ,
        )  # fmt: skip
        self.address = str(self._read()["address"])

    def ask(self) -> dict[str, Any]:
        """What is free, whose actors live."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "quire.cli.main", "controller", "--ray-address", self.address, *arguments]

    def processes(self) -> dict[int, str]:
        return tagged_processes(TAG, self.tag, folder=self.folder)

    def pids(self, word: str) -> list[int]:
        return [pid for pid, command in self.processes().items() if word in command]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "Ray did not start"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
def other_ray() -> Iterator[OtherRay]:
    ray = OtherRay()
    try:
        yield ray
    finally:
        ray.end()


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
        wait_for(report.exists, timeout_s=TIMEOUT_S)
        yield str(json.loads(report.read_text())["address"])
    finally:
        stop_child(child)


def test_a_cluster_joins_a_ray_and_leaves_it_as_it_was(other_ray: OtherRay, tmp_path: Path) -> None:
    before = other_ray.ask()
    assert (before["free_cpus"], before["actors"]) == (NUM_CPUS - 1, ["somebody"])
    ready, output_path = tmp_path / "ready.json", tmp_path / "output"
    with output_path.open("wb") as output:
        command = other_ray.command("--discovery-listen", "127.0.0.1:0", "--ready-file", str(ready), "--groups", "2")
        controller = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, env=other_ray.environ)
    wait_for(lambda: ready.exists() or controller.poll() is not None, timeout_s=TIMEOUT_S)
    assert controller.poll() is None, output_path.read_text()
    with gateway(json.loads(ready.read_text())["address"], tmp_path) as address, Client(address) as client:
        expected = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait()
        assert other_ray.ask()["free_cpus"] == NUM_CPUS - 1 - 2

        # A second one is refused.
        done = subprocess.run(other_ray.command(), capture_output=True, text=True, timeout=TIMEOUT_S, env=other_ray.environ, check=False)
        assert (done.returncode, "runs on this Ray already" in done.stderr) == (1, True), done.stdout + done.stderr

        # The actor's death, and then that of the process that started it, are no matter.
        streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        (pid,) = other_ray.pids("ray::_Controller")
        os.kill(pid, signal.SIGKILL)
        assert streams.wait() == expected
        wait_for(lambda: client.health() == "SERVING", timeout_s=TIMEOUT_S)
        controller.kill()
        controller.wait()
        streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        assert streams.wait() == expected
        client.cluster.scale("quire-tales", 3)
        wait_for(lambda: [group.state for group in client.cluster.groups()] == ["READY"] * 3, timeout_s=TIMEOUT_S)
        assert Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait() == expected

        done = subprocess.run(
            other_ray.command("--stop"), capture_output=True, text=True, timeout=TIMEOUT_S, env=other_ray.environ, check=False
        )
        assert (done.returncode, done.stdout) == (0, "ended; Ray stays\n"), done.stderr
    assert not other_ray.pids("-m quire.")
    wait_for(lambda: other_ray.ask()["free_cpus"] == NUM_CPUS - 1, timeout_s=TIMEOUT_S)
    assert other_ray.ask()["actors"] == ["somebody"]
    assert other_ray.ask()["num_calls"] > before["num_calls"], "it is the same actor"
    assert not list(other_ray.folder.glob("quire-*/controller.json"))


def test_sigterm_ends_what_was_started_and_nothing_else(other_ray: OtherRay, tmp_path: Path) -> None:
    ready, output_path = tmp_path / "ready.json", tmp_path / "output"
    with output_path.open("wb") as output:
        command = other_ray.command("--discovery-listen", "127.0.0.1:0", "--ready-file", str(ready))
        controller = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, env=other_ray.environ)
    wait_for(lambda: ready.exists() or controller.poll() is not None, timeout_s=TIMEOUT_S)
    assert controller.poll() is None, output_path.read_text()
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(STOP_TIMEOUT_S) == 0, output_path.read_text()
    assert not other_ray.pids("-m quire.")
    assert not list(other_ray.folder.glob("quire-*"))
    wait_for(lambda: other_ray.ask()["free_cpus"] == NUM_CPUS - 1, timeout_s=TIMEOUT_S)
    assert other_ray.ask()["actors"] == ["somebody"]


def test_a_ray_that_is_not_there_and_one_without_a_word_on_its_tokens_are_refused(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-P", "-m", "quire.cli.main", "controller", "--stop", "--ray-address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=environ, check=False)
    assert (done.returncode, "RAY_AUTH_MODE is not set" in done.stderr) == (1, True)
    environ["RAY_AUTH_MODE"] = "disabled"
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=environ, check=False)
    assert (done.returncode, done.stderr) == (1, "quire: nothing answers at Ray's address 127.0.0.1:1: Connection refused\n")
