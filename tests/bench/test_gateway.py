"""The benchmark of the gateway measures what it says, on loads too small to say anything about speed."""

import json
from dataclasses import asdict, replace

import pytest
from quire_command import quire

from quire.bench.gateway import GatewayReport, report_as_json, report_as_text
from quire.bench.gateway_measures import EngineRecord, GatewayLoad, GatewayMeasures, StreamTimes, measure, median_measures
from quire.bench.gateway_processes import gateway_bench

TINY = ("--streams", "3", "--tokens", "5", "--requests", "2", "--rounds", "2", "--tick", "0.01", "--saturating-tick", "0.004")


def test_each_time_of_the_client_is_set_against_the_engines() -> None:
    record = EngineRecord(submit_s={7: 10.5}, token_s={7: [11.0, 12.0, 13.0, 14.0]})
    # The first token came 0.25 s after it left, and the next two in one message, 0.5 s after the latter of them left.
    stream = StreamTimes(call_s=10.25, messages=[(11.25, 1), (13.5, 2), (14.5, 1)])
    measures = measure({7: stream}, record, gateway_cpu_s=0.002)
    expected = GatewayMeasures(
        added_gap_p50_s=0.125,  # gaps of 2.25 and 1 s, of 2 and 1 s at the engine
        added_gap_p99_s=0.2475,
        delay_p50_s=0.5,  # 0.25, 1.5, 0.5, 0.5
        delay_p99_s=1.47,
        added_ttft_p50_s=0.5,  # 1 s, of which the engine took 0.5
        added_ttft_p99_s=0.5,
        coalesced_share=0.25,
        tokens_per_s=4 / 3.25,
        messages_per_s=3 / 3.25,
        gateway_us_per_token=500.0,
    )
    assert asdict(measures) == pytest.approx(asdict(expected))


def test_a_token_that_is_missing_is_our_bug() -> None:
    record = EngineRecord(submit_s={0: 0.0}, token_s={0: [1.0, 2.0, 3.0]})
    with pytest.raises(AssertionError, match="2, 3"):
        measure({0: StreamTimes(0.0, [(1.0, 1), (2.0, 1)])}, record, gateway_cpu_s=0.0)


MEASURES = GatewayMeasures(0.0, 0.002, 0.001, 0.003, 0.004, 0.008, 0.01, 1000.0, 990.0, 50.0)


def test_targets_are_judged_by_the_median_of_the_paced_runs() -> None:
    slow = replace(MEASURES, added_gap_p99_s=0.5, added_ttft_p50_s=0.5)
    load = GatewayLoad(num_streams=2, num_tokens=3, num_requests=4, tick_s=0.01)
    assert median_measures([MEASURES, slow, MEASURES]) == MEASURES
    report = GatewayReport(load, (MEASURES, slow, MEASURES), load, (slow,))
    assert report_as_json(report)["targets_met"] == {"added_gap_p99": True, "added_ttft_p50": True, "coalesced_share": True}
    report = GatewayReport(load, (MEASURES, slow, slow), load, (MEASURES,))
    assert report_as_json(report)["targets_met"] == {"added_gap_p99": False, "added_ttft_p50": False, "coalesced_share": True}
    text = report_as_text(report)
    assert "2 streams, a tick each 10 ms, 8 requests of 3 tokens" in text
    assert ["added", "gap", "p99,", "ms", "500.00", "2.00", "500.00", "10"] in [line.split() for line in text.splitlines()]


def test_the_report_has_every_run_of_both_kinds() -> None:
    done = quire("bench", "gateway", *TINY, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report.keys() == {"paced", "saturating", "targets_met"}
    for kind, tick_s in (("paced", 0.01), ("saturating", 0.004)):
        runs = report[kind]
        assert (runs["num_streams"], runs["num_tokens"], runs["num_requests"], runs["tick_s"]) == (3, 5, 2, tick_s)
        assert len(runs["runs"]) == 2
        for run in (runs["median"], *runs["runs"]):
            assert run.keys() == set(GatewayMeasures.__dataclass_fields__)
            assert 0 <= run["coalesced_share"] < 1
            assert min(run["delay_p50_s"], run["added_ttft_p50_s"], run["tokens_per_s"], run["gateway_us_per_token"]) > 0


async def test_runs_of_one_gateway_do_not_mix() -> None:
    load = GatewayLoad(num_streams=2, num_tokens=4, num_requests=2, tick_s=0.005)
    async with gateway_bench() as bench:
        for _ in range(2):
            measures = await bench.run(load)  # it compares the tokens of each request with the engine's account of this run
            assert measures.tokens_per_s >= measures.messages_per_s > 0


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--streams", "0", "--streams is 0; it takes 1 or more"),
        ("--tokens", "1", "--tokens is 1; it takes 2 or more"),
        ("--rounds", "0", "--rounds is 0; it takes 1 or more"),
        ("--saturating-tick", "0", "--saturating-tick is 0.0; it takes more than 0 and at most 1 s"),
    ],
)
def test_loads_that_measure_nothing_are_refused(flag: str, value: str, says: str) -> None:
    done = quire("bench", "gateway", flag, value)
    assert done.returncode == 1
    assert says in done.stderr
