"""`quire serve` as its users start it: a process of its own, tagged so that everything it starts can be found."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.1

_TAG: Final = "QUIRE_TEST_TAG"


class ServeProcess:
    """A running `quire serve`; leaving the context ends it and everything of it."""

    def __init__(self, folder: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.tag = uuid.uuid4().hex
        self.output_path = folder / "output"
        self.temporary = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: paths of sockets are
        self._ready_path = folder / "ready.json"
        command = [sys.executable, "-P", "-m", "quire.cli.main", "serve", *arguments]
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0", "--ready-file", str(self._ready_path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "QUIRE_CHECKS_RANKS": "true", **(environ or {}), _TAG: self.tag, "TMPDIR": str(self.temporary)},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def wait_ready(self) -> str:
        """The address, once it serves."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._ready_path.exists():
            assert self.process.poll() is None, f"`quire serve` ended early:\n{self.output}"
            assert time.monotonic() < deadline_s, f"`quire serve` is not ready:\n{self.output}"
            time.sleep(POLL_S)
        return str(json.loads(self._ready_path.read_text())["address"])

    def wait_end(self) -> int:
        """Its exit code."""
        return self.process.wait(STOP_TIMEOUT_S)

    def processes(self) -> dict[int, str]:
        """Everything alive that was started by it, at any remove: process id and command line."""
        return tagged_processes(_TAG, self.tag, folder=self.temporary)

    def process_of(self, module: str) -> int:
        """The process id of the one process that runs this module."""
        (pid,) = [pid for pid, command in self.processes().items() if f"-m {module} " in command]
        return pid

    def process_with(self, word: str) -> int:
        """The process id of the one process with this word in its command line."""
        (pid,) = [pid for pid, command in self.processes().items() if word in command]
        return pid

    def wait_gone(self, *, timeout_s: float) -> None:
        """Wait until nothing of it is left."""
        deadline_s = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline_s, (
                f"still there after {timeout_s:g} s: { {pid: line.strip()[-90:] for pid, line in left.items()} }"
            )
            time.sleep(POLL_S)


def tagged_processes(name: str, value: str, *, folder: Path) -> dict[int, str]:
    """The processes that started with this environment variable or work below this folder: process id and command line.

    The variable alone would miss some: Ray's agents write their titles over it.
    """
    found: dict[int, str] = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(process.name)
            is_tagged = f"{name}={value}".encode() in (process / "environ").read_bytes().split(b"\0")
            if is_tagged or os.readlink(process / "cwd").startswith(f"{folder}/"):
                found[pid] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def wait_for(condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Look until a condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not come true within {timeout_s:g} s"
        time.sleep(POLL_S)


def generate_reference(folder: Path, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
    """What transformers itself generates greedily in float32, prompt by prompt: completions, end token included."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    completions = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, temperature=None,
                                top_p=None, top_k=None)  # fmt: skip
        completions.append(output[0, len(prompt) :].tolist())
    return completions
