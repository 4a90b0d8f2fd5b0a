"""Lets a rank die at a chosen point of its work. Python runs this in each process that has this folder on its PYTHONPATH.

A test arms it by a file, named by RANK_FAULT_FILE, that holds a kind and a number: the first rank that comes to its n-th operation
of that kind, counted from when it first saw the file, takes the file away and kills itself. So one file kills one rank.

    prefill, decode      in a step that computes chunks, or decodes alone; its keys are written, its result is not sent
    swap_out, swap_in    in the midst of a block's copy

One kind kills nobody: drift, after which a rank's block table holds a wrong block.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

FILE = os.environ.get("RANK_FAULT_FILE", "")
SPENT = ".spent"


class Fault:
    """Counts the operations of one process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def is_due(self, kind: str) -> bool:
        try:
            with open(FILE) as file:
                wanted, number = file.read().split()
        except (OSError, ValueError):
            self._counts.clear()
            return False
        self._counts[kind] += 1
        if wanted != kind or self._counts[kind] < int(number):
            return False
        try:
            os.rename(FILE, FILE + SPENT)
        except OSError:
            return False  # another rank was first
        return True


fault = Fault()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch_steps(module: ModuleType) -> None:
    compute = module.EagerSteps.compute

    def compute_and_die(self: Any, chunks: Sequence[Any], decoding: Any, *rest: Any, **named: Any) -> Any:
        done = compute(self, chunks, decoding, *rest, **named)
        if fault.is_due("prefill" if chunks else "decode"):
            die()
        if not chunks and len(decoding) and fault.is_due("drift"):
            self._batch.block_tables[int(decoding[0]), 0] += 1
        return done

    module.EagerSteps.compute = compute_and_die


def patch_swap_pool(module: ModuleType) -> None:
    pool = module.SwapPool
    perform = pool._perform

    def perform_and_die(self: Any, copy_id: int) -> None:
        copy = self._started[copy_id]
        is_in = copy.target.untyped_storage().data_ptr() == self._device_blocks.untyped_storage().data_ptr()
        if fault.is_due("swap_in" if is_in else "swap_out"):
            half = len(copy.source) // 2
            copy.target[:half].copy_(copy.source[:half])
            die()
        perform(self, copy_id)

    pool._perform = perform_and_die


PATCHES = {"quire.worker.eager_steps": patch_steps, "quire.worker.swap_pool": patch_swap_pool}


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules to patch as Python does, and patches each right after it ran."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        patch = PATCHES.get(name)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None, name
        assert spec.loader is not None, name
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


if FILE and "quire.worker.rank_process" in sys.orig_argv:
    sys.meta_path.insert(0, PatchingFinder())
