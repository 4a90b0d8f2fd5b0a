"""Kernels compiled by several processes while the rank does other things: alone it would take half of its start."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
import triton
from triton import knobs

import quire.kernels
from quire.common.child_process import die_with_parent
from quire.common.model_folder import ModelFolder
from quire.worker.graphed_steps import KINDS, GraphedSteps
from quire.worker.kv_cache import KvCache
from quire.worker.models.llama import LlamaModel, LlamaShare, read_llama_config
from quire.worker.models.llama_weights import empty_weights
from quire.worker.rank_spec import RankSpec
from quire.worker.runner import Runner
from quire.worker.warm_up import touch_decodes

_log = logging.getLogger(__name__)

# Longest that the rank waits for them; what is not compiled then it compiles itself.
TIMEOUT_S: Final = 60.0
# Of the stand-in for the model: kernels of layers do not depend on these.
_NUM_LAYERS: Final = 1
_NUM_BLOCKS: Final = 64
_VOCAB_SIZE: Final = 8192


class CompileAhead:
    """The processes. They are forked, so that none imports torch again: from a rank that has not touched its GPU yet."""

    def __init__(self, spec: RankSpec, folder: ModelFolder, *, dtype: torch.dtype) -> None:
        assert not torch.cuda.is_initialized(), "a forked process could not use the GPU"
        self._started_s = time.monotonic()
        self._stamp = _stamp(spec, folder)
        self._pids: dict[int, str] = {}
        self._gate = -1
        if self._stamp.exists():
            return  # all of it lies in the cache
        parent_pid = os.getpid()
        reader, self._gate = os.pipe()
        for name, work in _works(spec, folder, dtype).items():
            pid = os.fork()
            if pid == 0:
                os.close(self._gate)
                os.read(reader, 1)  # returns when the rank closes its end
                _run(work, parent_pid)
            self._pids[pid] = name
        os.close(reader)

    def begin(self) -> None:
        """Let them use the GPU: until now the rank could see what is free there."""
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1

    def wait(self) -> None:
        """Wait for all of them, and note that it need not be done again."""
        if not self._pids:
            return
        failed = []
        deadline_s = time.monotonic() + TIMEOUT_S
        while self._pids and time.monotonic() < deadline_s:
            for pid, name in list(self._pids.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del self._pids[pid]
                    if status:
                        failed.append(name)
            time.sleep(0.01)
        for pid, name in self._pids.items():
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            failed.append(name)
        self._pids.clear()
        _log.info("compiled ahead in %.2f s%s", time.monotonic() - self._started_s, f", but for {', '.join(failed)}" if failed else "")
        if not failed:
            with suppress(OSError):  # a cache that cannot be written costs time, not the rank
                self._stamp.parent.mkdir(parents=True, exist_ok=True)
                self._stamp.touch()


def _works(spec: RankSpec, folder: ModelFolder, dtype: torch.dtype) -> Mapping[str, Callable[[], None]]:
    """By name, what compiles for about the same time."""
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
    model = LlamaModel(small, share, empty_weights(share, dtype=dtype, device=spec.device))
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


def _run(work: Callable[[], None], parent_pid: int) -> None:
    """The forked process's whole life."""
    try:
        die_with_parent(parent_pid)
        with torch.inference_mode():
            work()
        torch.cuda.synchronize()
    except BaseException:
        _log.exception("compiling ahead failed; the rank will compile this itself")
        os._exit(1)
    os._exit(0)


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
