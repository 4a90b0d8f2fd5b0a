"""Traces of requests: what a collector gets of them, over OTLP."""

import asyncio
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from fake_scheduler import FakeScheduler, Script
from gateway_parts import refusal, running_gateway, until
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from otlp_receiver import OtlpReceiver, attributes

from quire.client import AsyncClient, Client
from quire.client.options import GenerateOptions
from quire.cluster.gateway.tracing import Tracing
from quire.common.errors import ConfigError
from quire.common.messages import Cancel, Submit
from quire.v1 import inference_pb2

SCRIPT = Script(token_ids=(5, 6, 7, 8))
REQUEST = inference_pb2.GenerateRequest(text="once", stopping=inference_pb2.StoppingParams(max_tokens=4))
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = PARENT[:-2] + "00"


async def test_a_request_is_a_span_with_its_phases_below_the_clients(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: SCRIPT)
    with OtlpReceiver() as collector:
        async with running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint=collector.address) as running:
            await running.inference.Generate(REQUEST, metadata=(("traceparent", PARENT),))
            submit = await scheduler.wait_for(Submit)
        spans = collector.by_name()
    assert spans.keys() >= {"generate quire-tales", "quire.queue", "quire.prefill", "quire.decode"}
    server = spans["generate quire-tales"]
    assert server.trace_id.hex() == PARENT[3:35]
    assert server.parent_span_id.hex() == PARENT[36:52]
    assert submit.trace == f"00-{server.trace_id.hex()}-{server.span_id.hex()}-01"
    for name in ("quire.queue", "quire.prefill", "quire.decode"):
        phase = spans[name]
        assert phase.trace_id == server.trace_id
        assert phase.parent_span_id == server.span_id
        assert server.start_time_unix_nano <= phase.start_time_unix_nano <= phase.end_time_unix_nano <= server.end_time_unix_nano
    assert spans["quire.queue"].end_time_unix_nano <= spans["quire.prefill"].start_time_unix_nano + 1_000_000
    found = attributes(server)
    assert found["gen_ai.request.model"] == "quire-tales"
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.usage.output_tokens"] == 4
    assert found["gen_ai.usage.input_tokens"] > 0
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["rpc.method"] == "Generate"
    assert not any("once" in str(value) for value in found.values()), "nothing of the text"
    assert collector.resources[0]["service.name"] == "quire-gateway"


async def test_what_fails_says_why(tmp_path: Path) -> None:
    with OtlpReceiver() as collector:
        async with running_gateway(tmp_path, otlp_endpoint=collector.address) as running:
            await refusal(running.inference.Generate(inference_pb2.GenerateRequest(model="made-up", text="x")))
        (span,) = collector.spans
    assert span.name == "generate"
    assert span.status.code == 2
    assert attributes(span)["error.type"] == "MODEL_NOT_FOUND"


async def test_a_client_that_leaves_ends_its_span(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script(token_ids=(5,), ends=False))
    with OtlpReceiver() as collector:
        async with running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint=collector.address) as running:
            call = running.inference.GenerateStream(REQUEST)
            await call.read()
            call.cancel()
            await scheduler.wait_for(Cancel)
            await until(lambda: running.gateway.gate.num_calls == 0)
        (span,) = collector.spans
    assert attributes(span)["error.type"] == "CLIENT_GONE"
    assert attributes(span)["gen_ai.usage.output_tokens"] == 1


async def test_who_is_not_sampled_is_not_sent(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: SCRIPT)
    with OtlpReceiver() as collector:
        async with running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint=collector.address) as running:
            await running.inference.Generate(REQUEST, metadata=(("traceparent", NOT_SAMPLED),))
        async with running_gateway(tmp_path, otlp_endpoint=collector.address, trace_sample_ratio=0.0) as running:
            await refusal(running.inference.Generate(inference_pb2.GenerateRequest(model="made-up", text="x")))
        assert collector.spans == []


async def test_a_collector_that_is_gone_costs_no_request(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: SCRIPT)
    async with running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint="http://127.0.0.1:9") as running:
        response = await running.inference.Generate(REQUEST)
        assert len(response.completions[0].token_ids) == 4


async def test_the_sdk_hands_on_the_span_that_it_is_called_in(tmp_path: Path) -> None:
    provider = TracerProvider()
    with OtlpReceiver() as collector:
        scheduler = FakeScheduler(script=lambda _: SCRIPT)
        async with (
            running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint=collector.address) as running,
            AsyncClient(running.address) as client,
        ):
            with provider.get_tracer("test").start_as_current_span("mine") as mine:
                await client.generate("once", max_tokens=4)
            await client.generate("once", max_tokens=4)
        below, alone = sorted((s for s in collector.spans if s.name.startswith("generate")), key=lambda s: s.start_time_unix_nano)
    context = mine.get_span_context()
    assert below.trace_id.hex() == trace.format_trace_id(context.trace_id)
    assert below.parent_span_id.hex() == trace.format_span_id(context.span_id)
    assert alone.parent_span_id == b""


@pytest.mark.parametrize("how", ["generate", "stream", "async generate", "async stream"])
async def test_each_request_of_the_sdk_is_a_span_that_ends_with_it(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)  # the global one can be set only once in a process
    options: GenerateOptions = {"model": "quire-tales", "max_tokens": 4}

    def call_from_a_thread(address: str) -> None:
        with Client(address) as client:
            if how == "generate":
                client.generate("once", **options)
            else:
                list(client.stream("once", **options))

    with OtlpReceiver() as collector:
        scheduler = FakeScheduler(script=lambda _: SCRIPT)
        async with running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint=collector.address) as running:
            if how.startswith("async"):
                async with AsyncClient(running.address) as client:
                    if how == "async generate":
                        await client.generate("once", **options)
                    else:
                        assert [delta async for delta in client.stream("once", **options)]
            else:
                await asyncio.to_thread(call_from_a_thread, running.address)
            await until(lambda: len(exported.get_finished_spans()) == 1)
        server = collector.by_name()["generate quire-tales"]
    (span,) = exported.get_finished_spans()
    assert (span.name, span.kind) == ("text_completion quire-tales", trace.SpanKind.CLIENT)
    assert server.parent_span_id.hex() == trace.format_span_id(span.context.span_id)
    assert server.trace_id.hex() == trace.format_trace_id(span.context.trace_id)


async def test_histograms_name_a_trace_for_who_asks_in_openmetrics(tmp_path: Path) -> None:
    def read(address: str) -> str:
        request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return str(response.read().decode())

    scheduler = FakeScheduler(script=lambda _: SCRIPT)
    with OtlpReceiver() as collector:
        pages = "127.0.0.1:0"
        async with running_gateway(tmp_path, scheduler=scheduler, otlp_endpoint=collector.address, metrics_listen=pages) as running:
            await running.inference.Generate(REQUEST, metadata=(("traceparent", PARENT),))
            assert running.gateway.pages.address is not None
            page = await asyncio.to_thread(read, running.gateway.pages.address)
    marked = [line for line in page.splitlines() if f'# {{trace_id="{PARENT[3:35]}"}}' in line]
    assert {line.partition("_bucket")[0] for line in marked} == {"quire_time_to_first_token_seconds", "quire_request_duration_seconds"}


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    code = "import quire.cluster.gateway.main, quire.client, sys; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://x:1", ""])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="it takes http://HOST:PORT"):
        Tracing(endpoint, sample_ratio=1.0)
