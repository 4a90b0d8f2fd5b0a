"""Ranks that load while Ray starts, and what becomes of them."""

import contextlib
import os
import signal
from pathlib import Path

from serving import START_TIMEOUT_S, ServeProcess, wait_for

from quire.client import Client, Unavailable

RANK = "quire.worker.rank_process"
BEGAN = "began to load before it was asked for"


def rank_pids(serve: ServeProcess) -> set[int]:
    return {pid for pid, command in serve.processes().items() if f"-m {RANK} " in command}


def logs_of(serve: ServeProcess) -> Path:
    (logs,) = serve.temporary.glob("quire-*/logs")
    return logs


def tokens_of(address: str) -> tuple[int, ...]:
    with Client(address) as client:
        return client.generate("Once upon a time", max_tokens=20, temperature=0.0, ignore_eos=True).token_ids


def test_each_group_takes_one_and_the_ranks_of_later_terms_are_started_when_they_are_needed(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, "--groups", "2") as serve:
        wait_for(lambda: len(rank_pids(serve)) == 2, timeout_s=START_TIMEOUT_S)
        early = rank_pids(serve)
        address = serve.wait_ready()
        assert rank_pids(serve) == early, "those that began early serve"
        logs = logs_of(serve)
        ranks = [(logs / f"quire-tales-{group}-0.log").read_text() for group in range(2)]
        assert all("ready in" in text and text.count(BEGAN) == 1 for text in ranks), "what they wrote before is in their log too"
        expected = tokens_of(address)
        os.kill(min(early), signal.SIGKILL)
        wait_for(lambda: len(rank_pids(serve)) == 2 and min(early) not in rank_pids(serve), timeout_s=START_TIMEOUT_S)
        wait_for(lambda: sum((logs / f"quire-tales-{group}-0.log").read_text().count("ready in") for group in range(2)) == 3, timeout_s=60)
        assert tokens_of(address) == expected
        assert sum((logs / f"quire-tales-{group}-0.log").read_text().count(BEGAN) for group in range(2)) == 2


def test_one_that_dies_before_anyone_asked_for_it_is_replaced(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        wait_for(lambda: len(rank_pids(serve)) == 1, timeout_s=START_TIMEOUT_S)
        (early,) = rank_pids(serve)
        os.kill(early, signal.SIGKILL)
        address = serve.wait_ready()
        assert early not in rank_pids(serve)
        assert tokens_of(address)
        assert BEGAN not in (logs_of(serve) / "quire-tales-0-0.log").read_text()


def test_it_ends_with_the_actor_that_owns_it(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        address = serve.wait_ready()
        expected = tokens_of(address)
        (early,) = rank_pids(serve)
        owners = [pid for pid, command in serve.processes().items() if "ray::_ProcessActor" in command]
        for owner in owners:
            os.kill(owner, signal.SIGKILL)
        wait_for(lambda: early not in rank_pids(serve), timeout_s=10)

        def serves_again() -> bool:
            with contextlib.suppress(Unavailable):
                return tokens_of(address) == expected
            return False

        wait_for(serves_again, timeout_s=START_TIMEOUT_S)
