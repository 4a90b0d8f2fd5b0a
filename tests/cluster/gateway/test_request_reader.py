"""Requests that never come, or are none, over real gRPC."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_scheduler import FakeScheduler, Script
from gateway_parts import Running, details_of, refusal, running_gateway, until, zero_window_call
from grpc_reflection.v1alpha import reflection_pb2

from quire.cluster.gateway.main import GatewayBounds
from quire.common.messages import Submit
from quire.v1 import cluster_pb2, inference_pb2
from quire.v1.inference_pb2 import GenerateRequest

NOT_A_MESSAGE = b"\xff\xff\xff"  # the beginning of a tag
METHODS = [
    f"/{service.full_name}/{method.name}"
    for service in (
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"],
    )
    for method in service.methods
]
OTHERS = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
REFLECTION = OTHERS[-1]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, scheduler=FakeScheduler(script=lambda _: Script([5, 6, 0]))) as running:
        yield running


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def nothing() -> AsyncIterator[bytes]:
    for _ in ():
        yield b""


def call(running: Running, path: str, requests: AsyncIterator[bytes]) -> Any:
    """Whatever the method: on the wire they are alike."""
    make: Any = running.channel.stream_stream
    return make(path)(requests)


async def end_of(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call without an answer ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()
    return failed.value


@pytest.mark.parametrize("path", [*METHODS, *OTHERS])
async def test_bytes_that_are_no_message_are_refused_with_one_quiet_line(
    running: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield NOT_A_MESSAGE

    with caplog.at_level(logging.DEBUG, logger="quire"):
        error = await end_of(call(running, path, requests()))
    info, _, delay_s = details_of(error)
    assert (error.code(), info.reason, delay_s) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE_REQUEST", None)
    assert [record.getMessage() for record in caplog.records if record.name == "quire.gateway"] == [
        "a request of 3 bytes cannot be decoded"
    ]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_call_that_ends_without_a_message_is_refused(running: Running) -> None:
    error = await end_of(call(running, METHODS[0], nothing()))
    assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NO_REQUEST")


async def test_a_message_that_is_too_large_is_refused_by_grpc(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield b"x" * (4 * 2**20 + 1)

    error = await end_of(call(running, METHODS[0], requests()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await running.inference.ListModels(inference_pb2.ListModelsRequest())
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_call_whose_message_never_comes_is_ended(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, bounds=GatewayBounds(read_timeout_s=0.1)) as running:
        for path in (*METHODS, *OTHERS):
            error = await end_of(call(running, path, never()))
            assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "NO_REQUEST")
        assert running.gateway.reader.num_unread_calls == 0


async def test_calls_without_their_message_are_bounded(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, bounds=GatewayBounds(max_unread_calls=2)) as running:
        waiting = [call(running, METHODS[0], never()) for _ in range(2)]
        await until(lambda: running.gateway.reader.num_unread_calls == 2)
        error = await refusal(running.inference.Generate(GenerateRequest(text="x")))
        assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        waiting[0].cancel()
        await until(lambda: running.gateway.reader.num_unread_calls == 1)
        await running.inference.Generate(GenerateRequest(text="x"))


async def test_a_reflection_stream_takes_several_requests(running: Running) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for name in ("", ""):
            yield reflection_pb2.ServerReflectionRequest(list_services=name).SerializeToString()

    answers = call(running, REFLECTION, requests())
    assert len([answer async for answer in answers]) == 2


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_client_that_never_makes_room_is_cut_off_when_its_connection_is_old(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    bounds = GatewayBounds(max_connection_age_s=0.5, connection_grace_s=0.5, write_stall_timeout_s=0.2)
    scheduler = FakeScheduler(script=lambda _: Script([5, 6, 0]))
    request = GenerateRequest(text="x")
    async with running_gateway(tmp_path, scheduler=scheduler, bounds=bounds, request_timeout_s=0.5) as running:
        async with zero_window_call(running.address, f"/quire.v1.InferenceService/{method}", request) as frames:
            await scheduler.wait_for(Submit)
            await until(lambda: running.gateway.gate.num_calls == 0)
            async with asyncio.timeout(10):
                await frames.read()  # until the server closes
        assert (await running.inference.Generate(request)).usage.completion_token_count == 3
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
