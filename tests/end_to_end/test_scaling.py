"""More groups, fewer groups, and restarts one after the other, under load: no stream notices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ServeProcess, wait_for
from streams import Streams

from quire.client import Client, ConfigError, NotFound

pytestmark = pytest.mark.slow

NUM_STREAMS = 16
NUM_TOKENS = 200
MODEL = "quire-tales"
COMMAND_TIMEOUT_S = 60


def quire(address: str, *arguments: str) -> str:
    """The output of a command that must succeed."""
    command = [sys.executable, "-P", "-m", "quire.cli.main", *arguments, "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_streams_outlive_scaling_and_a_rolling_restart(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, "--groups", "2") as serve:
        address = serve.wait_ready()
        expected = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait()
        rounds = 0

        def with_load(*arguments: str) -> str:
            """Run a command in the midst of streams, which all end as they should."""
            nonlocal rounds
            rounds += 1
            streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            wait_for(lambda: streams.num_tokens >= streams.num_wanted // 20, timeout_s=COMMAND_TIMEOUT_S)
            output = quire(address, *arguments)
            assert streams.wait() == expected
            print(f"{' '.join(arguments)}: longest pause {streams.longest_pause_s:.1f} s")
            return output

        with Client(address) as client:
            former = {group.group_id: group.ranks[0].pid for group in client.cluster.groups()}
            assert set(former) == {f"{MODEL}-0", f"{MODEL}-1"}
            output = with_load("scale", f"{MODEL}=3", "--wait", "60")
            assert f"{MODEL}-2: READY" in output
            with_load("scale", f"{MODEL}=1", "--wait", "60")
            (group,) = client.cluster.groups()
            assert (group.group_id, group.ranks[0].pid) == (f"{MODEL}-0", former[f"{MODEL}-0"]), "the oldest stays as it is"
            with_load("restart", f"{MODEL}-0", "--wait", "60")
            assert client.cluster.groups()[0].ranks[0].pid != former[f"{MODEL}-0"]
            quire(address, "scale", f"{MODEL}=2", "--wait", "60")
            with_load("restart", MODEL, "--wait", "60")
            groups = client.cluster.groups()
            assert [(group.group_id, group.state, group.num_restarts) for group in groups] == [
                (f"{MODEL}-0", "READY", 2),
                (f"{MODEL}-3", "READY", 1),
            ], "numbers are not given twice"
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=20)


def test_what_cannot_be_placed_is_refused_with_the_arithmetic_and_none_is_a_number_too(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, "--tensor-parallel-size", "2") as serve, Client(serve.wait_ready(), max_retries=0) as client:
        num_places = 4 * (os.cpu_count() or 1)  # MAX_RANKS_PER_CPU
        with pytest.raises(ConfigError, match=f"ask for at most {num_places // 2}, or add hosts") as caught:
            client.cluster.scale(MODEL, num_places)
        assert caught.value.reason == "NO_PLACE"
        with pytest.raises(NotFound, match="there is no model 'other'; there are: quire-tales"):
            client.cluster.scale("other", 1)
        with pytest.raises(NotFound, match="there is no model 'other'"):
            client.cluster.restart(model="other")
        for num_groups in (2, 1, 3, 2, 0):  # faster than anything can start
            client.cluster.scale(MODEL, num_groups)
        wait_for(lambda: client.cluster.groups() == (), timeout_s=30)
        assert client.health() == "NOT_SERVING"
        with pytest.raises(ConfigError, match="model quire-tales has no groups, so there is nothing to restart"):
            client.cluster.restart(model=MODEL)
        client.cluster.scale(MODEL, 1)
        wait_for(lambda: client.health() == "SERVING", timeout_s=60)
        assert len(client.generate("Once upon a time", max_tokens=5, ignore_eos=True).token_ids) == 5
        assert serve.process.poll() is None
