"""The gateway as a process of its own: its report, its drain, its end."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_scheduler import FakeController, FakeScheduler, Script, demo_files
from gateway_parts import LIMITS, details_of, read_report, refusal, until, zero_window_call
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from quire.common.child_process import start_child
from quire.common.messages import Cancel, Submit
from quire.v1 import inference_pb2
from quire.v1.inference_pb2_grpc import InferenceServiceStub

MODULE = "quire.cluster.gateway.main"


@contextlib.contextmanager
def child(spec: dict[str, Any], *, log_path: Path | None = None) -> Any:
    process = start_child(MODULE, {"listen": "127.0.0.1:0", "log_level": "warning", **spec}, log_path=log_path)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path, scheduler: FakeScheduler, **spec: Any
) -> AsyncIterator[tuple[subprocess.Popen[bytes], Any, grpc.aio.Channel]]:
    scheduler.limits = LIMITS
    report = tmp_path / "report.json"
    async with scheduler, FakeController(scheduler.address) as controller:
        controller.serve(demo_files())
        with child({"discovery_address": controller.address, "report_path": str(report), **spec}) as process:
            await until(lambda: report.exists(), timeout_s=20)
            async with grpc.aio.insecure_channel((read_report(report) or {})["address"]) as channel:
                yield process, InferenceServiceStub(channel), channel


async def exit_code(process: subprocess.Popen[bytes], *, timeout_s: float = 10) -> int:
    await until(lambda: process.poll() is not None, timeout_s=timeout_s)
    assert process.returncode is not None
    return process.returncode


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_a_terminated_gateway_finishes_its_streams_and_refuses_new_requests(tmp_path: Path, signal_number: signal.Signals) -> None:
    script = Script([*range(300, 340), 0], delay_s=0.02)
    scheduler = FakeScheduler(script=lambda _: script)
    async with running(tmp_path, scheduler) as (process, stub, channel):
        call = stub.GenerateStream(inference_pb2.GenerateRequest(text="x"))
        messages = [await call.read()]
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal_number)

        async def is_not_serving() -> bool:
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
            return bool(status == health_pb2.HealthCheckResponse.NOT_SERVING)

        await until(is_not_serving, timeout_s=1)
        error = await refusal(stub.Generate(inference_pb2.GenerateRequest(text="x")))
        info, _, delay_s = details_of(error)
        assert (error.code(), info.reason, delay_s) == (grpc.StatusCode.UNAVAILABLE, "DRAINING", 1.0)
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
        ended_s = time.monotonic()
        assert messages[-1].usage.completion_token_count == 41
        assert await exit_code(process) == 0
        assert time.monotonic() - ended_s < 3


async def test_what_outlives_the_drain_is_cancelled(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script([300], ends=False))
    async with running(tmp_path, scheduler, drain_timeout_s=0.2) as (process, stub, _):
        call = stub.GenerateStream(inference_pb2.GenerateRequest(text="x"))
        await call.read()
        process.terminate()
        await refusal(call)
        assert await exit_code(process) == 0
        assert (await scheduler.wait_for(Cancel)).request_id == scheduler.of_kind(Submit)[0].request_id


async def test_clients_that_take_nothing_do_not_hold_up_the_end(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda submit: Script([*range(300, 340), 0], delay_s=0.01))
    request = inference_pb2.GenerateRequest(text="x", stopping=inference_pb2.StoppingParams(max_tokens=2))
    async with running(tmp_path, scheduler) as (process, stub, channel), contextlib.AsyncExitStack() as stack:
        address = (read_report(tmp_path / "report.json") or {})["address"]
        for path, message in (
            ("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest()),
            ("/quire.v1.InferenceService/Generate", request),
            ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", reflection_pb2.ServerReflectionRequest(list_services="")),
        ):
            await stack.enter_async_context(zero_window_call(address, path, message))
        await scheduler.wait_for(Submit)
        call = stub.GenerateStream(inference_pb2.GenerateRequest(text="x"))
        await call.read()
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        process.terminate()
        terminated_s = time.monotonic()

        async def is_not_serving() -> bool:
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
            return bool(status == health_pb2.HealthCheckResponse.NOT_SERVING)

        await until(is_not_serving, timeout_s=1)
        assert details_of(await refusal(stub.Generate(request)))[0].reason == "DRAINING"
        while await call.read() is not grpc.aio.EOF:
            pass
        assert await exit_code(process) == 0
        assert time.monotonic() - terminated_s < 5


async def test_an_address_in_use_is_reported(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with child({"listen": listen, "discovery_address": "127.0.0.1:1", "report_path": str(report)}) as process:
            assert await exit_code(process) == 1
    assert listen in (read_report(report) or {})["error"]


async def test_a_gateway_that_never_saw_a_model_reports_nothing_and_still_ends_well(tmp_path: Path) -> None:
    report, log = tmp_path / "report.json", tmp_path / "log"
    spec = {"report_path": str(report), "log_level": "info"}
    async with FakeController("") as controller:
        with child({"discovery_address": controller.address, **spec}, log_path=log) as process:
            await until(lambda: log.exists() and "routing table 0: models []" in log.read_text(), timeout_s=20)
            assert read_report(report) is None
            process.terminate()
            assert await exit_code(process) == 0
    assert os.listdir(tmp_path) == ["log"]


async def test_a_gateway_that_cannot_go_on_ends_and_says_why(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    async with FakeController("nowhere") as controller:
        controller.serve(demo_files())
        with child({"discovery_address": controller.address, "report_path": str(report)}) as process:
            assert await exit_code(process, timeout_s=20) == 1
    assert (read_report(report) or {})["error"].startswith("the gateway cannot go on: ZMQError in ")
