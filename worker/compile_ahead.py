"""Kernels compiled by several processes while other things start: alone a rank would take half of its start for it.

A rank that loads early, or a process of its own (`python -m quire.worker.compile_ahead`), begins with it as soon as the settings are
known; a rank that comes meanwhile waits for it, and one that finds nobody compiling does the same by itself.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

import quire.kernels
from quire.common.child_process import die_with_parent, enter_child
from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker.gpu_memory import draw_bytes, partial_bytes
from quire.worker.graphed_steps import KINDS, GraphedSteps
from quire.worker.kv_cache import KvCache
from quire.worker.lone_collective import LoneCollective
from quire.worker.models.llama import LlamaModel, LlamaShare, read_llama_config
from quire.worker.models.llama_weights import empty_weights
from quire.worker.models.load_model import DTYPES
from quire.worker.rank_spec import RankSpec
from quire.worker.runner import Runner
from quire.worker.warm_up import touch_decodes

_log = logging.getLogger(__name__)

# Longest that a rank waits for them; what is not compiled then it compiles itself.
TIMEOUT_S: Final = 60.0
# How often it looks whether they have ended.
_POLL_S: Final = 0.01
# Processes of one host; each takes a CPU. 42 kernels took 16 of them 10.5 s with what launches them, 10 of them 10.0 s without (an
# NVIDIA H200 with 32 CPUs, nothing in the page cache, 2026-11-29).
_MAX_PROCESSES: Final = 16
# What each takes of the GPU at most: its context, and the stand-ins' buffers for the largest step.
_GPU_BYTES_EACH: Final = 9 * 2**28
# Of the stand-in for the model: kernels of layers do not depend on these.
_NUM_LAYERS: Final = 1
_NUM_BLOCKS: Final = 64
_VOCAB_SIZE: Final = 8192


class CompileAhead:
    """The processes. They are forked, so that none imports torch again: from one that has not touched its GPU yet.

    All of them go through the same launches, launch nothing, and compile what none of the others has begun with.
    """

    def __init__(self, spec: RankSpec, folder: ModelFolder, *, dtype: torch.dtype) -> None:
        assert not torch.cuda.is_initialized(), "a forked process could not use the GPU"
        self._started_s = time.monotonic()
        self._stamp = _stamp(spec, folder)
        self._pids: list[int] = []
        self._gate = -1
        self._lock = -1
        self._claims: Path | None = None
        if self._stamp.exists():
            return  # all of it lies in the cache
        with suppress(OSError):  # a cache that cannot be written is nobody else's either
            self._stamp.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._stamp.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if self._lock >= 0 and not _try_lock(self._lock):
            return  # somebody else is at it
        parent_pid = os.getpid()
        self._claims = Path(tempfile.mkdtemp(prefix="quire-compiling-"))
        works = list(_works(spec, folder, dtype).values())
        reader, self._gate = os.pipe()
        for index in range(max(1, min(_MAX_PROCESSES, (os.cpu_count() or 1) - 1))):
            pid = os.fork()
            if pid == 0:
                os.close(self._gate)
                os.read(reader, 1)  # returns when the parent closes its end
                first = index % len(works)  # they begin in different places, and so seldom meet
                _run(works[first:] + works[:first], self._claims, parent_pid)
            self._pids.append(pid)
        os.close(reader)

    @property
    def max_gpu_bytes(self) -> int:
        """What all of them may take of the GPU; those of somebody else are as many as they can be."""
        return (len(self._pids) or _MAX_PROCESSES) * _GPU_BYTES_EACH

    @property
    def is_done(self) -> bool:
        """Whether nobody is at it any more, as far as is known."""
        return self._lock < 0 and not self._pids

    def begin(self) -> None:
        """Let them use the GPU: until now a rank could see what is free there."""
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1

    def wait(self) -> None:
        """Wait for all of them, and note that it need not be done again."""
        self.begin()
        deadline_s = time.monotonic() + TIMEOUT_S
        if self._pids:
            self._wait_for_own(deadline_s)
        elif self._lock >= 0:
            while not _try_lock(self._lock) and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            _log.info("waited %.2f s for kernels that another process compiled", time.monotonic() - self._started_s)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _wait_for_own(self, deadline_s: float) -> None:
        num_failed = 0
        while self._pids and time.monotonic() < deadline_s:
            for pid in list(self._pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._pids.remove(pid)
                    num_failed += status != 0
            time.sleep(_POLL_S)
        for pid in self._pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        num_failed += len(self._pids)
        self._pids.clear()
        assert self._claims is not None, "there are processes"
        num_kernels = len(list(self._claims.iterdir()))
        shutil.rmtree(self._claims, ignore_errors=True)
        took_s = time.monotonic() - self._started_s
        _log.info("compiled %d kernels ahead in %.2f s%s", num_kernels, took_s, f"; {num_failed} processes failed" if num_failed else "")
        if not num_failed:
            with suppress(OSError):  # a cache that cannot be written costs time, not the rank
                self._stamp.touch()


def compile_ahead(spec: RankSpec, folder: ModelFolder) -> CompileAhead | None:
    """Begin to compile the kernels of a native model; None where there are none, and in a process that has used its GPU already."""
    if spec.device != "cuda" or spec.model_backend == "transformers" or not Path("/dev/nvidiactl").exists():
        return None
    if torch.cuda.is_initialized():
        _log.warning("this process has used its GPU, so none that it forks could: kernels are compiled when they are first launched")
        return None
    try:
        read_llama_config(folder)
    except ConfigError:
        return None
    return CompileAhead(spec, folder, dtype=DTYPES[spec.dtype])


def main() -> int:
    """Compile what a rank of this specification will need, before there is one; the exit code."""
    spec = RankSpec(**enter_child())
    logging.basicConfig(level=spec.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s compile: %(message)s")
    compiling = compile_ahead(spec, read_model_folder(Path(spec.model_path), needs_weights=not spec.dummy_weights))
    if compiling is not None:
        compiling.wait()
    return 0


def _try_lock(lock: int) -> bool:
    """Whether nobody else holds the file, which is ours then until it is closed, by our children too."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _works(spec: RankSpec, folder: ModelFolder, dtype: torch.dtype) -> Mapping[str, Callable[[], None]]:
    """By name, the launches of a rank."""
    works: dict[str, Callable[[], None]] = {}
    for kind in KINDS:
        # Draws depend on the vocabulary's size, and on nothing else of the model.
        vocab_size = folder.vocab_size if kind == "draw" else _VOCAB_SIZE + folder.vocab_size % 16
        works[kind] = lambda kind=kind, vocab_size=vocab_size: _steps(spec, folder, dtype, vocab_size).touch(kind)  # type: ignore[misc]

    def special() -> None:
        runner = _runner(spec, folder, dtype, folder.vocab_size)
        touch_decodes(runner, max_rows=spec.max_sequences)

    return works | {"special": special}


def _steps(spec: RankSpec, folder: ModelFolder, dtype: torch.dtype, vocab_size: int) -> GraphedSteps:
    steps = _runner(spec, folder, dtype, vocab_size).steps
    assert isinstance(steps, GraphedSteps)
    return steps


def _runner(spec: RankSpec, folder: ModelFolder, dtype: torch.dtype, vocab_size: int) -> Runner:
    """The rank's runner over a stand-in for its model, of arbitrary numbers."""
    config = replace(read_llama_config(folder), num_layers=_NUM_LAYERS, vocab_size=vocab_size, is_tied=True)
    small = replace(folder, num_layers=_NUM_LAYERS, vocab_size=vocab_size)
    share = LlamaShare(config, spec.rank, spec.tensor_parallel_size)
    collective = None
    if spec.tensor_parallel_size > 1:
        size = spec.tensor_parallel_size
        collective = LoneCollective(
            rank=spec.rank,
            size=size,
            partial_bytes=partial_bytes(folder, dtype=spec.dtype, max_tokens=max(spec.max_batched_tokens, spec.max_sequences)),
            draw_bytes=draw_bytes(small, dtype=spec.dtype, num_ranks=size, max_rows=spec.max_sequences),
            device=spec.device,
        )
    model = LlamaModel(small, share, empty_weights(share, dtype=dtype, device=spec.device), collective)
    kv_cache = KvCache(
        num_blocks=_NUM_BLOCKS,
        num_layers=_NUM_LAYERS,
        num_kv_heads=model.num_kv_heads,
        block_size=spec.block_size,
        head_dim=config.head_dim,
        dtype=dtype,
        device=spec.device,
    )
    return Runner(
        model,
        kv_cache,
        rank=spec.rank,
        max_rows=spec.max_sequences,
        max_model_len=spec.max_model_len,
        max_batched_tokens=spec.max_batched_tokens,
        device=spec.device,
    )


def _run(works: list[Callable[[], None]], claims: Path, parent_pid: int) -> None:
    """The forked process's whole life."""
    try:
        die_with_parent(parent_pid)
        _only_compile(claims)
        with torch.inference_mode():
            for work in works:
                work()
    except BaseException:
        _log.exception("compiling ahead failed; the rank will compile this itself")
        os._exit(1)
    os._exit(0)


def _only_compile(claims: Path) -> None:
    """From now on a launch in this process compiles its kernel, unless another process has begun to, and launches nothing."""

    def is_taken(*, fn: Any, key: Any, **_: Any) -> bool:
        """Triton's question before it compiles: true if it should not."""
        name = hashlib.sha256(f"{fn.module}.{fn.name} {key}".encode()).hexdigest()
        try:
            os.close(os.open(claims / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
        return False

    knobs.runtime.jit_cache_hook = is_taken
    launch = JITFunction.run

    def compile_alone(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, warmup=True, **kwargs)
        if kernel is not None:
            _ = kernel.run  # made when first asked for: by a C compiler with Triton 3.6, for which the rank would wait kernel by kernel
        return kernel

    JITFunction.run = compile_alone
    # What no kernel fills in must be valid all the same: torch looks things up by it, and an index out of bounds ends the GPU's context.
    setattr(torch, "empty", torch.zeros)  # noqa: B010  # mypy would compare their overloads
    setattr(torch, "empty_like", torch.zeros_like)  # noqa: B010


def _stamp(spec: RankSpec, folder: ModelFolder) -> Path:
    """A file that says that all kernels of such a rank lie in Triton's cache."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for path in sorted(Path(next(iter(quire.kernels.__path__))).glob("*.py")):
        digest.update(path.read_bytes())
    shape = [spec.tensor_parallel_size, spec.dtype, spec.block_size, spec.max_sequences, spec.max_model_len, spec.max_batched_tokens]
    digest.update(json.dumps([shape, (folder.path / "config.json").read_text(), _gpu_names()]).encode())
    return Path(knobs.cache.dir) / f"quire-{digest.hexdigest()[:24]}.compiled"


def _gpu_names() -> list[str]:
    """Of all GPUs here, asked without touching one."""
    return sorted(path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information")) or ["unknown"]


if __name__ == "__main__":
    sys.exit(main())
