"""`quire bench serve`: what it sends, when, and what it says of the answers."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from fake_inference_server import Failure, FakeServer, Reply
from quire_command import quire

from quire.bench.engine_workloads import fixed
from quire.bench.progress_bar import bar_line
from quire.bench.request_meter import RequestRecord
from quire.bench.serve_clients import run_clients
from quire.bench.serve_plot import cumulative_points, load_matplotlib
from quire.bench.serve_report import LoadReport, parse_objectives, report_as_json, report_as_text
from quire.bench.serve_requests import LoadSpec, plan_requests, share_of
from quire.client import ConfigError
from quire.v1 import inference_pb2

SPEC = LoadSpec(
    address=None,
    model=None,
    num_requests=7,
    num_processes=2,
    concurrency=3,
    rate_per_s=None,
    prompts=("a", "b"),
    prompt_tokens=None,
    max_tokens=4,
    cache_salt=None,
    temperature=None,
    ignore_eos=None,
    vocab_size=4096,
    max_model_len=2048,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


# -- what is sent -------------------------------------------------------------------------------------------------------------


def test_processes_share_all_requests_and_callers() -> None:
    planned = plan_requests(SPEC)
    shares = [share_of(planned, SPEC, process=process) for process in range(2)]
    assert [[request.number for request in requests] for requests, _ in shares] == [[0, 2, 4, 6], [1, 3, 5]]
    assert [num_callers for _, num_callers in shares] == [2, 1]
    assert [request.prompt for request in planned] == ["a", "b", "a", "b", "a", "b", "a"]


def test_arrivals_of_an_open_loop_are_random_and_the_same_each_time() -> None:
    spec = replace(SPEC, num_requests=4000, concurrency=None, rate_per_s=20.0)
    arrivals_s = [request.arrival_s for request in plan_requests(spec)]
    assert arrivals_s == sorted(arrivals_s) == [request.arrival_s for request in plan_requests(spec)]
    assert arrivals_s[-1] == pytest.approx(200, rel=0.05)
    gaps_s = [later - sooner for sooner, later in itertools.pairwise(arrivals_s)]
    # Of exponential gaps 63 of 100 are below the mean.
    assert sum(gap_s < 1 / 20 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.632, abs=0.03)


def test_the_trace_has_its_lengths_within_what_the_model_takes() -> None:
    planned = plan_requests(replace(SPEC, prompts=(), num_requests=401))
    assert [(len(request.prompt), request.max_tokens, request.ignore_eos) for request in planned[:2]] == [(374, 44, True), (396, 109, True)]
    assert all(len(request.prompt) + request.max_tokens <= SPEC.max_model_len for request in planned)
    assert planned[400].prompt == planned[0].prompt


def test_random_prompts_are_as_long_as_is_asked_and_those_of_the_engine_alone() -> None:
    planned = plan_requests(replace(SPEC, prompts=(), prompt_tokens=30))
    assert [(request.prompt, request.max_tokens) for request in planned] == fixed((7, 30), num_tokens=4, vocab_size=4096)


def test_a_closed_loop_sends_each_request_once_with_its_number_as_seed(server: FakeServer) -> None:
    server.script = [Reply(pause_s=0.01)]
    seen: list[tuple[int, int]] = []
    sent = run_clients(replace(SPEC, address=server.address), on_end=lambda ended, failed, elapsed_s: seen.append((ended, failed)))
    assert [request.number for request in sent] == list(range(7))
    received = [request for request in server.requests if isinstance(request, inference_pb2.GenerateRequest)]
    assert sorted(request.sampling.seed for request in received) == list(range(7))
    assert {(request.sampling.seed % 2, request.text) for request in received} == {(0, "a"), (1, "b")}
    assert [request.late_s for request in sent] == [0.0] * 7
    assert all(request.record.num_tokens > 0 and request.end_s >= request.record.total_s > 0 for request in sent)
    assert seen[-1] == (7, 0)


def test_an_open_loop_waits_for_no_answer(server: FakeServer) -> None:
    """All requests arrive while the first one's answer is held back, far more than a closed loop would have sent."""
    server.script = [Reply(pause_s=0.2)]
    sent = run_clients(replace(SPEC, address=server.address, concurrency=None, rate_per_s=500.0))
    assert len(sent) == 7
    last_arrival_s = plan_requests(replace(SPEC, concurrency=None, rate_per_s=500.0))[-1].arrival_s
    assert min(request.end_s for request in sent) > last_arrival_s
    assert all(request.late_s >= 0 for request in sent)


def test_a_client_that_cannot_reach_the_server_says_so() -> None:
    with pytest.raises(Exception, match="a client process cannot go on"):
        run_clients(replace(SPEC, address="127.0.0.1:1", num_processes=1))


# -- what is said -------------------------------------------------------------------------------------------------------------


def record(ttft_s: float | None = 0.1, tpot_s: float | None = 0.01, total_s: float = 1.0, error: str | None = None) -> RequestRecord:
    return RequestRecord(5, 10, ttft_s, tpot_s, total_s, error, gaps_s=(0.01, 0.03))


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    records = (record(), record(ttft_s=0.6), record(tpot_s=None), record(tpot_s=0.06), record(total_s=3.0), record(error="X: y"))
    report = LoadReport("2 at a time", 2.0, records, objectives_s=parse_objectives(["ttft:500", "tpot:50", "e2e:2000"]))
    assert report.num_good == 2
    assert report_as_json(report)["goodput_requests_per_s"] == 1.0
    text = report_as_text(report, each=False)
    assert "goodput: 1.00 requests/s, 2 requests with ttft within 500 ms, tpot within 50 ms, e2e within 2000 ms" in text
    assert replace(report, objectives_s={"normalized": 0.2}).num_good == 4


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:0", "ttft:inf", "ttft:nan", "itl:5", ":5"])
def test_objectives_that_cannot_be_kept_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME:MILLISECONDS"):
        parse_objectives([text])


def test_spreads_are_of_requests_that_ended_well_and_gaps_of_all_of_them() -> None:
    report = LoadReport("1 at a time", 2.0, (record(), record(ttft_s=0.3), record(ttft_s=9.0, error="X: y")), late_s=(0.0, 0.002, 0.004))
    spreads = report.spreads()
    assert spreads["ttft_s"]["mean"] == pytest.approx(0.2)
    assert spreads["itl_s"]["p50"] == pytest.approx(0.02)
    assert spreads["normalized_s"]["p99"] == pytest.approx(0.1)
    assert spreads["late_s"]["p50"] == pytest.approx(0.002)
    text = report_as_text(report, each=True)
    assert "3 requests, 1 at a time: 30 tokens in 2.00 s, 15.0 tokens/s, 1.00 requests/s, 1 failed" in text
    assert "1 x X: y" in text


def test_a_report_of_failures_alone_has_no_spreads() -> None:
    report = LoadReport("1 at a time", 1.0, (RequestRecord(None, 0, None, None, 1.0, "X: y"),))
    assert report.spreads() == {}
    assert "1 failed" in report_as_text(report, each=False)


def test_the_bar_fills_up() -> None:
    assert bar_line(0, 4, "requests", elapsed_s=0.4).rstrip() == "[..............................] 0/4 requests, 0 s"
    assert bar_line(2, 4, "requests", elapsed_s=7, note=", 1 failed").rstrip() == (
        "[###############...............] 2/4 requests, 7 s, 1 failed"
    )
    assert bar_line(4, 4, "requests", elapsed_s=9).startswith("[" + "#" * 30 + "] 4/4")


def test_a_plot_is_refused_before_the_load_where_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "quire\[bench\]"'):
        load_matplotlib()


def test_a_curve_ends_at_all_values() -> None:
    assert cumulative_points([3.0, 1.0, 2.0, 2.0]) == [(1.0, 0.25), (2.0, 0.5), (2.0, 0.75), (3.0, 1.0)]
    assert cumulative_points([]) == []


# -- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_reports_failures_and_ends_with_one(server: FakeServer) -> None:
    server.script = [Reply(), Failure(grpc.StatusCode.INTERNAL, "broken", reason="BROKEN"), Reply()]
    done = quire("bench", "serve", "--requests", "4", "--concurrency", "2", "--goodput", "e2e:60000", "--json", address=server.address)
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert (report["num_requests"], report["num_failed"], report["num_good"]) == (4, 1, 3)
    assert {"ttft_s", "normalized_s", "total_s", "goodput_requests_per_s"} <= report.keys()
    assert [request["error"] for request in report["requests"]].count("BROKEN: broken") == 1


def test_random_prompts_are_found_in_no_cache_unless_that_is_asked_for(server: FakeServer) -> None:
    salts = []
    for flags in ((), (), ("--cache-salt", "mine"), ("--cache-salt", "")):
        server.requests.clear()
        done = quire("bench", "serve", "--requests", "3", "--prompt-tokens", "5", *flags, address=server.address)
        assert (done.returncode, done.stderr) == (0, "")
        assert "3 of 9 prompt tokens were cached" in done.stdout
        received = [request for request in server.requests if isinstance(request, inference_pb2.GenerateRequest)][-3:]
        salts.append({request.cache_salt for request in received})
    assert all(len(salt) == 1 for salt in salts)
    assert salts[0] != salts[1]
    assert min(map(len, salts[0] | salts[1])) == 16
    assert salts[2:] == [{"mine"}, {""}]
    server.requests.clear()
    quire("bench", "serve", "--requests", "3", address=server.address)
    assert not any(request.HasField("cache_salt") for request in server.requests if isinstance(request, inference_pb2.GenerateRequest))


def test_more_callers_and_processes_than_requests_are_fine(server: FakeServer) -> None:
    done = quire("bench", "serve", "--requests", "1", "--concurrency", "8", "--processes", "4", address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 requests, 1 at a time" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--requests", "0"), "--requests is 0; it takes 1 or more"),
        (("--max-tokens", "0"), "--max-tokens is 0; it takes 1 or more"),
        (("--processes", "65"), "it takes at most 64"),
        (("--rate", "0"), "it takes more than 0 requests per second"),
        (("--rate", "5", "--concurrency", "2"), "give one of them"),
        (("--workload", "azure", "--max-tokens", "5"), "--max-tokens does not go with --workload azure"),
        (("--workload", "azure", "--prompt-tokens", "5"), "--prompt-tokens does not go with --workload azure"),
        (("--prompt-tokens", "5", "--prompt-file", "x"), "give one of them"),
        (("--goodput", "ttft:500", "speed:1"), "names: ttft, tpot, e2e, normalized"),
        (("--prompt-file", "/nowhere/prompts"), "cannot be read"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: tuple[str, ...], says: str) -> None:
    done = quire("bench", "serve", *flags)
    assert done.returncode == 1
    assert says in done.stderr


def test_an_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("\n \n")
    done = quire("bench", "serve", "--prompt-file", str(path))
    assert done.returncode == 1
    assert "has no prompt in it" in done.stderr
