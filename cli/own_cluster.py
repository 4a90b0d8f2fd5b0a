"""A cluster that a command starts for itself and stops again."""

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from quire.common.child_process import stop_child
from quire.common.errors import QuireError, Unavailable

# `quire serve` gives running streams 30 s to finish; ours have finished, its processes then need a few.
STOP_TIMEOUT_S: Final = 45.0
_POLL_S: Final = 0.1
_LOG_LINES_SHOWN: Final = 20
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@contextlib.contextmanager
def own_cluster(*, start_timeout_s: float) -> Iterator[str]:
    """Run `quire serve` on a free port; gives its address. On leaving it is stopped by SIGTERM and must exit with 0.

    Raises:
        Unavailable: it did not get ready; the end of its log is in the message.
        QuireError: it did not stop in order.
    """
    with tempfile.TemporaryDirectory(prefix="quire-own-", ignore_cleanup_errors=True) as folder:
        ready_file, log_file = Path(folder, "ready.json"), Path(folder, "serve.log")
        child = _start(ready_file, log_file)
        try:
            address = _wait_until_ready(child, ready_file, log_file, timeout_s=start_timeout_s)
            yield address
        except BaseException:
            stop_child(child, timeout_s=STOP_TIMEOUT_S)
            raise
        code = stop_child(child, timeout_s=STOP_TIMEOUT_S)
        if code != 0:
            raise QuireError(f"the cluster ended with exit code {code} after SIGTERM; the end of its log:\n{_tail(log_file)}")


def _start(ready_file: Path, log_file: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "quire.cli.main", "serve", "--listen", "127.0.0.1:0", "--ready-file", str(ready_file)]
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    with log_file.open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us; we then stop it in order
            preexec_fn=die_with_parent,  # kill -9 of us too; no other thread runs yet
        )


def _wait_until_ready(child: "subprocess.Popen[bytes]", ready_file: Path, log_file: Path, *, timeout_s: float) -> str:
    start_s = time.monotonic()
    ticks = sys.stderr.isatty()
    print("starting a cluster ...", end="" if ticks else "\n", file=sys.stderr, flush=True)
    try:
        while not ready_file.exists():
            elapsed_s = time.monotonic() - start_s
            if ticks:
                print(f"\rstarting a cluster ... {elapsed_s:.0f} s", end="", file=sys.stderr, flush=True)
            if child.poll() is not None:
                raise Unavailable(f"the cluster did not start: exit code {child.returncode}; the end of its log:\n{_tail(log_file)}")
            if elapsed_s > timeout_s:
                raise Unavailable(f"the cluster was not ready after {timeout_s:g} s; the end of its log:\n{_tail(log_file)}")
            time.sleep(_POLL_S)
    finally:
        if ticks:
            print(file=sys.stderr)
    address = json.loads(ready_file.read_text(encoding="utf-8"))["address"]
    print(f"ready at {address} after {time.monotonic() - start_s:.1f} s", file=sys.stderr)
    return str(address)


def _tail(log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES_SHOWN:]) or "(empty)"
