"""The demo, on a server of the tests and on a scripted cluster of its own."""

import os
import signal
import sys
from pathlib import Path

import grpc
import pytest
from fake_inference_server import Failure, FakeServer, Reply, fake_group
from quire_command import quire

from quire.cli import main, own_cluster
from quire.cli.story_lines import LineWrapper

STORY = Reply(sequences=([" there", " was", " a", " story", " of", " some", " length", "."] * 6,), pause_s=0.005)


def test_eight_stories_stream_side_by_side_and_tables_follow(server: FakeServer) -> None:
    server.script = [STORY]
    server.groups = [fake_group("group-0", num_held=0), fake_group("group-1", num_held=0)]
    done = quire("demo", "--address", server.address, "--max-tokens", "48")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for number in range(1, 9):
        story = [line for line in lines if line.startswith(f"[{number}] ")]
        assert len(story) > 1
        assert all(len(line) <= 104 for line in story)
        assert story[-1].endswith("length.")
    assert sum(line.split()[:1] == [str(number)] for line in lines for number in range(1, 9)) == 8
    assert any(line.split()[:1] == ["all"] and "384" in line.split() for line in lines), done.stdout
    assert lines[-1] == "blocks: at most 0 of 256 held during the run; afterwards none: 246 free, 10 cached"
    requests = [request for request in server.requests if hasattr(request, "sampling")]
    assert sorted(request.sampling.seed for request in requests) == list(range(1, 9))
    assert len({request.text for request in requests}) == 8


def test_a_story_that_fails_fails_the_demo(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = [Failure(grpc.StatusCode.INTERNAL, "broken", reason="BROKEN"), STORY]
    server.groups = [fake_group("group-0", num_held=0)]
    assert main.main(["demo", "--address", server.address]) == 1
    assert "failed: BROKEN: broken" in capsys.readouterr().out


# What `quire serve` is to the demo: a process that writes the ready file, and ends in order after SIGTERM.
FAKE_SERVE = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {support!r})
from fake_inference_server import FakeServer, Reply, fake_group
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--listen"] == "127.0.0.1:0"
print("a line of the log", flush=True)
mode = os.environ["FAKE_SERVE"]
if mode == "fails":
    sys.exit(3)
stop = signal.SIGTERM
signal.pthread_sigmask(signal.SIG_BLOCK, [stop])
with FakeServer() as server:
    server.groups = [fake_group("group-0", num_held=1 if mode == "leaks" else 0)]
    ready = Path(arguments["--ready-file"])
    if mode != "hangs":
        ready.with_suffix(".tmp").write_text(json.dumps({{"address": server.address}}))
        ready.with_suffix(".tmp").replace(ready)
    signal.sigwait([stop])
sys.exit(7 if mode == "ends badly" else 0)
"""


@pytest.fixture
def fake_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`sys.executable` is a script that drops `-P -m quire.cli.main serve` and runs FAKE_SERVE."""
    script = tmp_path / "serve.py"
    script.write_text(FAKE_SERVE.format(support=str(Path(__file__).parents[1] / "support")))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho $$ > {tmp_path}/pid\nshift 4\nexec {sys.executable} -P {script} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return tmp_path / "pid"


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [
        ("works", 0, "the cluster has stopped"),
        ("leaks", 1, "1 still held after"),
        ("fails", 1, "exit code 3; the end of its log:\na line of the log"),
        ("hangs", 1, "was not ready after 0.5 s"),
        ("ends badly", 1, "ended with exit code 7 after SIGTERM"),
    ],
)
def test_the_demos_own_cluster(
    fake_serve: Path, mode: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SERVE", mode)
    monkeypatch.setattr("quire.cli.demo.FREE_TIMEOUT_S", 0.2)
    assert main.main(["demo", "--start-timeout", "0.5" if mode == "hangs" else "20"]) == code
    captured = capsys.readouterr()
    assert says in captured.out + captured.err
    with pytest.raises(ProcessLookupError):
        os.kill(int(fake_serve.read_text()), 0)


def test_an_error_inside_stops_the_cluster_too(fake_serve: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVE", "works")

    def interrupted() -> None:
        with own_cluster.own_cluster(start_timeout_s=20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ProcessLookupError):
        os.kill(int(fake_serve.read_text()), signal.SIGCONT)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_lines_are_wrapped_between_words_however_the_text_comes(step: int) -> None:
    text = "One two three four.\n\nFive " + "x" * 25 + " six"
    wrapper = LineWrapper(10)
    lines = [line for start in range(0, len(text), step) for line in wrapper.feed(text[start : start + step])] + wrapper.flush()
    assert lines == ["One two", "three", "four.", "", "Five", "x" * 10, "x" * 10, "xxxxx six"]
    assert wrapper.flush() == []
