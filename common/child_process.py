"""Child processes that never outlive their parent: the scheduler, ranks and gateways.

The parent calls `start_child`; the child's main calls `enter_child` first and gets its specification.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
# How often a child looks for its parent where the kernel cannot tell it (anything but Linux).
PARENT_POLL_S: Final = 1.0
# Variables that a child gets only when it is told to. What is theirs to know comes in the specification, which shows nowhere.
SECRET_VARIABLES: Final = (
    "QUIRE_API_KEY",  # of clients
    "HF_TOKEN",  # for fetching models, which is done before children start
    "HUGGING_FACE_HUB_TOKEN",
    "RAY_AUTH_TOKEN",  # who has it can start anything at Ray
)
# How long a child may take between SIGTERM and SIGKILL.
STOP_TIMEOUT_S: Final = 10.0


def start_child(
    module: str, spec: Mapping[str, Any], *, log_path: Path | None = None, environ: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run `python -m module` with `spec` as its specification. Its output is appended to `log_path`, else goes where ours goes.

    environ: variables that it has beside ours, or instead of ours; ours that are secret it has not

    The specification travels through the child's standard input, so nothing of it shows in process lists. The child starts
    in / and with Python's safe path (-P): a folder of the caller's named `kernels` or `proto` must not be importable there.

    Call this from a thread that lives as long as the process, the main one: Linux takes the end of the thread that started
    a child for the end of its parent.
    """
    output = None if log_path is None else log_path.open("ab")
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        cwd="/",
        env={**public_environment(), **(environ or {})},
        start_new_session=True,  # a Ctrl-C at the terminal reaches `quire serve` alone, which then stops the others in order
    )
    if output is not None:
        output.close()
    assert child.stdin is not None
    with child.stdin as pipe, contextlib.suppress(BrokenPipeError):  # it died at once: the caller sees its exit code
        pipe.write(json.dumps({"parent_pid": os.getpid(), "spec": dict(spec)}).encode())
    return child


def public_environment() -> dict[str, str]:
    """Our environment without what is secret."""
    return {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}


def enter_child() -> dict[str, Any]:
    """First thing in a child's main: tie its life to its parent's, and return the specification from standard input.

    On Linux the kernel kills the child when its parent dies, even by kill -9 (PR_SET_PDEATHSIG); a parent that died before
    that was set is noticed here. Elsewhere a thread looks once a second.
    """
    message = json.loads(sys.stdin.buffer.read())
    die_with_parent(int(message["parent_pid"]))
    spec = message["spec"]
    assert isinstance(spec, dict)
    return spec


def die_with_parent(parent_pid: int) -> None:
    """Tie this process's life to its parent's, as `enter_child` does."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    if sys.platform != "linux":
        threading.Thread(target=_exit_without_parent, args=(parent_pid,), daemon=True).start()


class Child(Protocol):
    """What is used of subprocess.Popen, by which other processes can be children too."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


def stop_child(child: Child, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
    """End a child by SIGTERM, after `timeout_s` by SIGKILL; its exit code. A child that has ended already is left alone."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def _exit_without_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    os._exit(1)
