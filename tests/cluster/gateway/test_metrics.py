"""A gateway's metrics: every request counted once, however it ends, and nothing counted per token."""

import asyncio
import urllib.request
from pathlib import Path

import grpc
import prometheus_client.metrics
import pytest
from fake_scheduler import FakeScheduler, Script
from gateway_parts import running_gateway, until
from prometheus_client.parser import text_string_to_metric_families

from quire.common.messages import Cancel, Rejected, Submit
from quire.common.metric_names import GATEWAY_METRICS
from quire.v1 import inference_pb2

MODEL = "quire-tales"


def _request(*, max_tokens: int = 4, text: str = "once") -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text, stopping=inference_pb2.StoppingParams(max_tokens=max_tokens))


async def _page(address: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


async def _scrape(address: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = await _page(address)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset({"model": MODEL, **labels}.items())


async def test_a_request_that_ends_well_is_counted_with_its_tokens_and_times(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script(token_ids=(5, 6, 7, 8)))
    async with running_gateway(tmp_path, scheduler=scheduler, metrics_listen="127.0.0.1:0") as running:
        await running.inference.Generate(_request())
        assert running.gateway.pages.address is not None
        samples = await _scrape(running.gateway.pages.address)
    assert samples[_key("quire_requests_total", outcome="ok", reason="LENGTH")] == 1
    assert samples[_key("quire_completion_tokens_total")] == 4
    assert samples[_key("quire_prompt_tokens_total")] > 0
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert samples[_key(f"quire_{name}_seconds_count")] == 1
        assert 0 <= samples[_key(f"quire_{name}_seconds_sum")] < 60
    assert samples[_key("quire_queue_time_seconds_count", priority="normal")] == 1
    assert samples["quire_gateway_ready", frozenset()] == 1
    assert samples["quire_gateway_calls", frozenset()] == 0


async def test_how_a_request_fails_is_a_label(tmp_path: Path) -> None:
    def refuse(fake: FakeScheduler, submit: Submit, _: int) -> None:
        full = Rejected(submit.request_id, submit.attempt, 8, "QUEUE_FULL", "the queue is full")
        tasks.append(asyncio.ensure_future(fake.send(full)))

    tasks: list[object] = []
    async with running_gateway(tmp_path, scheduler=FakeScheduler(on_submit=refuse), metrics_listen="127.0.0.1:0") as running:
        for request in (_request(), _request(max_tokens=100_000), inference_pb2.GenerateRequest(model="made-up", text="x")):
            with pytest.raises(grpc.aio.AioRpcError):
                await running.inference.Generate(request)
        assert running.gateway.pages.address is not None
        samples = await _scrape(running.gateway.pages.address)
    ends = {
        tuple(sorted(dict(labels).items())): value for (name, labels), value in samples.items() if name == "quire_requests_total" and value
    }
    assert sum(ends.values()) == 3
    assert samples[_key("quire_requests_total", outcome="resource_exhausted", reason="QUEUE_FULL")] == 1
    assert not any("made-up" in str(labels) for labels in ends), "what a client makes up is no label"
    assert {dict(labels)["outcome"] for labels in ends} == {"resource_exhausted", "invalid_argument", "not_found"}


async def test_a_client_that_leaves_is_counted_as_cancelled(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script(token_ids=(5,), ends=False))
    async with running_gateway(tmp_path, scheduler=scheduler, metrics_listen="127.0.0.1:0") as running:
        call = running.inference.GenerateStream(_request(max_tokens=100))
        await call.read()
        call.cancel()
        await scheduler.wait_for(Cancel)
        await until(lambda: running.gateway.gate.num_calls == 0)
        assert running.gateway.pages.address is not None
        samples = await _scrape(running.gateway.pages.address)
    assert samples[_key("quire_requests_total", outcome="cancelled", reason="CLIENT_GONE")] == 1
    assert samples[_key("quire_completion_tokens_total")] == 1


async def test_no_metric_is_touched_per_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    for kind, method in ((prometheus_client.metrics.Counter, "inc"), (prometheus_client.metrics.Histogram, "observe")):
        original = getattr(kind, method)

        def counting(self: object, *args: object, original: object = original, **kwargs: object) -> None:
            nonlocal calls
            calls += 1
            original(self, *args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(kind, method, counting)
    scheduler = FakeScheduler(script=lambda submit: Script(token_ids=tuple(5 for _ in range(submit.max_tokens))))
    counts = {}
    async with running_gateway(tmp_path, scheduler=scheduler) as running:
        for num_tokens in (2, 300):
            before = calls
            num_messages = 0
            async for _ in running.inference.GenerateStream(_request(max_tokens=num_tokens)):
                num_messages += 1
            counts[num_tokens] = calls - before
            assert num_messages >= 1
    assert counts[2] == counts[300] > 0


async def test_each_metric_of_the_list_is_on_the_page(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, metrics_listen="127.0.0.1:0") as running:
        address = running.gateway.pages.address
        assert address is not None
        page = await _page(address)
    assert [metric.name for metric in GATEWAY_METRICS if f"# TYPE {metric.name} {metric.kind}\n" not in page] == []
