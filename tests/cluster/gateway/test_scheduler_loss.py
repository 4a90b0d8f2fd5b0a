"""kill -9 of the scheduler process under load: the real gateway, scheduler and rank; every stream ends as if nothing had been."""

import asyncio
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from engine_processes import EngineProcesses, engine_processes
from fake_scheduler import FakeController, demo_files
from gateway_parts import refusal, until

from quire.cluster.gateway.main import Gateway, GatewayConfig
from quire.v1.inference_pb2 import BeamSearchParams, GenerateRequest, OutputParams, SamplingParams, StoppingParams
from quire.v1.inference_pb2_grpc import InferenceServiceStub

NUM_STREAMS = 16
NUM_TOKENS = 160
# Tokens that each stream has got, together with those before, when the scheduler is killed.
KILL_AFTER_TOKENS = (8, 40)
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcesses]:
    with engine_processes() as engine:
        yield engine


@pytest_asyncio.fixture
async def inference(engine: EngineProcesses, tmp_path: Path) -> AsyncIterator[Any]:
    async with FakeController(engine.addresses["session"]) as controller:
        controller.serve(demo_files())
        gateway = Gateway(GatewayConfig("127.0.0.1:0", controller.address, str(tmp_path / "report.json")))
        address = await gateway.start()
        watch = asyncio.create_task(gateway.watch())
        try:
            async with asyncio.timeout(30):
                await gateway.is_ready.wait()
            async with grpc.aio.insecure_channel(address) as channel:
                yield InferenceServiceStub(channel)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await gateway.stop()


class Stream:
    """What came of one request, by sequence."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = defaultdict(list)
        self.texts: dict[int, str] = defaultdict(str)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.prompt_logprobs: list[float] = []
        self.ends: dict[int, tuple[int, str, float]] = {}
        self.num_completion_tokens = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(token_ids) for token_ids in self.token_ids.values())

    async def run(self, inference: Any, request: GenerateRequest) -> None:
        async for message in inference.GenerateStream(request):
            self.token_ids[message.index] += message.token_ids
            self.texts[message.index] += message.text_delta
            self.logprobs[message.index] += [entry.token.logprob for entry in message.logprobs]
            self.prompt_logprobs += [entry.token.logprob for entry in message.prompt_logprobs]
            if message.finish_reason:
                assert message.index not in self.ends
                self.ends[message.index] = (message.finish_reason, message.stop_cause.string, message.cumulative_logprob)
            self.num_completion_tokens += message.usage.completion_token_count

    def check_same(self, other: "Stream") -> None:
        """Tokens, text and reasons are equal; log probabilities are, up to rounding: they were computed in other batches."""
        assert self.token_ids == other.token_ids
        assert self.texts == other.texts
        assert self.num_completion_tokens == other.num_completion_tokens
        assert {index: end[:2] for index, end in self.ends.items()} == {index: end[:2] for index, end in other.ends.items()}
        for mine, others in ((self.logprobs, other.logprobs), ({0: self.prompt_logprobs}, {0: other.prompt_logprobs})):
            assert mine.keys() == others.keys()
            for index, values in mine.items():
                assert values == pytest.approx(others[index], abs=1e-3)
        assert [end[2] for end in self.ends.values()] == pytest.approx([other.ends[index][2] for index in self.ends], abs=0.05)


def a_request(number: int) -> GenerateRequest:
    """Greedy and seeded ones by turns; some with several samples, log probabilities, a stop string, penalties."""
    sampling = SamplingParams(temperature=0.0) if number % 2 == 0 else SamplingParams(temperature=1.0, seed=number)
    if number % 4 == 3:
        sampling.frequency_penalty = 0.3
    request = GenerateRequest(
        text=f"Once upon a time there were {number} little",
        sampling=sampling,
        stopping=StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
    )
    if number in (5, 9):
        request.n = 2
    if number in (2, 5):
        request.output.CopyFrom(OutputParams(logprobs=2, prompt_logprobs=1))
    if number in (6, 7):
        request.stopping.stop_strings.append("zebra crossing")
    return request


def have_all(streams: list[Stream], num_tokens: int) -> bool:
    return all(stream.num_tokens >= num_tokens for stream in streams)


async def run_all(inference: Any, requests: list[GenerateRequest]) -> tuple[list[Stream], asyncio.Future[Any]]:
    streams = [Stream() for _ in requests]
    return streams, asyncio.gather(*(stream.run(inference, request) for stream, request in zip(streams, requests, strict=True)))


async def test_streams_end_with_the_undisturbed_tokens_after_two_kills_of_the_scheduler(engine: EngineProcesses, inference: Any) -> None:
    requests = [a_request(number) for number in range(NUM_STREAMS)]
    async with asyncio.timeout(TIMEOUT_S):
        undisturbed, ends = await run_all(inference, requests)
        await ends
        disturbed, ends = await run_all(inference, requests)
        for num_tokens in KILL_AFTER_TOKENS:
            await until(functools.partial(have_all, disturbed, num_tokens), timeout_s=TIMEOUT_S)
            assert not any(stream.ends for stream in disturbed), "the kill is to come in their midst"
            await engine.restart_scheduler()
        await ends
    assert all(stream.num_completion_tokens == sum(map(len, stream.token_ids.values())) for stream in undisturbed)
    for stream, expected in zip(disturbed, undisturbed, strict=True):
        stream.check_same(expected)
    assert engine.rank.poll() is None
    queue = engine.status().queue
    assert (queue.num_waiting, queue.num_running_requests) == (0, 0)


async def test_beams_begin_anew_and_come_out_the_same(engine: EngineProcesses, inference: Any) -> None:
    requests = [
        GenerateRequest(text=text, beam_search=BeamSearchParams(beam_count=3), n=2, stopping=StoppingParams(max_tokens=100))
        for text in ("Once upon a time", "The little dog")
    ]
    async with asyncio.timeout(TIMEOUT_S):
        undisturbed, ends = await run_all(inference, requests)
        await ends
        disturbed, ends = await run_all(inference, requests)
        await until(lambda: engine.status().queue.num_running_requests == 2)
        await engine.restart_scheduler()
        await ends
    for stream, expected in zip(disturbed, undisturbed, strict=True):
        assert stream.num_tokens > 0
        stream.check_same(expected)


async def test_cancels_and_deadlines_reach_the_scheduler_while_its_requests_run(engine: EngineProcesses, inference: Any) -> None:
    def running() -> int:
        return engine.status().queue.num_running_requests

    request = GenerateRequest(text="x", stopping=StoppingParams(max_tokens=1900, ignore_eos=True))
    cancelled, late = inference.GenerateStream(request), inference.GenerateStream(request, timeout=3.0)
    for call in (cancelled, late):
        await call.read()
    cancelled.cancel()
    await until(lambda: running() <= 1)
    error = await refusal(late)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: running() == 0)
    assert engine.status().groups[0].gpu.held == 0
