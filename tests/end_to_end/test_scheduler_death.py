"""A scheduler that dies: the next one takes over the ranks that are there, which keep the model."""

import os
import signal
from pathlib import Path

import pytest
from serving import ServeProcess, wait_for

from quire.client import Client

pytestmark = pytest.mark.chaos

SCHEDULER = "quire.cluster.scheduler.process"
RANK = "quire.worker.rank_process"
PROMPT = "Once upon a time"


@pytest.mark.parametrize("arguments", [(), ("--groups", "2", "--tensor-parallel-size", "2")], ids=["one rank", "four ranks"])
def test_the_ranks_stay_and_serve_the_next_scheduler(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with ServeProcess(tmp_path, *arguments) as serve, Client(serve.wait_ready()) as client:
        expected = client.generate(PROMPT, max_tokens=20, temperature=0).token_ids
        ranks = {pid for pid, command in serve.processes().items() if f"-m {RANK} " in command}
        for deaths in (1, 2):
            os.kill(serve.process_of(SCHEDULER), signal.SIGKILL)

            def has_come_back(term: int = 1 + deaths) -> bool:
                return all((group.state, group.term) == ("READY", term) for group in client.cluster.groups())

            wait_for(has_come_back, timeout_s=30)
            wait_for(lambda: client.health() == "SERVING", timeout_s=30)
            assert client.generate(PROMPT, max_tokens=20, temperature=0).token_ids == expected
        assert {pid for pid, command in serve.processes().items() if f"-m {RANK} " in command} == ranks
        assert all(group.num_restarts == 0 for group in client.cluster.groups())
