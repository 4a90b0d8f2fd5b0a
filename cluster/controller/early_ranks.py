"""Ranks of a local cluster that begin to load their model while Ray starts, which takes as long as loading does."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from quire.common.child_process import STOP_TIMEOUT_S, stop_child
from quire.common.config import ModelPlan
from quire.common.early_child import early_path, start_early
from quire.worker.rank_spec import make_rank_spec

# Whose they are until a group takes them.
EARLY_GROUP_ID: Final = "early"
# How often is looked whether they listen.
POLL_S: Final = 0.02


def early_folder(folder: Path) -> Path:
    """Where they wait, below a cluster's folder."""
    return folder / "early"


def early_names(gpu: str | None) -> str:
    """A pattern of the names of those that use this GPU, or none. Ray names GPUs as CUDA_VISIBLE_DEVICES does, blanks included."""
    return f"{_kind(gpu)}-*"


def _kind(gpu: str | None) -> str:
    return f"gpu-{gpu.strip()}" if gpu is not None else "cpu"


class EarlyRanks:
    """One for each group, of one rank each. Ranks that have to meet others are not begun with: which others is Ray's choice."""

    def __init__(self, plan: ModelPlan, *, folder: Path, logs: Path, log_level: str, gpus: list[str]) -> None:
        """
        folder: the cluster's
        gpus: that this process may use, as CUDA names them
        """
        early_folder(folder).mkdir()
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        if plan.tensor_parallel_size > 1 or not hasattr(os, "pidfd_open"):  # which only Linux has
            return
        spec = make_rank_spec(
            plan, group_id=EARLY_GROUP_ID, term=0, rank=0, scheduler_address="", rank_lease_s=0.0, log_level=log_level, folder=folder
        )
        # As Ray sets it for those that it starts, so that the ranks of later terms compute alike.
        environ = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        is_cuda = plan.device == "cuda"
        for number in range(min(plan.groups, len(gpus)) if is_cuda else plan.groups):
            gpu = gpus[number] if is_cuda else None
            path = early_path(early_folder(folder), f"{_kind(gpu)}-{number}")
            self._children[path] = start_early(
                "quire.worker.rank_process",
                asdict(spec),
                path=path,
                log_path=logs / f"early-{number}.log",
                environ=environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}),
            )

    @property
    def count(self) -> int:
        return len(self._children)

    def wait_listening(self, *, timeout_s: float, is_over: Callable[[], bool]) -> None:
        """Wait until each of them can be asked for. Those that cannot after `timeout_s`, or when `is_over`, are ended: they would hold
        what the ranks that are started instead need."""
        deadline_s = time.monotonic() + timeout_s
        for path, child in self._children.items():
            while not path.exists() and child.poll() is None and time.monotonic() < deadline_s and not is_over():
                time.sleep(POLL_S)
        _end([child for path, child in self._children.items() if not path.exists()])

    def end_unused(self) -> None:
        """End those that nobody took."""
        _end([child for path, child in self._children.items() if path.exists()])

    def end(self) -> None:
        """End all of them, whosever they are."""
        _end(list(self._children.values()))


def _end(children: list["subprocess.Popen[bytes]"]) -> None:
    """End all of them at once."""
    for child in children:
        child.terminate()
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    for child in children:
        stop_child(child, timeout_s=max(0.0, deadline_s - time.monotonic()))
