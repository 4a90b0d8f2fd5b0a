"""Fifty deaths and restarts: what stays alive through them does not grow, and nothing of the dead is left."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from serving import ServeProcess, wait_for
from streams import Streams

from quire.client import Client, Group

pytestmark = pytest.mark.chaos

NUM_CYCLES: Final = 50
# The first ones fill thread pools, caches and the allocator.
NUM_WARM_UP: Final = 10
NUM_STREAMS: Final = 4
NUM_TOKENS: Final = 40
TIMEOUT_S: Final = 60.0
# What a process may have more after all cycles. Memory: Ray's client remembers some hundred bytes of each actor.
MAX_MORE_FDS: Final = 4
MAX_MORE_THREADS: Final = 2
MAX_MORE_MEMORY: Final = 0.10


@dataclass(frozen=True, slots=True)
class Footprint:
    num_fds: int
    num_threads: int
    memory_kib: int


def footprint(pid: int) -> Footprint:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Footprint(len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), int(status["VmRSS"].split()[0]))


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.mark.timeout(900)  # a start of a rank takes 4 s of a core, and fifty of them thrice that where others work too
def test_fifty_deaths_leave_nothing_behind(tmp_path: Path) -> None:
    """In each cycle the rank of one group is killed, and the other group is asked to restart, which forgives what it died of before.
    They take turns, and the next cycle comes as soon as both are ready."""
    before = shared_memory()
    with ServeProcess(tmp_path, "--groups", "2") as serve, Client(serve.wait_ready()) as client:
        address = serve.wait_ready()
        expected = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait()

        def groups() -> list[Group]:
            return sorted(client.cluster.groups(), key=lambda group: group.group_id)

        def survivors() -> dict[str, Footprint]:
            pids = {
                "controller": serve.process_with("ray::_Controller"),
                "scheduler": serve.process_of("quire.cluster.scheduler.process"),
                "gateway": serve.process_of("quire.cluster.gateway.main"),
                "quire serve": serve.process.pid,
            }
            return {name: footprint(pid) for name, pid in pids.items()}

        early, early_shared, early_count = survivors(), shared_memory(), len(serve.processes())
        for cycle in range(1, NUM_CYCLES + 1):
            streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            killed, restarted = groups() if cycle % 2 else reversed(groups())
            os.kill(killed.ranks[0].pid, signal.SIGKILL)
            client.cluster.restart(group_id=restarted.group_id)
            assert streams.wait() == expected
            wait_for(lambda cycle=cycle: _have_restarted(groups(), 2 * cycle), timeout_s=TIMEOUT_S)  # type: ignore[misc]  # mypy cannot infer a default
            if cycle == NUM_WARM_UP:
                early, early_shared, early_count = survivors(), shared_memory(), len(serve.processes())
        late = survivors()
        for name in early:
            print(f"{name}: {early[name]} after {NUM_WARM_UP} deaths, {late[name]} after {NUM_CYCLES}")
        for name in early:
            assert late[name].num_fds <= early[name].num_fds + MAX_MORE_FDS, name
            assert late[name].num_threads <= early[name].num_threads + MAX_MORE_THREADS, name
            assert late[name].memory_kib <= early[name].memory_kib * (1 + MAX_MORE_MEMORY), name
        assert shared_memory() - before == early_shared - before
        wait_for(lambda: len(serve.processes()) <= early_count, timeout_s=TIMEOUT_S)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_end() == 0, serve.output
        serve.wait_gone(timeout_s=TIMEOUT_S)
    assert shared_memory() <= before, "left in /dev/shm"


def _have_restarted(groups: list[Group], num_restarts: int) -> bool:
    return sum(group.num_restarts for group in groups) == num_restarts and all(group.state == "READY" for group in groups)
