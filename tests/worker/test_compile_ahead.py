"""Forked compilers, with work of ours in the place of kernels: there is no GPU here."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DEMO_MODEL
from triton import knobs

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
    monkeypatch.setattr(knobs.cache, "dir", str(cache / "triton"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return CompileAhead(SPEC, folder, dtype=torch.bfloat16)


def test_nothing_begins_before_the_rank_says_so_and_all_of_it_is_done_once(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works = {name: (tmp_path / name).touch for name in ("first", "second")}
    compiling = start(folder, works, monkeypatch, tmp_path)
    time.sleep(0.2)
    assert not list(tmp_path.glob("*st")), "it has begun"
    compiling.begin()
    compiling.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "triton"}
    for name in works:
        (tmp_path / name).unlink()
    again = start(folder, works, monkeypatch, tmp_path)
    again.begin()
    again.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"triton"}, "what lies in the cache is not compiled again"


def test_what_fails_or_hangs_is_left_to_the_rank(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a compiler's error")

    monkeypatch.setattr(compile_ahead, "TIMEOUT_S", 1.0)
    compiling = start(folder, {"fails": fail, "hangs": lambda: time.sleep(60)}, monkeypatch, tmp_path)
    pids = list(compiling._pids)
    compiling.begin()
    compiling.wait()
    assert not list((tmp_path / "triton").glob("*.compiled"))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
