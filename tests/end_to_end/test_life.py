"""How a cluster ends: in order, by a signal, or because a part of it died; nothing of it is left in any case."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from serving import ServeProcess, tagged_processes, wait_for
from tiny_models import DEMO_MODEL

from quire.client import Client
from quire.common.errors import NotFound, QuireError, Unavailable

GONE_TIMEOUT_S = 20.0
GATEWAY = "quire.cluster.gateway.main"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_in_order_and_then_every_process(tmp_path: Path, number: signal.Signals) -> None:
    with ServeProcess(tmp_path) as serve:
        address = serve.wait_ready()
        texts: list[str] = []
        started = threading.Event()

        def read() -> None:
            with Client(address) as client:
                for delta in client.stream("Once upon a time", max_tokens=300, ignore_eos=True, seed=1):
                    texts.append(delta.text)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(30)
        serve.process.send_signal(number)
        reader.join(60)
        assert serve.wait_end() == 0, serve.output
        serve.wait_gone(timeout_s=GONE_TIMEOUT_S)
        assert len("".join(texts)) > 600, "the stream was to finish first"
        assert not list(serve.temporary.glob("quire-*")), "its folder was to go with it"


def test_who_asks_twice_does_not_wait_for_streams(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve, Client(serve.wait_ready(), max_retries=0) as client:
        stream = client.stream("Once upon a time", max_tokens=2000, ignore_eos=True)
        next(iter(stream))
        serve.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.health() == "NOT_SERVING", timeout_s=20)
        serve.process.send_signal(signal.SIGTERM)
        with pytest.raises(QuireError):
            list(stream)
        assert serve.wait_end() == 0, serve.output
        serve.wait_gone(timeout_s=GONE_TIMEOUT_S)


@pytest.mark.chaos
def test_nothing_is_left_after_kill_9_of_quire_serve(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        serve.wait_ready()
        assert len(serve.processes()) > 3
        serve.process.kill()
        serve.process.wait()
        serve.wait_gone(timeout_s=GONE_TIMEOUT_S)
        wait_for(lambda: not list(serve.temporary.glob("quire-*")), timeout_s=GONE_TIMEOUT_S)


@pytest.mark.chaos
def test_the_death_of_the_only_gateway_ends_its_streams_and_the_next_one_has_its_address(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        address = serve.wait_ready()
        with Client(address, max_retries=0) as client:
            stream = client.stream("Once upon a time", max_tokens=2000, ignore_eos=True)
            next(iter(stream))
            os.kill(serve.process_of(GATEWAY), signal.SIGKILL)
            with pytest.raises(Unavailable) as caught:
                list(stream)
            assert "code -9" not in caught.value.message, "clients are not told of our insides"
            assert "/tmp" not in caught.value.message
        with Client(address) as client:
            wait_for(lambda: is_serving(client), timeout_s=30)
            assert len(client.generate("Once upon a time", max_tokens=4, ignore_eos=True).token_ids) == 4
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=20)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_end() == 0, serve.output
        assert "gateway 0 ended with code -9 and is started anew in 0 s" in serve.output
        serve.wait_gone(timeout_s=GONE_TIMEOUT_S)


def is_serving(client: Client) -> bool:
    try:
        return client.health() == "SERVING"
    except Unavailable:
        return False


def test_a_signal_before_it_is_ready_ends_it_in_order(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        wait_for(lambda: any("gcs_server" in command for command in serve.processes().values()), timeout_s=60)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_end() == 0, serve.output
        serve.wait_gone(timeout_s=GONE_TIMEOUT_S)
        assert "stopping" in serve.output


def test_a_drained_group_finishes_its_streams_and_the_edge_stays_and_says_so(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve, Client(serve.wait_ready(), max_retries=0) as client:
        assert client.health() == "SERVING"
        (group,) = client.cluster.groups()
        stream = client.stream("Once upon a time", max_tokens=200, ignore_eos=True, seed=1)
        first = next(iter(stream))
        assert client.cluster.drain(group.group_id).state == "DRAINING"
        with pytest.raises(Unavailable, match="no worker group"):
            client.generate("Once upon a time", max_tokens=1)
        deltas = [first, *stream]
        assert sum(len(delta.token_ids) for delta in deltas) == 200
        wait_for(lambda: client.cluster.groups()[0].state == "STOPPED", timeout_s=30)
        assert client.health() == "NOT_SERVING"
        assert serve.process.poll() is None
        with pytest.raises(NotFound, match="there is no group 'nobody'; there are: quire-tales-0"):
            client.cluster.drain("nobody")


def test_the_demo_runs_and_leaves_nothing(tmp_path: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: paths of sockets are
    environ = {**os.environ, "QUIRE_TEST_TAG": str(tmp_path), "TMPDIR": str(temporary)}
    command = [sys.executable, "-P", "-m", "quire.cli.main", "demo"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environ, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "afterwards none" in result.stdout
    assert len([line for line in result.stdout.splitlines() if re.match(r" +\d +\d+ +[\d.]+ +\d+ +96 ", line)]) == 8
    wait_for(lambda: not tagged_processes("QUIRE_TEST_TAG", str(tmp_path), folder=temporary), timeout_s=GONE_TIMEOUT_S)
    assert not list(temporary.glob("quire-*"))
    shutil.rmtree(temporary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel-size", "3"], "8 query heads cannot be split over 3 ranks; use 1, 2, 4 or 8"),
        (["--preemption", "swap", "--swap-memory", "0"], "preemption = swap needs memory to swap to, and swap_memory is 0"),
        (["/nowhere"], "/nowhere is not a folder"),
        (["broken"], "the tokenizer files of model broken cannot be used"),
        (["--listen", "0.0.0.0:0"], "reachable from other hosts"),
        (["--config", "missing.yaml"], "the config file missing.yaml cannot be read"),
    ],
)
def test_a_bad_setting_is_one_line_before_anything_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO_MODEL, broken)
    (broken / "tokenizer.json").write_text("{}")
    command = [sys.executable, "-P", "-m", "quire.cli.main", "serve", *arguments]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environ, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("quire: ")
    assert message in line
    assert not list(tmp_path.glob("quire-*"))
