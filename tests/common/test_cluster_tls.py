"""Discovery between hosts, over real sockets: both ends must hold the cluster's certificates."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.cluster.controller.discovery import server_credentials
from quire.cluster.gateway.discovery_channel import discovery_channel
from quire.common.cluster_tls import is_local, new_certificates
from quire.common.curve import CLIENT_KEY, CLUSTER_KEY, CurveKeys
from quire.common.errors import ConfigError

CALL_TIMEOUT_S = 5.0
# Linux takes it for this machine, and nobody takes it for a loopback address.
HOST = "0.0.0.0"


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its stubs have no types
    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def answering(certificates: dict[str, str]) -> AsyncIterator[str]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    port = server.add_secure_port(f"{HOST}:0", server_credentials(certificates))
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


async def ask(channel: grpc.aio.Channel) -> int:
    async with channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
        return int(answer.status)


async def test_who_holds_the_clients_part_gets_an_answer(tmp_path: Path) -> None:
    keys = CurveKeys.of_hosts()
    keys.put_into(tmp_path)
    of_controller, of_gateway = CurveKeys.read(tmp_path / CLUSTER_KEY), CurveKeys.read(tmp_path / CLIENT_KEY)
    assert of_controller == keys
    assert of_controller.certificates is not None
    assert of_gateway.certificates is not None
    assert of_gateway.certificates.keys() == of_controller.certificates.keys() - {"server_key"}
    async with answering(of_controller.certificates) as address:
        assert await ask(discovery_channel(address, of_gateway.certificates)) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("stranger", ["plain", "the server's certificate alone", "other keys", "another server"])
async def test_nobody_else_does(stranger: str) -> None:
    certificates, other = new_certificates(), new_certificates()
    async with answering(certificates) as address:
        if stranger == "plain":
            channel = grpc.aio.insecure_channel(address)
        elif stranger == "the server's certificate alone":
            credentials = grpc.ssl_channel_credentials(certificates["server_certificate"].encode())
            channel = grpc.aio.secure_channel(address, credentials, options=(("grpc.ssl_target_name_override", "quire-cluster"),))
        elif stranger == "other keys":
            channel = discovery_channel(address, {**other, "server_certificate": certificates["server_certificate"]})
        else:
            channel = discovery_channel(address, {**certificates, "server_certificate": other["server_certificate"]})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await asyncio.sleep(0)
        assert await ask(discovery_channel(address, certificates)) == health_pb2.HealthCheckResponse.SERVING, "it is in nobody's way"


def test_over_a_network_there_is_no_channel_without_certificates() -> None:
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:50050 is reached over a network"):
        discovery_channel("10.0.0.1:50050", None)


def test_certificates_are_no_part_of_what_ranks_are_told() -> None:
    assert "certificates" not in CurveKeys.of_hosts().as_spec()
    assert "PRIVATE" not in repr(CurveKeys.of_hosts())


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("unix:/tmp/x", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("quire-controller:1", False),
    ],
)
def test_what_stays_on_this_machine(address: str, is_here: bool) -> None:
    assert is_local(address) is is_here
