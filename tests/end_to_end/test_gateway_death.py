"""Gateways that die: their own streams end, everybody else's go on, and the next one is there at the same address."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_parts import until
from serving import ServeProcess

from quire.client import AsyncClient
from quire.v1.inference_pb2 import GenerateRequest, SamplingParams, StoppingParams
from quire.v1.inference_pb2_grpc import InferenceServiceStub

pytestmark = pytest.mark.chaos

GATEWAY = "quire.cluster.gateway.main"
NUM_STREAMS = 64
NUM_TOKENS = 60
TIMEOUT_S = 120.0


def request(index: int) -> GenerateRequest:
    """Every other one greedy, the others seeded."""
    sampling = SamplingParams(temperature=0.0) if index % 2 else SamplingParams(seed=100 + index, temperature=0.9)
    stopping = StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return GenerateRequest(text=f"Once upon a time there were {index} small", sampling=sampling, stopping=stopping)


class Streams:
    """All streams at once, each on a connection of its own, which the kernel gives to one gateway or another."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.token_ids: list[list[int]] = [[] for _ in range(NUM_STREAMS)]
        self.codes: list[grpc.StatusCode] = [grpc.StatusCode.UNKNOWN] * NUM_STREAMS
        self._tasks = [asyncio.create_task(self._read(index)) for index in range(NUM_STREAMS)]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    async def wait(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*self._tasks)

    async def _read(self, index: int) -> None:
        # Without this, gRPC gives all channels of a process one connection.
        async with grpc.aio.insecure_channel(self._address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            call = InferenceServiceStub(channel).GenerateStream(request(index))
            try:
                async for message in call:
                    self.token_ids[index] += message.token_ids
            except grpc.aio.AioRpcError:
                pass
            self.codes[index] = await call.code()


def gateways_of(serve: ServeProcess) -> set[int]:
    return {pid for pid, command in serve.processes().items() if f"-m {GATEWAY} " in command}


async def num_held_blocks(client: AsyncClient) -> int:
    return sum(blocks.gpu_blocks.num_held for blocks in await client.cluster.blocks())


async def test_the_death_of_one_of_two_gateways_ends_its_streams_alone(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, "--gateways", "2") as serve:
        address = await asyncio.to_thread(serve.wait_ready)
        undisturbed = Streams(address)
        await undisturbed.wait()
        expected = undisturbed.token_ids
        assert set(undisturbed.codes) == {grpc.StatusCode.OK}
        assert all(len(token_ids) == NUM_TOKENS for token_ids in expected)
        before = gateways_of(serve)
        assert len(before) == 2
        streams = Streams(address)
        await until(lambda: streams.num_tokens >= NUM_STREAMS * NUM_TOKENS // 4, timeout_s=TIMEOUT_S)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        await streams.wait()
        of_the_dead = [index for index, code in enumerate(streams.codes) if code is not grpc.StatusCode.OK]
        assert {streams.codes[index] for index in of_the_dead} == {grpc.StatusCode.UNAVAILABLE}
        assert 0 < len(of_the_dead) < NUM_STREAMS
        for index, token_ids in enumerate(streams.token_ids):
            assert token_ids == expected[index][: len(token_ids)], index
            assert index in of_the_dead or len(token_ids) == NUM_TOKENS, index
        await until(lambda: len(gateways_of(serve) - {killed}) == 2, timeout_s=30)
        again = Streams(address)
        await again.wait()
        assert again.token_ids == expected
        async with AsyncClient(address) as client:
            await until(lambda: is_zero(num_held_blocks(client)), timeout_s=20)
        assert "is started anew" in serve.output


async def is_zero(count: Any) -> bool:
    return bool(await count == 0)
