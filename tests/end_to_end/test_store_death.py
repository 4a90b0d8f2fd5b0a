"""The death of Ray's own store (the GCS)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from lasting_ray import REDIS_PASSWORD
from ray_program import RayProgram, gateway
from serving import ServeProcess, wait_for
from streams import Streams, undisturbed

from quire.client import Client

pytestmark = pytest.mark.chaos

NUM_STREAMS: Final = 64
NUM_TOKENS: Final = 60
TIMEOUT_S: Final = 60.0


def test_streams_end_well_before_a_local_cluster_without_its_store_ends(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        address = serve.wait_ready()
        expected = undisturbed(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        wait_for(lambda: streams.num_tokens >= streams.num_wanted // 10, timeout_s=TIMEOUT_S)
        os.kill(serve.process_with("gcs_server "), signal.SIGKILL)
        assert streams.wait() == expected
        assert serve.wait_end() == 1, serve.output
        assert "Ray's store (gcs_server) ended with code -9" in serve.output
        serve.wait_gone(timeout_s=TIMEOUT_S)


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[int]:
    """A Redis on a free port; the port."""
    assert shutil.which("redis-server"), "this test needs Debian's redis-server; .ci/run installs it"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [
        "redis-server",
        "--bind",
        "127.0.0.1",
        "--port",
        str(port),
        "--requirepass",
        REDIS_PASSWORD,
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: _answers(port), timeout_s=TIMEOUT_S)
        yield port
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_store_in_redis_may_die_and_take_its_time_to_come_back(tmp_path: Path) -> None:
    with redis(tmp_path) as port, RayProgram("lasting_ray.py", str(port)) as ray:
        controller, discovery = ray.start(tmp_path, "--groups", "2")
        with gateway(discovery, tmp_path) as address, Client(address) as client:
            expected = undisturbed(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            wait_for(lambda: streams.num_tokens >= streams.num_wanted // 10, timeout_s=TIMEOUT_S)
            ray.ask("kill store")
            os.kill(min(ray.pids("-m quire.worker.rank_process ")), signal.SIGKILL)
            assert streams.wait() == expected
            print(f"store and a rank killed: longest pause {streams.longest_pause_s:.1f} s")
            assert len([group for group in client.cluster.groups() if group.state == "READY"]) == 1, "nothing can be started now"
            ray.ask("start store")
            wait_for(lambda: [group.state for group in client.cluster.groups()] == ["READY"] * 2, timeout_s=TIMEOUT_S)
            client.cluster.scale("quire-tales", 3)
            wait_for(lambda: [group.state for group in client.cluster.groups()] == ["READY"] * 3, timeout_s=TIMEOUT_S)
            assert Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait() == expected
        controller.send_signal(signal.SIGTERM)
        assert controller.wait(TIMEOUT_S) == 0, (tmp_path / "output").read_text()
        assert not ray.pids("-m quire.")
