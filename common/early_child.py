"""Children that start before whoever will own them: a rank loads its model while Ray starts.

`EarlyChild` is the child's end: it listens at a socket, and the first who asks for it and takes it owns it from then on.
`adopt_child` is the owner's. Two things end such a child: the end of the process that started it, as with every child, and the
end of its owner.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from quire.common.child_process import start_child
from quire.common.files import write_json_atomically

_log = logging.getLogger(__name__)

# How long an early child may take to answer whoever asks for it. It answers from a thread of its own, for which loading leaves
# time seldom: libraries are loaded without letting other threads run.
ANSWER_TIMEOUT_S: Final = 30.0
# How long a child that cannot be taken may take to end, before it is killed.
END_TIMEOUT_S: Final = 5.0
# How long its starter may take to tell its exit code.
CODE_TIMEOUT_S: Final = 2.0
# Longest message: a specification and a path.
MAX_LINE_BYTES: Final = 2**20
_POLL_S: Final = 0.02
_SUFFIX: Final = ".early"


def start_early(
    module: str, spec: Mapping[str, Any], *, path: Path, log_path: Path, environ: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start `python -m module` with `spec`, whose early_path is then `path`.

    Its exit code is told to its owner by a thread of this process, whose child it is.
    """
    child = start_child(module, {**spec, "early_path": str(path)}, log_path=log_path, environ=environ)
    threading.Thread(target=_tell_code, args=(child, path), daemon=True, name=f"end of {path.stem}").start()
    return child


def early_path(folder: Path, name: str) -> Path:
    """Where an early child of this name listens."""
    return folder / f"{name}{_SUFFIX}"


def _tell_code(child: "subprocess.Popen[bytes]", path: Path) -> None:
    code = child.wait()
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder went with the run, and nobody waits
        write_json_atomically(_code_path(path.parent, child.pid), {"code": code})


def _code_path(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.code"


class EarlyChild:
    """The end of the child."""

    def __init__(self, path: Path, *, objection: Callable[[dict[str, Any]], str]) -> None:
        """Listen at `path`.

        objection: why a specification is not one that this child can go on with, "" if it is; asked by another thread
        """
        self._path = path
        self._objection = objection
        self._spec: dict[str, Any] = {}
        self._is_owned = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unborn = path.with_suffix(".unborn")
        self._socket.bind(str(unborn))
        self._socket.listen()
        unborn.rename(path)  # whoever sees it can connect
        self._connections = [self._socket]
        os.register_at_fork(after_in_child=self._let_go)  # of processes that compile: else nobody would see when we close
        threading.Thread(target=self._listen, daemon=True, name="early child").start()

    def wait(self) -> dict[str, Any]:
        """The owner's specification, once there is an owner. Signals interrupt this; whoever started it ends it if none comes."""
        self._is_owned.wait()
        return self._spec

    def _let_go(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # closed before
                os.close(connection.fileno())

    def _listen(self) -> None:
        connection, _ = self._socket.accept()
        self._connections.append(connection)
        self._path.unlink(missing_ok=True)  # nobody else is to ask
        with contextlib.suppress(BlockingIOError):  # those who have asked already go on to another
            self._socket.setblocking(False)
            while True:
                self._socket.accept()[0].close()
        self._socket.close()
        try:
            with connection, connection.makefile("rwb") as stream:
                connection.settimeout(ANSWER_TIMEOUT_S)
                order = json.loads(stream.readline(MAX_LINE_BYTES))
                owner = _pidfd(order["owner_pid"])
                why = self._objection(order["spec"])
                stream.write(json.dumps({"objection": why}).encode() + b"\n")
                stream.flush()
                # An owner that gave up meanwhile has started another child instead.
                if why or not stream.readline(MAX_LINE_BYTES):
                    raise ValueError(why or "its owner gave up")
                _append_output_to(Path(order["log_path"]))
        except Exception as error:  # whatever it is, nobody would end this process
            _log.error("this early child is of no use: %s", error)
            os._exit(1)
        self._spec = order["spec"]
        self._is_owned.set()
        _has_ended(owner, timeout_s=None)
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_child(folder: Path, names: str, spec: Mapping[str, Any], *, log_path: Path) -> "AdoptedChild | None":
    """Take an early child that waits in `folder`; None if there is none that can go on with `spec`.

    names: pattern of the names of those that would do; several may be taken by others meanwhile
    log_path: where its output goes from now on, what it wrote so far included
    """
    order = json.dumps({"owner_pid": os.getpid(), "spec": dict(spec), "log_path": str(log_path)}).encode() + b"\n"
    for path in sorted(folder.glob(f"{names}{_SUFFIX}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            try:
                connection.connect(str(path))
            except OSError:  # it ended, or another owner was quicker, which shows here or below
                continue
            child = AdoptedChild(_peer_pid(connection), folder)
            try:
                with connection.makefile("rwb") as stream:
                    stream.write(order)
                    stream.flush()
                    answer = stream.readline(MAX_LINE_BYTES)
                    if not answer:
                        child.close()
                        continue
                    objection = json.loads(answer)["objection"]
                    if not objection:
                        stream.write(b"taken\n")
                        stream.flush()
                        return child
            except TimeoutError:
                if not path.exists():  # it is another's by now, or ends since we give up
                    child.close()
                    continue
                objection = f"it did not answer within {ANSWER_TIMEOUT_S:g} s"
            except OSError:
                child.close()
                continue
        _log.warning("early child %s cannot be taken: %s", path.stem, objection)
        try:  # what it holds is needed by the one that is started instead
            child.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.close()
    return None


class AdoptedChild:
    """A child of another process that this one owns: what is used of subprocess.Popen."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._folder = folder
        self._pidfd = _pidfd(pid)

    def close(self) -> None:
        """Let go of it; nothing else may be asked of it then."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def poll(self) -> int | None:
        if self.returncode is None and _has_ended(self._pidfd, timeout_s=0.0):
            self.returncode = self._code()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended within `timeout` seconds.
        """
        if self.returncode is None and not _has_ended(self._pidfd, timeout_s=timeout):
            assert timeout is not None, "without a time-out it has ended"
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        code = self.poll()
        assert code is not None, "it has ended"
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None and self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _code(self) -> int:
        """As its starter tells it; 1 if that says nothing."""
        deadline_s = time.monotonic() + CODE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError, ValueError):
                return int(json.loads(_code_path(self._folder, self.pid).read_text())["code"])
            time.sleep(_POLL_S)
        return 1


def _peer_pid(connection: socket.socket) -> int:
    """The process that listens at the other end."""
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def _append_output_to(log_path: Path) -> None:
    """Let this process's output go to another log, what it wrote so far too."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    with contextlib.suppress(OSError), open(f"/proc/self/fd/{sys.stderr.fileno()}", "rb") as so_far:
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.write(log, so_far.read())  # last: other threads write meanwhile
    os.close(log)


def _pidfd(pid: int) -> int | None:
    """A handle of a process, which no other process that gets its number later has; None if it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _has_ended(pidfd: int | None, *, timeout_s: float | None) -> bool:
    if pidfd is None:
        return True
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))
