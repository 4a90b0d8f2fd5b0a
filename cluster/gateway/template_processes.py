"""Chat templates in processes of their own, which can be killed: a thread that runs away cannot be."""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from quire.cluster.gateway.template_child import MAX_CPU_S, MAX_MEMORY_BYTES, OUT_OF_MEMORY, encode_message
from quire.common.child_process import public_environment
from quire.common.errors import ConfigError, InvalidRequest, Overloaded, Unavailable

# As many as there are threads for text work, so that none of these waits for a process.
NUM_PROCESSES: Final = 2
# Longest wait for a process that is free, where more threads ask than there are processes.
WAIT_TIMEOUT_S: Final = 5.0
# From a message to its reply. What runs away is ended by its processor time (MAX_CPU_S) long before, unless the machine is so
# busy that it gets none; the start of the process, which takes 0.07 s (2-core x86 machine, 2026-11-25), is inside.
REPLY_TIMEOUT_S: Final = 5.0
# Of one reply: requests have 4 MiB, templates add little, and JSON writes a character in at most 12 bytes.
MAX_REPLY_BYTES: Final = 64 * 2**20
MAX_RENDERED_CHARS: Final = 4 * 2**20
# A process that knows so many templates is replaced, so that models that came and went do not fill it.
MAX_TEMPLATES: Final = 16
RETRY_AFTER_S: Final = 1.0


class HostedTemplate:
    """A chat template that runs in one of the processes. Safe to use from several threads."""

    def __init__(self, processes: "TemplateProcesses", load: Mapping[str, Any], *, takes_tools: bool) -> None:
        self._processes = processes
        self._load = load
        self.takes_tools = takes_tools
        self.source = "\n".join(load["sources"].values())

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None, add_generation_prompt: bool, max_chars: int
    ) -> str:
        """The conversation as text. Blocks for at most WAIT_TIMEOUT_S and twice REPLY_TIMEOUT_S.

        Raises:
            InvalidRequest: the template refuses the conversation, fails on it, or needs more time, memory or text than it may.
            Overloaded, Unavailable: no process is free, none can be started, or the machine is too busy for it.
        """
        conversation = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "max_chars": min(max_chars, MAX_RENDERED_CHARS),
        }
        try:
            reply = self._processes.ask(self._load, conversation)
        except _Died as death:
            raise InvalidRequest(
                f"the chat template {death.why} on this conversation; shorten it",
                reason=death.reason,
                field="chat.messages",
                metadata=death.metadata,
            ) from None
        if "refusal" in reply:
            refusal = reply["refusal"]
            raise InvalidRequest(refusal["message"], reason=refusal["reason"], field=refusal["field"], metadata=refusal["metadata"])
        text: str = reply["text"]
        return text


class TemplateProcesses:
    """A few processes that run templates, started when first needed; one that a template breaks is replaced."""

    # Invariant: `_idle` and the processes in use are together at most `num_processes`, which the semaphore counts.

    def __init__(self, *, num_processes: int = NUM_PROCESSES, reply_timeout_s: float = REPLY_TIMEOUT_S) -> None:
        self._num_processes = num_processes
        self._reply_timeout_s = reply_timeout_s
        self._free = threading.BoundedSemaphore(num_processes)
        self._lock = threading.Lock()  # guards _idle and _is_closed
        self._idle: list[_Process] = []
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def load(self, sources: Mapping[str, str], named_tokens: Mapping[str, Any]) -> HostedTemplate:
        """Compile a model's templates; also that is work for a process, as constants are computed meanwhile.

        Raises:
            ConfigError: they cannot be used.
        """
        content = json.dumps([sources, named_tokens], sort_keys=True).encode()
        load = {"key": hashlib.sha256(content).hexdigest(), "sources": dict(sources), "named_tokens": dict(named_tokens)}
        try:
            reply = self.ask(load)
        except _Died as death:
            raise ConfigError(f"the chat template {death.why} when it is compiled", reason=death.reason, metadata=death.metadata) from None
        return HostedTemplate(self, load, takes_tools=reply["takes_tools"])

    def ask(self, load: Mapping[str, Any], conversation: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The reply to a conversation, or without one to the template itself.

        Raises:
            ConfigError: the template cannot be compiled.
            Overloaded, Unavailable: as `HostedTemplate.render`.
            _Died: what the template does has ended the process.
        """
        if not self._free.acquire(timeout=WAIT_TIMEOUT_S):
            text = f"{self._num_processes} processes render conversations and none became free in {WAIT_TIMEOUT_S:g} s; try again"
            raise Overloaded(text, reason="TEMPLATE_BUSY", retry_after_s=RETRY_AFTER_S)
        process: _Process | None = None
        is_usable = False
        try:
            process = self._take()
            if load["key"] not in process.takes_tools:
                reply = process.ask(load, timeout_s=self._reply_timeout_s)
                if "broken" in reply:
                    is_usable = True
                    raise ConfigError(reply["broken"], reason="CHAT_TEMPLATE_BROKEN")
                process.takes_tools[load["key"]] = reply["takes_tools"]
            if conversation is None:
                reply = {"takes_tools": process.takes_tools[load["key"]]}
            else:
                reply = process.ask({"key": load["key"], "conversation": conversation}, timeout_s=self._reply_timeout_s)
            is_usable = True
            return reply
        finally:
            if process is not None:
                self._give_back(process, is_usable=is_usable)
            self._free.release()

    @property
    def idle_pids(self) -> list[int]:
        """Of the processes that wait for work."""
        with self._lock:
            return sorted(process.pid for process in self._idle)

    def close(self) -> None:
        """End the processes; those in use end as soon as they are given back."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.kill()

    def _take(self) -> "_Process":
        with self._lock:
            if self._is_closed:
                raise Unavailable("the gateway is stopping; try another one", reason="STOPPING", retry_after_s=RETRY_AFTER_S)
            process = self._idle.pop() if self._idle else None
        if process is not None and process.is_alive and len(process.takes_tools) < MAX_TEMPLATES:
            return process
        if process is not None:
            process.kill()
        try:
            return _Process()
        except OSError as error:
            text = f"no process for chat templates can be started (errno {error.errno}); try again"
            raise Unavailable(text, reason="NO_TEMPLATE_PROCESS", retry_after_s=RETRY_AFTER_S) from None

    def _give_back(self, process: "_Process", *, is_usable: bool) -> None:
        with self._lock:
            is_kept = is_usable and not self._is_closed
            if is_kept:
                self._idle.append(process)
        if not is_kept:
            process.kill()


class _Died(Exception):
    """The process ended before it replied."""

    def __init__(self, why: str, *, reason: str, metadata: Mapping[str, str]) -> None:
        super().__init__(why)
        self.why = why
        self.reason = reason
        self.metadata = metadata


class _Process:
    """One process and the templates it knows. Used by one thread at a time."""

    def __init__(self) -> None:
        # By exec, never by fork alone: a fork of a process with threads may find locks held for ever.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quire.cluster.gateway.template_child", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=public_environment(),
            start_new_session=True,
        )
        self.takes_tools: dict[str, bool] = {}  # by the key of each template it knows
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """The reply to a message.

        Raises:
            _Died: there is none, because the process has ended.
            Unavailable: there was none in time, or somebody else ended the process. In each case it is of no more use.
        """
        deadline_s = time.monotonic() + timeout_s
        unsent = memoryview(encode_message(dict(message)))
        reply = bytearray()
        try:
            while unsent:
                self._wait(self._requests, select.POLLOUT, deadline_s)
                unsent = unsent[os.write(self._requests, unsent) :]
            while len(reply) < 4 or len(reply) < 4 + int.from_bytes(reply[:4], "little"):
                self._wait(self._replies, select.POLLIN, deadline_s)
                piece = os.read(self._replies, 2**20)
                if not piece or len(reply) > MAX_REPLY_BYTES:
                    raise self._death(timeout_s)
                reply += piece
        except BrokenPipeError:
            raise self._death(timeout_s) from None
        except TimeoutError:
            text = f"the conversation could not be rendered within {timeout_s:g} s; this machine is busy; try again"
            numbers = {"timeout_s": f"{timeout_s:g}"}
            raise Unavailable(text, reason="TEMPLATE_TIMEOUT", metadata=numbers, retry_after_s=RETRY_AFTER_S) from None
        answer: dict[str, Any] = json.loads(reply[4:])
        return answer

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _wait(self, pipe: int, events: int, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(pipe, events)
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise TimeoutError

    def _death(self, timeout_s: float) -> _Died | Unavailable:
        """Why it ended: by what the template does, or for reasons of the machine's."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            code = None
        if code == -signal.SIGPROF:
            text = f"took more than {MAX_CPU_S:g} s of processor time"
            return _Died(text, reason="CHAT_TEMPLATE_TIMEOUT", metadata={"max_cpu_s": f"{MAX_CPU_S:g}"})
        if code == OUT_OF_MEMORY:
            text = f"took more than {MAX_MEMORY_BYTES // 2**20} MiB of memory"
            return _Died(text, reason="CHAT_TEMPLATE_MEMORY", metadata={"max_memory_bytes": str(MAX_MEMORY_BYTES)})
        if code in {-signal.SIGKILL, -signal.SIGTERM}:
            text = f"the process that renders conversations was ended from outside (signal {-code}); try again"
            return Unavailable(text, reason="TEMPLATE_PROCESS_LOST", metadata={"signal": str(-code)}, retry_after_s=RETRY_AFTER_S)
        return _Died(f"ended its process (exit code {code})", reason="CHAT_TEMPLATE_FAILED", metadata={"exit_code": str(code)})
