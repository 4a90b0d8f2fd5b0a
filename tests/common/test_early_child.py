"""Children that start before their owners."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import wait_for

from quire.cluster.controller.process_actor import is_stopped
from quire.common.child_process import stop_child
from quire.common.early_child import AdoptedChild, adopt_child, early_path, start_early

SUPPORT = str(Path(__file__).resolve().parents[1] / "support")
TIMEOUT_S = 20.0
SPEC = {"name": "early", "kind": "sleeper", "until": "/nowhere", "code": 0}

# An owner of its own: adopts what waits in a folder, writes the child's pid, and sleeps.
OWNER = """
import json, pathlib, sys, time
from quire.common.early_child import adopt_child
folder = pathlib.Path(sys.argv[1])
child = adopt_child(folder, "*", json.loads(sys.argv[2]), log_path=folder / "owned.log")
(folder / "pid").write_text(str(child.pid))
time.sleep(60)
"""
# A starter of its own: starts an early child, and sleeps.
STARTER = """
import json, pathlib, sys, time
from quire.common.early_child import early_path, start_early
folder = pathlib.Path(sys.argv[1])
path = early_path(folder, "a-0")
start_early("early_sleeper", json.loads(sys.argv[2]), path=path, log_path=folder / "early.log", environ={})
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def support_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([SUPPORT, *(path for path in sys.path if path)]))


@pytest.fixture
def early(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """One that waits, named a-0."""
    path = early_path(tmp_path, "a-0")
    child = start_early("early_sleeper", SPEC, path=path, log_path=tmp_path / "early.log", environ={})
    wait_for(path.exists, timeout_s=TIMEOUT_S)
    yield child
    stop_child(child)


def adopt(folder: Path, names: str = "a-*", **changes: Any) -> AdoptedChild | None:
    return adopt_child(folder, names, {**SPEC, "name": "owned", **changes}, log_path=folder / "owned.log")


def stop(child: "subprocess.Popen[bytes]") -> None:
    """Hold it, and wait until it stands still."""
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: is_stopped(child.pid), timeout_s=TIMEOUT_S)


def test_an_owner_gets_it_with_all_that_it_wrote_and_its_exit_code(early: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    assert adopt(tmp_path, "b-*") is None
    wait_for(lambda: "began" in (tmp_path / "early.log").read_text(), timeout_s=TIMEOUT_S)
    child = adopt(tmp_path, until=str(tmp_path / "end"), code=7)
    assert child is not None
    assert child.pid == early.pid
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    assert adopt(tmp_path) is None, "it has an owner"
    (tmp_path / "end").touch()
    assert child.wait(TIMEOUT_S) == 7 == child.poll()
    assert (tmp_path / "owned.log").read_text() == "began as early\nis owned\n"
    child.kill()  # too late, and no other process's end


@pytest.mark.parametrize(("end", "code"), [("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)])
def test_its_owner_ends_it_by_signals(early: "subprocess.Popen[bytes]", tmp_path: Path, end: str, code: int) -> None:
    child = adopt(tmp_path)
    assert child is not None
    getattr(child, end)()
    assert child.wait(TIMEOUT_S) == code
    assert stop_child(child) == code


def test_one_that_cannot_go_on_so_says_why_and_ends(
    early: "subprocess.Popen[bytes]", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert adopt(tmp_path, kind="walker") is None
    assert "early child a-0 cannot be taken: it is a sleeper" in caplog.text
    assert early.wait(TIMEOUT_S) == 1, "what it held is free by now"
    assert "it is a sleeper" in (tmp_path / "early.log").read_text()


def test_one_that_was_not_taken_at_last_ends(early: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    """Its owner has started another one instead, of the same name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(early_path(tmp_path, "a-0")))
        order = {"owner_pid": os.getpid(), "spec": SPEC, "log_path": str(tmp_path / "owned.log")}
        connection.sendall(json.dumps(order).encode() + b"\n")
        assert json.loads(connection.recv(1000)) == {"objection": ""}
    assert early.wait(TIMEOUT_S) == 1
    assert "its owner gave up" in (tmp_path / "early.log").read_text()
    assert not (tmp_path / "owned.log").exists()


def test_owners_that_ask_at_once_get_one_each(early: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    """All of them connect to the same one first; whoever is late goes on to the next."""
    path = early_path(tmp_path, "a-1")
    other = start_early("early_sleeper", SPEC, path=path, log_path=tmp_path / "early-1.log", environ={})
    wait_for(path.exists, timeout_s=TIMEOUT_S)
    stop(early)
    with ThreadPoolExecutor(3) as owners:
        asked = [owners.submit(adopt, tmp_path) for _ in range(3)]
        early.send_signal(signal.SIGCONT)
        children = [future.result() for future in asked]
    assert sorted(child.pid for child in children if child is not None) == sorted([early.pid, other.pid])
    assert early.poll() is None
    assert other.poll() is None
    assert stop_child(other) == -signal.SIGTERM


def test_one_that_does_not_answer_is_ended(early: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.common.early_child.ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr("quire.common.early_child.END_TIMEOUT_S", 0.2)
    stop(early)
    assert adopt(tmp_path) is None
    assert early.wait(TIMEOUT_S) == -signal.SIGKILL


def test_it_ends_with_its_owner(early: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path), json.dumps(SPEC)])
    wait_for((tmp_path / "pid").exists, timeout_s=TIMEOUT_S)
    assert early.poll() is None
    owner.kill()
    owner.wait()
    assert early.wait(TIMEOUT_S) == -signal.SIGKILL


def test_it_ends_with_its_starter_whoever_owns_it(tmp_path: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path), json.dumps(SPEC)])
    wait_for(early_path(tmp_path, "a-0").exists, timeout_s=TIMEOUT_S)
    child = adopt(tmp_path)
    assert child is not None
    starter.kill()
    starter.wait()
    assert child.wait(TIMEOUT_S) == 1, "whoever could tell its code is gone"
