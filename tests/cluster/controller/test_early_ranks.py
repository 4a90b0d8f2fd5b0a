"""Early ranks that nobody can ask for, or nobody asks for."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import wait_for

from quire.cluster.controller.early_ranks import EarlyRanks, early_folder, early_names
from quire.cluster.controller.process_actor import is_stopped
from quire.common.config import plan_model, resolve_config
from quire.common.early_child import adopt_child


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EarlyRanks]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    plan = plan_model(resolve_config({"device": "cpu", "groups": 2, "num_threads": 1}, environ={}).models[0])
    ranks = EarlyRanks(plan, folder=tmp_path, logs=tmp_path, log_level="info", gpus=[])
    yield ranks
    ranks.end()


def num_alive(ranks: EarlyRanks) -> int:
    return sum(child.poll() is None for child in ranks._children.values())


def hold(path: Path, pid: int) -> None:
    """Stop one before it listens, or as if it had been before."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(pid), timeout_s=20)
    path.unlink(missing_ok=True)


def test_those_that_nobody_takes_are_ended(ranks: EarlyRanks, tmp_path: Path) -> None:
    assert ranks.count == 2
    ranks.wait_listening(timeout_s=60, is_over=lambda: False)
    assert num_alive(ranks) == 2
    assert sorted(path.name for path in early_folder(tmp_path).iterdir()) == ["cpu-0.early", "cpu-1.early"]
    assert adopt_child(early_folder(tmp_path), early_names("0"), {}, log_path=tmp_path / "log") is None, "they have no GPU"
    ranks.end_unused()
    assert num_alive(ranks) == 0


def test_one_that_does_not_listen_in_time_is_ended(ranks: EarlyRanks) -> None:
    path, late = next(iter(ranks._children.items()))
    hold(path, late.pid)
    ranks.wait_listening(timeout_s=0.5, is_over=lambda: False)
    assert late.poll() is not None


def test_when_it_is_over_nothing_is_waited_for(ranks: EarlyRanks) -> None:
    for path, child in ranks._children.items():
        hold(path, child.pid)
    ranks.wait_listening(timeout_s=600, is_over=lambda: True)
    assert num_alive(ranks) == 0


@pytest.mark.parametrize(("gpu", "names"), [(None, "cpu-*"), ("1", "gpu-1-*"), (" 1", "gpu-1-*"), ("GPU-ab", "gpu-GPU-ab-*")])
def test_gpus_are_known_by_their_names_with_and_without_blanks(gpu: str | None, names: str) -> None:
    assert early_names(gpu) == names
