"""Ranks that die or hang under load: their group is started anew, and every stream ends with the tokens of an undisturbed one."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from serving import ServeProcess, wait_for
from streams import TIMEOUT_S, Streams, request, undisturbed

from quire.client import Client

pytestmark = pytest.mark.chaos

NUM_STREAMS = 64
NUM_TOKENS = 60
RANK = "quire.worker.rank_process"
SCHEDULER = "quire.cluster.scheduler.process"


def all_streams(address: str) -> Streams:
    return Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)


def has_lost_one(client: Client, terms: dict[str, int]) -> bool:
    """Whether a group is not what it was, ready and in its former term."""
    return any(group.state != "READY" or group.term != terms[group.group_id] for group in client.cluster.groups())


def seconds_until(is_so: Callable[[], bool]) -> float:
    """How long it took, to a tenth."""
    started_s = time.monotonic()
    wait_for(is_so, timeout_s=TIMEOUT_S)
    return time.monotonic() - started_s


TWO_RANKS = ("--tensor-parallel-size", "2")
TWO_GROUPS = ("--groups", "2")


@pytest.mark.parametrize(
    ("signals", "arguments"),
    [
        ((signal.SIGKILL,), ()),
        ((signal.SIGSTOP,), ()),
        ((signal.SIGKILL,), TWO_RANKS),
        ((signal.SIGKILL, signal.SIGKILL), ()),
        ((signal.SIGKILL,), TWO_GROUPS),
        ((signal.SIGSTOP,), TWO_GROUPS),
        ((signal.SIGKILL,), (*TWO_GROUPS, *TWO_RANKS)),
    ],
    ids=[
        "killed",
        "stopped",
        "one of two killed",
        "killed twice",
        "beside another group",
        "stopped beside another group",
        "one of four killed",
    ],
)
def test_streams_survive_the_death_of_a_rank(tmp_path: Path, signals: Sequence[signal.Signals], arguments: Sequence[str]) -> None:
    with ServeProcess(tmp_path, *arguments) as serve:
        address = serve.wait_ready()
        expected = undisturbed(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        streams = all_streams(address)
        for times, number in enumerate(signals):
            wanted = (2 * times + 1) * NUM_STREAMS * NUM_TOKENS // 5
            wait_for(lambda wanted=wanted: streams.num_tokens >= wanted, timeout_s=TIMEOUT_S)  # type: ignore[misc]
            with Client(address) as client:
                terms = {group.group_id: group.term for group in client.cluster.groups()}
                os.kill(min(pid for pid, command in serve.processes().items() if f"-m {RANK} " in command), number)
                noticed_s = seconds_until(partial(has_lost_one, client, terms))
            print(f"{number.name}: noticed after {noticed_s:.1f} s")
        assert streams.wait() == expected
        print(f"longest pause: {streams.longest_pause_s:.1f} s")
        with Client(address) as client:
            wait_for(lambda: client.health() == "SERVING", timeout_s=TIMEOUT_S)
            wait_for(lambda: all(group.state == "READY" for group in client.cluster.groups()), timeout_s=TIMEOUT_S)
            assert sum(group.num_restarts for group in client.cluster.groups()) == len(signals)
            assert list(client.generate(**request(3, NUM_TOKENS)).token_ids) == expected[3]
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=20)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("arguments", [(), (*TWO_GROUPS, *TWO_RANKS)], ids=["one rank", "four ranks"])
def test_streams_survive_the_death_of_the_scheduler(tmp_path: Path, arguments: Sequence[str], number: signal.Signals) -> None:
    with ServeProcess(tmp_path, *arguments) as serve:
        address = serve.wait_ready()
        expected = undisturbed(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        streams = all_streams(address)
        wait_for(lambda: streams.num_tokens >= NUM_STREAMS * NUM_TOKENS // 4, timeout_s=TIMEOUT_S)
        former = serve.process_of(SCHEDULER)
        os.kill(former, number)
        replaced_s = seconds_until(
            lambda: any(f"-m {SCHEDULER}" in command and pid != former for pid, command in serve.processes().items())
        )
        print(f"{number.name}: noticed, and the next one started, after {replaced_s:.1f} s")
        assert streams.wait() == expected
        print(f"longest pause: {streams.longest_pause_s:.1f} s")
        with Client(address) as client:
            assert [group.detail for group in client.cluster.groups() if group.num_restarts] == []
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=20)
