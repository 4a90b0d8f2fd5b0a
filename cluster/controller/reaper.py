"""The last one out: a process that outlives `quire serve` by seconds, and ends and removes what kill -9 of it leaves.

Our own children die with their parents (common/child_process.py), and most of Ray's daemons notice too; its two agents were
seen to stay (Ray 2.60). Everything that a local cluster starts inherits a mark in its environment, and Ray's processes the
run's folder as their working folder; by either they are found here. The mark alone is not enough: Ray's agents write their
titles over it. Where there is no /proc, nothing is found.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from quire.common.child_process import public_environment

MARK: Final = "QUIRE_RUN_FOLDER"
# What the parent says before it ends; silence means that it was killed.
ENDED_IN_ORDER: Final = b"ended in order"
# How long everybody gets to end by themselves after their parent did.
GRACE_S: Final = 5.0
# How long killing may take; what the kernel does not let go of after that, nobody can end.
KILL_TIMEOUT_S: Final = 10.0
# How often is looked.
POLL_S: Final = 0.2


def start_reaper(folder: Path) -> "subprocess.Popen[bytes]":
    """Mark this process and all that it starts from here on, and have the marked ones ended once this process is gone.

    The reaper waits for the end of its standard input, whose other end only this process holds.
    """
    os.environ[MARK] = str(folder)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "quire.cluster.controller.reaper", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={name: value for name, value in public_environment().items() if name != MARK},
        start_new_session=True,
    )


def marked_processes(folder: str, *, but: int = 0) -> list[int]:
    """The processes of this run that we may look at, zombies and the process `but` left out."""
    entry = f"{MARK}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_marked = entry in (process / "environ").read_bytes().split(b"\0")
            if (is_marked or os.readlink(process / "cwd").startswith(f"{folder}/")) and int(process.name) != but:
                found.append(int(process.name))
    return found


def main(folder: str) -> None:
    parent_pid = os.getppid()  # it may be in the folder too, and waits for us where it ends in order
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who ends everything of ours must not end this first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent_said = sys.stdin.buffer.read()
    deadline_s = time.monotonic() + GRACE_S
    while marked_processes(folder, but=parent_pid) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while (left := marked_processes(folder, but=parent_pid)) and time.monotonic() < deadline_s:  # again: some start others meanwhile
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    if parent_said != ENDED_IN_ORDER:
        shutil.rmtree(folder, ignore_errors=True)  # killed: nobody was told of the logs in it


def let_go(reaper: "subprocess.Popen[bytes]") -> None:
    """End in order: the reaper looks once more and goes, and the folder is the caller's business."""
    assert reaper.stdin is not None
    with contextlib.suppress(BrokenPipeError), reaper.stdin as pipe:
        pipe.write(ENDED_IN_ORDER)
    reaper.wait()


if __name__ == "__main__":
    main(sys.argv[1])
