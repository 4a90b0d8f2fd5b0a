"""The scheduler process on TCP, with keys: who has them is served, and nobody else."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from gateway_parts import until

from quire.cluster.gateway.scheduler_link import SchedulerLink
from quire.cluster.scheduler.process import CONTROLLER_IDENTITY
from quire.common.child_process import start_child, stop_child
from quire.common.curve import CurveKeys, secure_client
from quire.common.errors import ConfigError
from quire.common.messages import (
    PROTOCOL_VERSION,
    Hello,
    SessionUp,
    Status,
    StatusRequest,
    Welcome,
    decode_control_up,
    decode_session_up,
    encode,
)

TIMEOUT_MS = 20_000
# How long nothing must come, where nothing may.
SILENCE_MS = 1_000


@pytest.fixture(scope="module")
def keys() -> CurveKeys:
    return CurveKeys.new()


@pytest.fixture(scope="module")
def addresses(keys: CurveKeys) -> Iterator[dict[str, str]]:
    """Those of a running scheduler, all of them TCP."""
    with contextlib.ExitStack() as held:
        ports = [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
    names = {name: f"tcp://127.0.0.1:{port}" for name, port in zip(("session", "steps", "control"), ports, strict=True)}
    process = {**{f"{name}_address": address for name, address in names.items()}, "curve": keys.as_spec()}
    child = start_child("quire.cluster.scheduler.process", {"process": process, "scheduler": {"scheduler_id": "s1"}})
    try:
        yield names
    finally:
        stop_child(child)


def welcome_of(address: str, keys: CurveKeys | None, *, timeout_ms: int) -> SessionUp | None:
    """The answer to a gateway's Hello, if one comes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = context.socket(zmq.DEALER)
    link.setsockopt(zmq.IDENTITY, b"gateway-by-hand")
    if keys is not None:
        secure_client(link, keys)
    try:
        link.connect(address)
        link.send(encode(Hello(PROTOCOL_VERSION, "gateway-by-hand")))
        return decode_session_up(link.recv()) if link.poll(timeout_ms) else None
    finally:
        context.destroy(linger=0)


def test_a_gateway_with_the_keys_is_welcomed_and_others_hear_nothing(addresses: dict[str, str], keys: CurveKeys) -> None:
    assert isinstance(welcome_of(addresses["session"], keys.of_clients(), timeout_ms=TIMEOUT_MS), Welcome)
    other = CurveKeys.new()
    half = CurveKeys(keys.server_public, other.client_public, other.client_secret)
    for stranger in (None, other.of_clients(), half):
        assert welcome_of(addresses["session"], stranger, timeout_ms=SILENCE_MS) is None
    assert isinstance(welcome_of(addresses["session"], keys.of_clients(), timeout_ms=TIMEOUT_MS), Welcome)


def test_nobody_without_the_keys_steers_it(addresses: dict[str, str], keys: CurveKeys) -> None:
    for known, expected in ((None, None), (keys.of_clients(), Status)):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = context.socket(zmq.DEALER)
        link.setsockopt(zmq.IDENTITY, CONTROLLER_IDENTITY)
        if known is not None:
            secure_client(link, known)
        try:
            link.connect(addresses["control"])
            link.send(encode(StatusRequest(7)))
            came = link.poll(TIMEOUT_MS if expected else SILENCE_MS)
            assert bool(came) == (expected is not None)
            if expected is not None:
                assert isinstance(decode_control_up(link.recv()), expected)
        finally:
            context.destroy(linger=0)


async def test_a_gateways_link_comes_up_with_the_keys_alone(addresses: dict[str, str], keys: CurveKeys) -> None:
    link = SchedulerLink(gateway_id="g1", keys=keys.of_clients())
    stranger = SchedulerLink(gateway_id="g2", keys=CurveKeys.new().of_clients())
    try:
        await stranger.connect(addresses["session"])
        await link.connect(addresses["session"])
        await until(lambda: link.is_up, timeout_s=20)
        assert not stranger.is_up
    finally:
        await link.close()
        await stranger.close()


async def test_a_gateway_without_keys_does_not_speak_over_a_network() -> None:
    link = SchedulerLink(gateway_id="g1")
    try:
        with pytest.raises(ConfigError, match=r"tcp://192\.0\.2\.1:5555 is reached over a network and this process has no cluster key"):
            await link.connect("tcp://192.0.2.1:5555")
    finally:
        await link.close()


def test_a_scheduler_without_keys_does_not_listen_to_a_network(tmp_path: Path) -> None:
    process = {"session_address": "tcp://0.0.0.0:0", "steps_address": f"ipc://{tmp_path}/a", "control_address": f"ipc://{tmp_path}/b"}
    log = tmp_path / "log"
    child = start_child("quire.cluster.scheduler.process", {"process": process, "scheduler": {"scheduler_id": "s1"}}, log_path=log)
    assert child.wait(20) == 1
    assert "has no cluster key" in log.read_text()
