"""`quire gateway` as a user runs it, between a fake scheduler and a fake controller."""

import asyncio
import json
import signal
from pathlib import Path

import grpc
import pytest
from fake_scheduler import FakeController, FakeScheduler, Script, demo_files
from gateway_parts import LIMITS, until
from quire_command import quire, start_quire

from quire.v1.inference_pb2 import GenerateRequest
from quire.v1.inference_pb2_grpc import InferenceServiceStub


async def test_gateways_join_by_discovery_and_end_in_order(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    scheduler = FakeScheduler(script=lambda _: Script([5, 0]), limits=LIMITS)
    async with scheduler, FakeController(scheduler.address) as controller:
        controller.serve(demo_files())
        arguments = ("--discovery", controller.address, "--listen", "127.0.0.1:0", "--gateways", "2", "--ready-file", str(ready))
        with start_quire("gateway", *arguments, address="") as process:
            try:
                await until(lambda: ready.exists() or process.poll() is not None, timeout_s=30)
                address = json.loads(ready.read_text())["address"]
                async with grpc.aio.insecure_channel(address) as channel:
                    answer = await InferenceServiceStub(channel).Generate(GenerateRequest(text="x"), timeout=10)
                    assert list(answer.completions[0].token_ids) == [5, 0]
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 20) == 0
            finally:
                process.kill()
            assert process.stdout is not None
            output = process.stdout.read()
        assert f"ready: 2 gateways at {address}" in output
        assert "stopping" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--discovery", "nowhere"), "--discovery is 'nowhere'; it takes HOST:PORT, or unix:/PATH of a socket on this machine"),
        (("--discovery", "127.0.0.1:1", "--listen", "0.0.0.0:0"), "give --tls-cert, --tls-key and --token-file"),
        (("--discovery", "127.0.0.1:1", "--gateways", "0"), "gateways is 0; it must be at least 1"),
        (("--discovery", "127.0.0.1:1", "--gateways", "65"), "gateways is 65; one machine takes at most 64"),
        (("--discovery", "127.0.0.1:1", "--token-file", "/nowhere/tokens"), "/nowhere/tokens"),
        (
            ("--discovery", "unix:/nowhere/at/all", "--listen", "127.0.0.1:0", "--start-timeout-s", "0.5"),
            "no model and scheduler were found by unix:/nowhere/at/all within 0.5 s; is the cluster's controller there?",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = quire("gateway", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.splitlines()[-1].startswith("quire: "), "what the gateways log comes before"
