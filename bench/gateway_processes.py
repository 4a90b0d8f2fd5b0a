"""A gateway process between an engine that only ticks and clients: what `quire bench gateway` measures."""

import asyncio
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import zmq
import zmq.asyncio

from quire.bench.gateway_controller import StillController
from quire.bench.gateway_measures import EngineRecord, GatewayLoad, GatewayMeasures, StreamTimes, measure
from quire.bench.process_cpu import process_cpu_s
from quire.bench.story_prompts import STORY_PROMPTS
from quire.common.child_process import start_child, stop_child
from quire.common.clock import monotonic
from quire.common.config import ModelConfig, plan_model
from quire.common.errors import InternalError, Unavailable
from quire.v1 import inference_pb2
from quire.v1.inference_pb2_grpc import InferenceServiceStub

# How long the gateway may take to start, and to answer one whole run beyond the time that its ticks take.
START_TIMEOUT_S: Final = 60.0
RUN_TIMEOUT_S: Final = 120.0
REPORT_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.05


class GatewayBench:
    """A gateway process between an engine process and the clients here. Made by `gateway_bench`."""

    def __init__(self, address: str, gateway: "subprocess.Popen[bytes]", engine: "subprocess.Popen[bytes]", report_address: str) -> None:
        self._address = address
        self._gateway = gateway
        self._engine = engine
        self._report_address = report_address
        self._next_seed = 0  # names each request to the engine

    async def run(self, load: GatewayLoad) -> GatewayMeasures:
        """Raises:
        Unavailable: a process ended, or the run takes much longer than its ticks.
        """
        await self._ask_engine(load.tick_s)  # forgets what was before
        cpu_s = process_cpu_s(self._gateway.pid)
        timeout_s = RUN_TIMEOUT_S + (load.num_streams + load.num_tokens * load.num_requests) * load.tick_s
        try:
            async with asyncio.timeout(timeout_s), grpc.aio.insecure_channel(self._address) as channel:
                streams = await self._all_streams(InferenceServiceStub(channel), load)
        except TimeoutError:
            raise Unavailable(f"the run took more than {timeout_s:.0f} s; give fewer --streams or --tokens") from None
        except grpc.aio.AioRpcError as error:
            raise InternalError(f"a request failed: {error.code().name}: {error.details()}") from error
        cpu_s = process_cpu_s(self._gateway.pid) - cpu_s
        return measure(streams, await self._ask_engine(load.tick_s), gateway_cpu_s=cpu_s)

    async def _all_streams(self, stub: Any, load: GatewayLoad) -> dict[int, StreamTimes]:
        streams: dict[int, StreamTimes] = {}

        async def caller(number: int) -> None:
            await asyncio.sleep(number * load.tick_s)
            for _ in range(load.num_requests):
                seed, self._next_seed = self._next_seed, self._next_seed + 1
                streams[seed] = await _measure_stream(stub, _request(seed, load))

        try:
            async with asyncio.TaskGroup() as callers:
                for number in range(load.num_streams):
                    callers.create_task(caller(number))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one failure is enough to know
        return streams

    async def _ask_engine(self, tick_s: float) -> EngineRecord:
        """Set its tick; what it did since the last time."""
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.REQ)
        try:
            socket.connect(self._report_address)
            await socket.send(json.dumps({"tick_s": tick_s}).encode())
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                record = json.loads(await socket.recv())
        except TimeoutError:
            raise Unavailable(f"the engine said nothing for {REPORT_TIMEOUT_S:g} s, its exit code is {self._engine.poll()}") from None
        finally:
            context.destroy(linger=0)
        by_seed = {name: {int(seed): value for seed, value in record[name].items()} for name in ("submit_s", "token_s")}
        return EngineRecord(num_cancels=record["num_cancels"], **by_seed)


@contextlib.asynccontextmanager
async def gateway_bench() -> AsyncIterator[GatewayBench]:
    """The processes, for the built-in model's tokenizer; they end with the `with`."""
    plan = plan_model(ModelConfig(device="cpu"))
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as name:
        folder = Path(name)
        session, report_address = f"ipc://{folder}/session", f"ipc://{folder}/report"
        discovery = f"unix:{folder}/discovery"
        spec = {
            "session_address": session,
            "report_address": report_address,
            "model": plan.name,
            "max_request_tokens": plan.max_model_len,
        }
        controller = StillController(plan, scheduler_address=session, address=discovery, max_request_tokens=plan.max_model_len)
        async with contextlib.AsyncExitStack() as exits:
            engine = start_child("quire.bench.gateway_engine", spec)
            exits.callback(stop_child, engine)
            await exits.enter_async_context(controller)
            report = folder / "gateway.json"
            gateway = start_child(
                "quire.cluster.gateway.main",
                {
                    "listen": "127.0.0.1:0",
                    "discovery_address": discovery,
                    "report_path": str(report),
                    "drain_timeout_s": 0.0,
                    "log_level": "warning",
                },
            )
            exits.callback(stop_child, gateway)
            address = await asyncio.to_thread(_wait_for_address, report, gateway)
            yield GatewayBench(address, gateway, engine, report_address)


def _wait_for_address(report: Path, gateway: "subprocess.Popen[bytes]") -> str:
    """On a worker thread: meanwhile the controller answers."""
    give_up_s = monotonic() + START_TIMEOUT_S
    while not report.exists() and gateway.poll() is None and monotonic() < give_up_s:
        time.sleep(POLL_S)
    outcome = json.loads(report.read_text()) if report.exists() else {"error": f"it said nothing, its exit code is {gateway.poll()}"}
    if "error" in outcome:
        raise Unavailable(f"the gateway did not start within {START_TIMEOUT_S:g} s: {outcome['error']}")
    return str(outcome["address"])


def _request(seed: int, load: GatewayLoad) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        text=STORY_PROMPTS[seed % len(STORY_PROMPTS)],
        sampling=inference_pb2.SamplingParams(seed=seed),
        stopping=inference_pb2.StoppingParams(max_tokens=load.num_tokens, ignore_eos=True),
    )


async def _measure_stream(stub: Any, request: inference_pb2.GenerateRequest) -> StreamTimes:
    """Through the bare stub: the SDK's own work is not the gateway's."""
    stream = StreamTimes(call_s=monotonic())
    async for response in stub.GenerateStream(request):
        if response.token_ids:
            stream.messages.append((monotonic(), len(response.token_ids)))
    return stream
