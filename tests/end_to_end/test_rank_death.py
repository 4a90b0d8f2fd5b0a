"""Ranks that die or hang under load: their group is started anew, and every stream ends with the tokens of an undisturbed one."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import ServeProcess, wait_for

from quire.client import Client

pytestmark = pytest.mark.chaos

NUM_STREAMS = 16
NUM_TOKENS = 60
TIMEOUT_S = 120.0
RANK = "quire.worker.rank_process"
SCHEDULER = "quire.cluster.scheduler.process"


def request(index: int) -> dict[str, Any]:
    """Every other one greedy, the others seeded."""
    chance = {"temperature": 0.0} if index % 2 else {"seed": 100 + index, "temperature": 0.9}
    return {"prompt": f"Once upon a time there were {index} small", "max_tokens": NUM_TOKENS, "ignore_eos": True, **chance}


class Streams:
    """NUM_STREAMS streams at once, each in a thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.token_ids: list[list[int]] = [[] for _ in range(NUM_STREAMS)]
        self.errors: list[BaseException] = []
        self.longest_pause_s = 0.0
        self._threads = [threading.Thread(target=self._read, args=(index,), daemon=True) for index in range(NUM_STREAMS)]
        for thread in self._threads:
            thread.start()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    def wait(self) -> list[list[int]]:
        deadline_s = time.monotonic() + TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        assert not self.errors, self.errors
        assert not any(thread.is_alive() for thread in self._threads), [len(ids) for ids in self.token_ids]
        return self.token_ids

    def _read(self, index: int) -> None:
        try:
            with Client(self._address, max_retries=0) as client:
                last_s = time.monotonic()
                for delta in client.stream(**request(index)):
                    self.token_ids[index] += delta.token_ids
                    now_s = time.monotonic()
                    self.longest_pause_s = max(self.longest_pause_s, now_s - last_s)
                    last_s = now_s
        except BaseException as error:
            self.errors.append(error)


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
        ((signal.SIGKILL,), (*TWO_GROUPS, *TWO_RANKS)),
    ],
    ids=["killed", "stopped", "one of two killed", "killed twice", "beside another group", "one of four killed"],
)
def test_streams_survive_the_death_of_a_rank(tmp_path: Path, signals: Sequence[signal.Signals], arguments: Sequence[str]) -> None:
    with ServeProcess(tmp_path, *arguments) as serve:
        address = serve.wait_ready()
        expected = Streams(address).wait()
        assert all(len(token_ids) == NUM_TOKENS for token_ids in expected)
        streams = Streams(address)
        for times, number in enumerate(signals):
            wanted = (2 * times + 1) * NUM_STREAMS * NUM_TOKENS // 5
            wait_for(lambda wanted=wanted: streams.num_tokens >= wanted, timeout_s=TIMEOUT_S)  # type: ignore[misc]
            os.kill(min(pid for pid, command in serve.processes().items() if f"-m {RANK} " in command), number)
        assert streams.wait() == expected
        print(f"longest pause: {streams.longest_pause_s:.1f} s")
        with Client(address) as client:
            wait_for(lambda: client.health() == "SERVING", timeout_s=TIMEOUT_S)
            wait_for(lambda: all(group.state == "READY" for group in client.cluster.groups()), timeout_s=TIMEOUT_S)
            assert sum(group.num_restarts for group in client.cluster.groups()) == len(signals)
            assert list(client.generate(**request(3)).token_ids) == expected[3]
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=20)


@pytest.mark.parametrize("arguments", [(), (*TWO_GROUPS, *TWO_RANKS)], ids=["one rank", "four ranks"])
def test_streams_survive_the_death_of_the_scheduler(tmp_path: Path, arguments: Sequence[str]) -> None:
    with ServeProcess(tmp_path, *arguments) as serve:
        address = serve.wait_ready()
        expected = Streams(address).wait()
        streams = Streams(address)
        wait_for(lambda: streams.num_tokens >= NUM_STREAMS * NUM_TOKENS // 4, timeout_s=TIMEOUT_S)
        os.kill(serve.process_of(SCHEDULER), signal.SIGKILL)
        assert streams.wait() == expected
        print(f"longest pause: {streams.longest_pause_s:.1f} s")
        with Client(address) as client:
            assert [group.detail for group in client.cluster.groups() if group.num_restarts] == []
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=20)
