import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fake_inference_server import Failure, FakeServer, Reply

from quire.bench.percentile import percentile
from quire.bench.request_meter import RequestMeter, RequestRecord
from quire.bench.serve_load import LoadReport, report_as_json, report_as_text, run_load
from quire.bench.table import format_table
from quire.client import AsyncClient, Delta, Usage


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def test_columns_of_numbers_stand_to_the_right_and_totals_below_a_rule() -> None:
    assert format_table(("name", "ms"), [("a", "1.5"), ("bcdef", "-")], totals=("all", "10.5")).splitlines() == [
        "name     ms",
        "-----  ----",
        "a       1.5",
        "bcdef     -",
        "-----  ----",
        "all    10.5",
    ]


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)])
def test_percentiles_lie_between_neighbours(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)
    assert percentile([5], percent) == 5


def delta(num_tokens: int, **given: Any) -> Delta:
    fields: dict[str, Any] = dict.fromkeys(Delta.__dataclass_fields__) | {"token_ids": tuple(range(num_tokens))} | given
    return Delta(**fields)


def test_the_meter_counts_from_the_call_and_divides_by_later_tokens() -> None:
    meter = RequestMeter(start_s=10.0)
    meter.add(delta(0), now_s=10.5)  # no token yet
    meter.add(delta(2), now_s=11.0)
    meter.add(delta(1), now_s=12.0)
    meter.add(delta(3), now_s=13.0)
    meter.add(delta(0, usage=Usage(num_prompt_tokens=5, num_cached_tokens=0, num_completion_tokens=6)), now_s=14.0)
    record = meter.record(now_s=14.0)
    assert record == RequestRecord(num_prompt_tokens=5, num_tokens=6, ttft_s=1.0, tpot_s=0.5, total_s=4.0, error=None)
    assert record.tokens_per_s == 1.5


def test_a_request_without_later_tokens_has_no_time_per_token() -> None:
    meter = RequestMeter(start_s=0.0)
    assert meter.record(now_s=1.0, error="X: y") == RequestRecord(None, 0, None, None, 1.0, "X: y")
    meter.add(delta(3), now_s=0.5)
    assert meter.record(now_s=1.0).tpot_s is None


async def test_the_load_keeps_its_concurrency_and_counts_failures(server: FakeServer) -> None:
    server.script = [Failure(grpc.StatusCode.INTERNAL, "broken", reason="BROKEN"), Reply(pause_s=0.01)]
    async with AsyncClient(server.address) as client:
        report = await run_load(client, ["a", "b"], num_requests=7, concurrency=3, options={"max_tokens": 4})
    assert (len(report.records), report.num_failed, report.concurrency) == (7, 1, 3)
    assert sum(record.num_tokens for record in report.records) == 24
    assert sorted(request.sampling.seed for request in server.requests) == list(range(7))
    text = report_as_text(report, each=True)
    assert "7 requests, 3 at a time: 24 tokens" in text
    assert "1 failed" in text
    assert "1 x BROKEN: broken" in text
    assert report_as_json(report)["ttft_s"]["p50"] > 0


def test_a_report_of_failures_alone_has_no_spreads() -> None:
    report = LoadReport(concurrency=1, wall_s=1.0, records=(RequestRecord(None, 0, None, None, 1.0, "X: y"),))
    assert report.spreads() == {}
    assert "1 failed" in report_as_text(report, each=False)


def test_more_callers_than_requests_is_fine(server: FakeServer) -> None:
    async def run() -> LoadReport:
        async with AsyncClient(server.address) as client:
            return await run_load(client, ["a"], num_requests=2, concurrency=8, options={})

    assert len(asyncio.run(run()).records) == 2
