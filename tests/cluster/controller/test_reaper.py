"""What the reaper finds and ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving import wait_for

from quire.cluster.controller.reaper import MARK, let_go, marked_processes, start_reaper

# A parent that starts a reaper and a daemon, as a cluster does, tells the daemon's pid, and then does as it is told.
PARENT = """
import os, pathlib, subprocess, sys
from quire.cluster.controller.reaper import let_go, start_reaper
folder = pathlib.Path(sys.argv[1])
reaper = start_reaper(folder)
command = [sys.executable, "-c", "import time; time.sleep(100)"]
daemon = subprocess.Popen(command, start_new_session=True)
unmarked = {name: value for name, value in os.environ.items() if name != "QUIRE_RUN_FOLDER"}
titled = subprocess.Popen(command, start_new_session=True, env=unmarked, cwd=folder / "empty")
os.chdir(folder / "empty")
print(daemon.pid, titled.pid, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_parent_leaves_is_ended_and_its_folder_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "empty").mkdir(parents=True)
    command = [sys.executable, "-c", PARENT, str(folder)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    started = [int(pid) for pid in parent.stdout.readline().split()]
    assert set(started) == set(marked_processes(str(folder), but=parent.pid))
    parent.kill()
    parent.wait()
    wait_for(lambda: not marked_processes(str(folder)), timeout_s=20)
    wait_for(lambda: not folder.exists(), timeout_s=20)


def test_a_parent_that_ends_in_order_keeps_its_folder_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "")  # restored afterwards: the tests' own children must not be marked
    let_go(start_reaper(tmp_path))
    assert tmp_path.exists()
