"""Children die with their parents, also after kill -9."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.common.child_process import SECRET_VARIABLES, start_child, stop_child

TIMEOUT_S = 10.0
POLL_S = 0.01
SUPPORT = str(Path(__file__).resolve().parents[1] / "support")

# A parent that starts a sleeping child through start_child, writes the child's pid, and sleeps.
PARENT = """
import pathlib, sys, time
from quire.common.child_process import start_child
child = start_child("sleeping_child", {"seconds": 60})
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""


def test_a_child_is_gone_after_its_parent_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(pid_file)], env={**os.environ, "PYTHONPATH": SUPPORT})
    child_pid = _wait_for_pid(pid_file)
    assert _is_alive(child_pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait_until(lambda: not _is_alive(child_pid), "the child to end with its parent")


def test_a_child_is_stopped_by_sigterm_and_its_output_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", SUPPORT)
    child = start_child("sleeping_child", {"seconds": 60}, log_path=tmp_path / "log")
    _wait_until(lambda: "sleeping for 60" in (tmp_path / "log").read_text() or child.poll() is not None, "the child to say something")
    assert child.poll() is None
    assert stop_child(child) == -signal.SIGTERM
    assert stop_child(child) == -signal.SIGTERM  # again: it has ended, nothing happens


def test_a_child_gets_a_secret_variable_only_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", SUPPORT)
    for name in SECRET_VARIABLES:
        monkeypatch.setenv(name, "planted")
    for told, expected in (({}, set()), ({"QUIRE_API_KEY": "mine"}, {"QUIRE_API_KEY=mine"})):
        child = start_child("sleeping_child", {"seconds": 60}, environ=told)
        try:
            environment = _environment_of(child.pid)
            assert f"PYTHONPATH={SUPPORT}" in environment
            assert {text for text in environment if text.startswith(SECRET_VARIABLES)} == expected
        finally:
            stop_child(child)


def _environment_of(pid: int) -> list[str]:
    file = Path(f"/proc/{pid}/environ")  # empty for a moment, while the kernel puts the new program in place
    _wait_until(lambda: file.read_bytes() != b"", "the child's environment")
    return file.read_bytes().decode().split("\0")


def _wait_for_pid(pid_file: Path) -> int:
    _wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", "the parent to write the child's pid")
    return int(pid_file.read_text())


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look every few milliseconds: for what another process does in its own time."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(POLL_S)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
