"""A gateway's parts, wired in the test's own process, between a fake scheduler and a fake controller."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from fake_scheduler import FakeController, FakeScheduler, demo_files
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.cluster.gateway.main import DEFAULT_BOUNDS, Gateway, GatewayBounds, GatewayConfig
from quire.common.messages import ModelLimits
from quire.v1 import inference_pb2
from quire.v1.cluster_pb2_grpc import ClusterServiceStub
from quire.v1.inference_pb2_grpc import InferenceServiceStub

DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6  # frames of HTTP/2
LIMITS = (ModelLimits("quire-tales", 16, 2048),)


@dataclass
class Running:
    """What a test talks to."""

    gateway: Gateway
    scheduler: FakeScheduler
    controller: FakeController
    address: str
    channel: grpc.aio.Channel
    watch: asyncio.Task[None]

    @property
    def inference(self) -> Any:
        return InferenceServiceStub(self.channel)

    @property
    def cluster(self) -> Any:
        return ClusterServiceStub(self.channel)

    async def health(self, service: str = "") -> str:
        response = await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def num_models(self) -> int:
        return len((await self.inference.ListModels(inference_pb2.ListModelsRequest())).models)

    async def wait_for_health(self, status: str, *, timeout_s: float = 5.0) -> None:
        async def is_it() -> bool:
            return await self.health() == status

        await until(is_it, timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def running_gateway(
    tmp_path: Path,
    *,
    scheduler: FakeScheduler | None = None,
    files: dict[str, bytes] | None = None,
    model: dict[str, Any] | None = None,
    bounds: GatewayBounds = DEFAULT_BOUNDS,
    **settings: Any,
) -> AsyncIterator[Running]:
    """A ready gateway; `model` is what the table says of the model, `settings` are the config's."""
    scheduler = scheduler or FakeScheduler()
    scheduler.limits = scheduler.limits or LIMITS
    async with scheduler, FakeController(scheduler.address) as controller:
        controller.serve(files or demo_files(), **(model or {}))
        config = GatewayConfig(
            listen="127.0.0.1:0", discovery_address=controller.address, report_path=str(tmp_path / "report.json"), **settings
        )
        gateway = Gateway(config, bounds=bounds)
        address = await gateway.start()
        watch = asyncio.create_task(gateway.watch())
        try:
            async with asyncio.timeout(10):
                await gateway.is_ready.wait()
            async with grpc.aio.insecure_channel(address) as channel:
                yield Running(gateway, scheduler, controller, address, channel, watch)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await gateway.stop()


async def until(condition: Callable[[], bool | Awaitable[bool]], *, timeout_s: float = 10.0) -> None:
    """Look every few milliseconds: for what another process, or the far side of a socket, does in its own time."""
    async with asyncio.timeout(timeout_s):
        for pause_s in itertools.chain([0.0], itertools.repeat(0.01)):
            await asyncio.sleep(pause_s)
            held = condition()
            if held if isinstance(held, bool) else await held:
                return


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call ended well")


def details_of(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, list[str], float | None]:
    """The reason and numbers, the fields at fault, and the retry delay of an error."""
    info, fields, delay_s = error_details_pb2.ErrorInfo(), [], None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status = status_pb2.Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            for detail in status.details:
                bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
                if detail.Unpack(bad):
                    fields += [violation.field for violation in bad.field_violations]
                elif detail.Unpack(retry):
                    delay_s = retry.retry_delay.ToTimedelta().total_seconds()
                else:
                    detail.Unpack(info)
    return info, fields, delay_s


@contextlib.asynccontextmanager
async def zero_window_call(address: str, path: str, request: Message) -> AsyncIterator[asyncio.StreamReader]:
    """A call whose client answers settings and pings, and has no room for a single byte of an answer.

    By hand, for gRPC's own clients always make room. What the reader gets are whole frames, until the server closes.
    """

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload

    def header(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    async def answer() -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3]))
                kind, is_ack = head[3], head[4] & 1
                if kind in (SETTINGS, PING) and not is_ack:
                    writer.write(frame(kind, 1, 0, payload if kind == PING else b""))
                frames.feed_data(head + payload)
        frames.feed_eof()

    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    frames = asyncio.StreamReader()
    names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "content-type": "application/grpc", "te": "trailers"}
    headers = b"".join(header(name.encode(), value.encode()) for name, value in names.items())
    message = request.SerializeToString()
    body = b"\x00" + len(message).to_bytes(4) + message
    window = frame(SETTINGS, 0, 0, b"\x00\x04\x00\x00\x00\x00")
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + window + frame(HEADERS, 4, 1, headers) + frame(DATA, 1, 1, body))
    task = asyncio.create_task(answer())
    try:
        yield frames
    finally:
        writer.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def read_report(path: Path) -> dict[str, str] | None:
    """What the gateway process reported, if it has."""
    return json.loads(path.read_text()) if path.exists() else None
