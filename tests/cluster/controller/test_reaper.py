"""What the reaper finds and ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving import wait_for

from quire.cluster.controller.reaper import MARK, let_go, marked_processes, start_reaper

# A parent that starts a reaper and a daemon, as a cluster does, tells the daemon's pid, and then does as it is told.
PARENT = """
import pathlib, subprocess, sys
from quire.cluster.controller.reaper import let_go, start_reaper
folder = pathlib.Path(sys.argv[1])
reaper = start_reaper(folder)
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print(daemon.pid, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_parent_leaves_is_ended_and_its_folder_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", PARENT, str(folder)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    daemon = int(parent.stdout.readline())
    assert daemon in marked_processes(str(folder))
    parent.kill()
    parent.wait()
    wait_for(lambda: not marked_processes(str(folder)), timeout_s=20)
    wait_for(lambda: not folder.exists(), timeout_s=20)


def test_a_parent_that_ends_in_order_keeps_its_folder_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "")  # restored afterwards: the tests' own children must not be marked
    let_go(start_reaper(tmp_path))
    assert tmp_path.exists()
