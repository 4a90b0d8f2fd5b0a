"""Forked compilers, with work of ours in the place of kernels: there is no GPU here."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DEMO_MODEL
from triton import knobs
from triton.runtime.jit import JITFunction, JitFunctionInfo

from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker import compile_ahead
from quire.worker.compile_ahead import CompileAhead
from quire.worker.rank_spec import RankSpec

SPEC = RankSpec("g", 3, 0, 1, str(DEMO_MODEL), "cuda", "bfloat16", 256, 0, 4, 200, 10, 128, "", 15.0, 1, "info", "")


@pytest.fixture
def folder() -> ModelFolder:
    return read_model_folder(DEMO_MODEL)


def start(folder: ModelFolder, works: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cache: Path) -> CompileAhead:
    monkeypatch.setattr(compile_ahead, "_works", lambda *_: works)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(knobs.cache, "dir", str(cache / "triton"))
    return CompileAhead(SPEC, folder, dtype=torch.bfloat16)


def compiles(folder: Path, *names: str) -> Any:
    """Work that asks as Triton does before it compiles, takes its time for it, and leaves a mark for each compilation."""

    def work() -> None:
        for name in names:
            hook = knobs.runtime.jit_cache_hook
            assert hook is not None
            how: Any = {"key": f"{name} of 16", "repr": "", "compile": {}, "is_manual_warmup": True, "already_compiled": False}
            if not hook(fn=JitFunctionInfo("quire.kernels.any", name, None), **how):
                time.sleep(0.05)
                (folder / f"{name} by {os.getpid()}").touch()

    return work


def compiled(folder: Path) -> list[str]:
    return sorted(path.name.split()[0] for path in folder.glob("* by *"))


def test_nothing_begins_before_the_rank_says_so_and_each_kernel_is_compiled_once(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [f"kernel{index}" for index in range(9)]
    works = {"some": compiles(tmp_path, *names[:6]), "others": compiles(tmp_path, *names[3:])}
    compiling = start(folder, works, monkeypatch, tmp_path)
    assert len(compiling._pids) == 3
    time.sleep(0.2)
    assert not compiled(tmp_path), "it has begun"
    compiling.begin()
    compiling.wait()
    assert compiled(tmp_path) == names
    assert compiling.is_done
    assert len({path.name.split()[-1] for path in tmp_path.glob("* by *")}) > 1, "one process did all of it"
    again = start(folder, works, monkeypatch, tmp_path)
    assert again.is_done
    again.wait()
    assert compiled(tmp_path) == names, "what lies in the cache is not compiled again"


def test_who_comes_second_waits_for_the_first(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = start(folder, {"works": compiles(tmp_path, "kernel")}, monkeypatch, tmp_path)
    second = start(folder, {"works": compiles(tmp_path, "kernel")}, monkeypatch, tmp_path)
    assert not second.is_done
    assert not second._pids
    waiting = threading.Thread(target=second.wait)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive(), "it did not wait"
    first.wait()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert second.is_done
    assert compiled(tmp_path) == ["kernel"]


def test_what_fails_or_hangs_is_left_to_the_rank(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> None:
        if not knobs.runtime.jit_cache_hook(
            fn=JitFunctionInfo("m", "bad", None), key="", repr="", compile={}, is_manual_warmup=True, already_compiled=False
        ):
            raise RuntimeError("a compiler's error")
        time.sleep(60)

    monkeypatch.setattr(compile_ahead, "TIMEOUT_S", 1.0)
    compiling = start(folder, {"works": fail}, monkeypatch, tmp_path)
    pids = list(compiling._pids)
    compiling.begin()
    compiling.wait()
    assert compiling.is_done
    assert not list((tmp_path / "triton").glob("*.compiled"))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_kernel_is_compiled_with_what_launches_it_and_never_launched(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Kernel:
        @property
        def run(self) -> None:
            (tmp_path / "launcher").touch()

    def launch(_: Any, *, warmup: bool, is_taken: bool) -> Kernel | None:
        (tmp_path / f"{'compiled' if warmup else 'launched'}").touch()
        return None if is_taken else Kernel()

    def work() -> None:
        for is_taken in (True, False):
            JITFunction.run(None, warmup=False, is_taken=is_taken)

    monkeypatch.setattr(JITFunction, "run", launch)
    compiling = start(folder, {"works": work}, monkeypatch, tmp_path)
    compiling.wait()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "triton") == ["compiled", "launcher"]
    assert list((tmp_path / "triton").glob("*.compiled")), "a process failed"
