"""The process that runs chat templates: `python -m quire.cluster.gateway.template_child`, started by TemplateProcesses.

A template is a program of the model's authors. jinja2's sandbox keeps it from everything but time and memory; those are
limited here by the kernel, which needs no cooperation of what runs away. What crosses a limit ends with its process.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO, Final

from quire.cluster.gateway.chat_template import ChatTemplate
from quire.common.errors import QuireError

MAX_MEMORY_BYTES: Final = 512 * 2**20  # address space; an idle process takes 25 MiB of it (2-core x86 machine, 2026-11-25)
# Processor time of one reply. 2,048 turns with a megabyte of text take 0.02 s (same machine and date).
MAX_CPU_S: Final = 1.0
OUT_OF_MEMORY: Final = 3  # exit code: what is left of the process is not to be trusted with another conversation

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main() -> int:
    """Answer until the parent closes the pipe."""
    _limit()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but replies goes into the pipe
    templates: dict[str, ChatTemplate] = {}
    try:
        while (request := read_message(requests)) is not None:
            # The default action of SIGPROF ends the process, wherever it is.
            signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
            write_message(replies, _answer(request, templates))
            signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        return OUT_OF_MEMORY
    return 0


def read_message(pipe: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the pipe."""
    head = pipe.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    body = pipe.read(size)
    message: dict[str, Any] | None = json.loads(body) if len(body) == size else None
    return message


def write_message(pipe: BinaryIO, message: dict[str, Any]) -> None:
    """Write it whole."""
    pipe.write(encode_message(message))
    pipe.flush()


def encode_message(message: dict[str, Any]) -> bytes:
    """A length in 4 bytes, then JSON in ASCII, which also takes text that is not UTF-8."""
    body = json.dumps(message).encode()
    return struct.pack("<I", len(body)) + body


def _answer(request: dict[str, Any], templates: dict[str, ChatTemplate]) -> dict[str, Any]:
    """A request either brings a template under a key or a conversation for the template of one."""
    if "sources" in request:
        try:
            template = ChatTemplate(request["sources"], request["named_tokens"])
        except MemoryError:
            raise
        except Exception as error:  # jinja2 raises its own kinds, and what a constant in a template evaluates to any
            return {"broken": f"{type(error).__name__}: {error}"}
        templates[request["key"]] = template
        return {"takes_tools": template.takes_tools}
    try:
        return {"text": templates[request["key"]].render(**request["conversation"])}
    except QuireError as error:
        return {"refusal": {"message": error.message, "reason": error.reason, "field": error.field, "metadata": error.metadata}}


def _limit() -> None:
    """Bind this process to its parent's life and to its share of memory."""
    parent_pid = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold prompts
    with contextlib.suppress(ValueError, OSError):  # the caller's own limit is lower
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(main())
