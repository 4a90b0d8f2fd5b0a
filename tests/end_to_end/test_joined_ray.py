"""A cluster on somebody's Ray: it serves, outlives what started it, and leaves nothing behind when it goes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from ray_program import RayProgram, gateway
from serving import STOP_TIMEOUT_S, wait_for
from streams import Streams

from quire.client import Client

pytestmark = pytest.mark.slow

NUM_STREAMS: Final = 8
NUM_TOKENS: Final = 60
TIMEOUT_S: Final = 90.0
NUM_CPUS: Final = 6  # of other_ray.py, whose actor takes one


def test_a_cluster_joins_a_ray_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    with RayProgram("other_ray.py") as ray:
        wait_for(lambda: ray.ask("")["free_cpus"] == NUM_CPUS - 1, timeout_s=TIMEOUT_S)  # Ray tells it with a delay
        before = ray.ask("")
        assert before["actors"] == ["somebody"]
        controller, discovery = ray.start(tmp_path, "--groups", "2")
        with gateway(discovery, tmp_path) as address, Client(address) as client:
            expected = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait()
            wait_for(lambda: ray.ask("")["free_cpus"] == NUM_CPUS - 1 - 2, timeout_s=TIMEOUT_S)

            second = ray.run()
            assert (second.returncode, "runs on this Ray already" in second.stderr) == (1, True), second.stdout + second.stderr

            # The actor's death, and then that of the process that started it, are no matter.
            streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            (pid,) = ray.pids("ray::_Controller")
            os.kill(pid, signal.SIGKILL)
            assert streams.wait() == expected
            wait_for(lambda: client.health() == "SERVING", timeout_s=TIMEOUT_S)
            controller.kill()
            controller.wait()
            assert Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait() == expected
            client.cluster.scale("quire-tales", 3)
            wait_for(lambda: [group.state for group in client.cluster.groups()] == ["READY"] * 3, timeout_s=TIMEOUT_S)
            assert Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait() == expected

            stopped = ray.run("--stop")
            assert (stopped.returncode, stopped.stdout) == (0, "ended; Ray stays\n"), stopped.stderr
        assert not ray.pids("-m quire.cluster.scheduler")
        assert not ray.pids("-m quire.worker")
        wait_for(lambda: ray.ask("")["free_cpus"] == NUM_CPUS - 1, timeout_s=TIMEOUT_S)
        after = ray.ask("")
        assert after["actors"] == ["somebody"]
        assert after["num_calls"] > before["num_calls"], "it is the same actor"
        assert not list(ray.folder.glob("quire-*/controller.json"))


def test_sigterm_ends_what_was_started_and_nothing_else(tmp_path: Path) -> None:
    with RayProgram("other_ray.py") as ray:
        controller, _ = ray.start(tmp_path)
        controller.send_signal(signal.SIGTERM)
        assert controller.wait(STOP_TIMEOUT_S) == 0, (tmp_path / "output").read_text()
        assert not ray.pids("-m quire.")
        assert not list(ray.folder.glob("quire-*"))
        wait_for(lambda: ray.ask("")["free_cpus"] == NUM_CPUS - 1, timeout_s=TIMEOUT_S)
        assert ray.ask("")["actors"] == ["somebody"]


def test_a_ray_that_is_not_there_and_one_without_a_word_on_its_tokens_are_refused(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-P", "-m", "quire.cli.main", "controller", "--stop", "--ray-address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=environ, check=False)
    assert (done.returncode, "RAY_AUTH_MODE is not set" in done.stderr) == (1, True)
    environ["RAY_AUTH_MODE"] = "disabled"
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=environ, check=False)
    assert (done.returncode, done.stderr) == (1, "quire: nothing answers at Ray's address 127.0.0.1:1: Connection refused\n")
