import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from quire.bench import cpu_workload
from quire.bench.cpu import TARGETS, Line, measure, ratios, report_as_text
from quire.bench.cpu_contestants import BATCH, Contestant, ContinuousBatching, Quire, StaticBatches
from quire.bench.cpu_workload import OUTPUT_TOKENS, PROMPT_TOKENS, Requests, make_requests
from quire.cli.main import main

TINY = {**cpu_workload.MODEL_CONFIG, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8}


class Counting:
    """Completes with a token that counts up, and notes its turns."""

    def __init__(self, name: str, turns: list[tuple[str, int]], first: int = 0) -> None:
        self.name = name
        self._turns = turns
        self._first = first

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def generate(self, requests: Requests) -> list[list[int]]:
        self._turns.append((self.name, len(requests)))
        return [[self._first] * count for _, count in requests]


def test_contestants_take_turns_and_are_compared_with_quire() -> None:
    turns: list[tuple[str, int]] = []
    requests = make_requests(5)
    quire, other, same = Counting("quire", turns), Counting("static batches of 32", turns, first=9), Counting("generate one by one", turns)
    lines = measure([quire, other], [quire, same], requests, dtype="float32", num_rounds=2)
    at_once = [("quire", 2), ("quire", 5), (other.name, 2), (other.name, 5)]
    alone = [("quire", 2), *[("quire", 1)] * 4, (same.name, 2), *[(same.name, 1)] * 4]
    assert turns == (at_once + alone) * 2
    assert [(line.name, line.is_alone, line.num_different, len(line.tokens_per_s)) for line in lines] == [
        ("quire", False, 0, 2),
        (other.name, False, 5, 2),
        ("quire", True, 0, 2),
        (same.name, True, 0, 2),
    ]


def test_ratios_are_medians_of_what_ran_side_by_side() -> None:
    lines = [
        Line("quire", "float32", False, (90, 300, 100), 0),
        Line("static batches of 32", "float32", False, (50, 150, 1), 0),
        Line("quire", "float32", True, (30,), 0),
        Line("generate one by one", "float32", True, (40,), 0),
    ]
    assert [(ratio.name, ratio.ratio, ratio.target) for ratio in ratios(lines)] == [
        ("static batches of 32", 2.0, TARGETS["static batches of 32"]),
        ("generate one by one", 0.75, TARGETS["generate one by one"]),
    ]
    assert "static batches of 32" in report_as_text(lines)


def test_the_workload_is_of_mixed_lengths_and_the_same_each_time() -> None:
    requests = make_requests(32)
    assert requests == make_requests(32)
    for lengths, (least, most) in (([len(p) for p, _ in requests], PROMPT_TOKENS), ([n for _, n in requests], OUTPUT_TOKENS)):
        assert least <= min(lengths) < max(lengths) <= most
        assert len(set(lengths)) > 16


@pytest.mark.slow
def test_all_engines_give_the_same_tokens_in_float32(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_workload, "MODEL_CONFIG", TINY)
    cpu_workload.save_model(tmp_path)
    requests = make_requests(6)
    engines: list[Contestant] = [
        Quire(tmp_path, dtype="float32"),
        ContinuousBatching(tmp_path, dtype="float32"),
        StaticBatches(tmp_path, dtype="float32", batch_size=BATCH),
        StaticBatches(tmp_path, dtype="float32", batch_size=1),
    ]
    completions = []
    for engine in engines:
        with engine.ready():
            completions.append(engine.generate(requests))
    assert [len(tokens) for tokens in completions[0]] == [count for _, count in requests]
    assert all(other == completions[0] for other in completions)


@pytest.mark.slow
def test_the_command_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu_workload, "MODEL_CONFIG", TINY)
    code = main(["bench", "cpu", "--json", "--rounds", "1", "--requests", "3", "--dtype", "float32"])
    report = json.loads(capsys.readouterr().out)
    assert code in (0, 1), "speeds of a moment are not what this test is about"
    assert {engine["name"] for engine in report["engines"]} == {"quire", *TARGETS}
    assert {ratio["name"] for ratio in report["ratios"]} == set(TARGETS)
    assert all(engine["num_different"] == 0 for engine in report["engines"])
