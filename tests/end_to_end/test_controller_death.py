"""A controller that dies: Ray starts it anew, and it goes on with what runs. Streams do not even pause."""

import os
import signal
from pathlib import Path
from typing import Final

import pytest
from serving import ServeProcess, wait_for
from streams import Streams, undisturbed

from quire.client import Client, Group, Unavailable

pytestmark = pytest.mark.chaos

NUM_STREAMS: Final = 64
NUM_TOKENS: Final = 60
TIMEOUT_S: Final = 60.0
MODEL: Final = "quire-tales"
CONTROLLER: Final = "ray::_Controller"
SCHEDULER: Final = "quire.cluster.scheduler.process"
RANK: Final = "quire.worker.rank_process"


def parent_of(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid:")]
    return int(line.split()[1])


def is_actor(pid: int) -> bool:
    """Ranks that began before Ray are children of `quire serve`; those of later terms are their actors'."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")


class Cluster:
    """A running cluster, with what the tests here do to it."""

    def __init__(self, serve: ServeProcess, client: Client, address: str) -> None:
        self.serve = serve
        self.client = client
        self.address = address
        self.expected = undisturbed(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)

    def streams(self) -> Streams:
        return Streams(self.address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)

    def streams_under_way(self) -> Streams:
        streams = self.streams()
        wait_for(lambda: streams.num_tokens >= streams.num_wanted // 10, timeout_s=TIMEOUT_S)
        return streams

    def controller(self) -> int:
        return self.serve.process_with(CONTROLLER)

    def kill_controller(self) -> None:
        os.kill(self.controller(), signal.SIGKILL)

    def kill(self, module: str) -> None:
        os.kill(min(pid for pid, command in self.serve.processes().items() if f"-m {module} " in command), signal.SIGKILL)

    def pids(self) -> set[int]:
        """The scheduler and the ranks."""
        return {pid for pid, command in self.serve.processes().items() if f"-m {SCHEDULER} " in command or f"-m {RANK} " in command}

    def groups(self) -> list[Group]:
        """As a controller tells, once one is there."""
        found: list[tuple[Group, ...]] = []

        def is_there() -> bool:
            try:
                found.append(self.client.cluster.groups())
            except Unavailable:
                return False
            return True

        wait_for(is_there, timeout_s=TIMEOUT_S)
        return list(found[-1])

    def wait_ready(self, num_groups: int) -> None:
        wait_for(lambda: [group.state for group in self.groups()] == ["READY"] * num_groups, timeout_s=TIMEOUT_S)


def test_whatever_runs_outlives_the_controller(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, "--groups", "2") as serve, Client(serve.wait_ready()) as client:
        cluster = Cluster(serve, client, serve.wait_ready())
        pids, groups, controller = cluster.pids(), cluster.groups(), cluster.controller()

        streams = cluster.streams_under_way()
        cluster.kill_controller()
        assert streams.wait() == cluster.expected
        print(f"killed under load: longest pause {streams.longest_pause_s:.1f} s")
        after = cluster.groups()
        assert [(group.group_id, group.state, group.term, group.ranks) for group in after] == [
            (group.group_id, group.state, group.term, group.ranks) for group in groups
        ]
        assert cluster.pids() == pids
        assert cluster.controller() != controller

        # What happens while there is no controller is found out by the next one.
        streams = cluster.streams_under_way()
        cluster.kill_controller()
        cluster.kill(RANK)
        assert streams.wait() == cluster.expected
        cluster.wait_ready(2)
        assert sum(group.num_restarts for group in cluster.groups()) == 1
        print(f"killed with a rank: longest pause {streams.longest_pause_s:.1f} s")

        # As above, but Ray's actor that would know of it dies too.
        rank = next(rank for rank in cluster.pids() if is_actor(parent_of(rank)) and f"-m {RANK} " in serve.processes()[rank])
        streams = cluster.streams_under_way()
        cluster.kill_controller()
        os.kill(parent_of(rank), signal.SIGKILL)
        assert streams.wait() == cluster.expected
        cluster.wait_ready(2)
        assert sum(group.num_restarts for group in cluster.groups()) == 2

        streams = cluster.streams_under_way()
        cluster.kill_controller()
        cluster.kill(SCHEDULER)
        assert streams.wait() == cluster.expected
        cluster.wait_ready(2)
        assert sum(group.num_restarts for group in cluster.groups()) == 2, "ranks outlive both"
        print(f"killed with the scheduler: longest pause {streams.longest_pause_s:.1f} s")

        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_end() == 0, serve.output
        serve.wait_gone(timeout_s=TIMEOUT_S)


def test_what_was_asked_of_a_controller_is_done_by_the_next(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, "--groups", "2") as serve, Client(serve.wait_ready()) as client:
        cluster = Cluster(serve, client, serve.wait_ready())
        client.cluster.scale(MODEL, 3)
        cluster.kill_controller()
        cluster.wait_ready(3)

        streams = cluster.streams_under_way()
        client.cluster.restart(model=MODEL)
        cluster.kill_controller()
        assert streams.wait() == cluster.expected
        wait_for(lambda: [group.num_restarts for group in cluster.groups()] == [1, 1, 1], timeout_s=TIMEOUT_S)
        cluster.wait_ready(3)

        streams = cluster.streams_under_way()
        client.cluster.scale(MODEL, 1)
        cluster.kill_controller()
        assert streams.wait() == cluster.expected
        cluster.wait_ready(1)
        assert [group.group_id for group in cluster.groups()] == [f"{MODEL}-0"]
        wait_for(lambda: len(cluster.pids()) == 2, timeout_s=TIMEOUT_S)
