"""The ranks of a group as threads of one process: the same collectives, without an import of torch per rank."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from quire.common.model_folder import ModelFolder
from quire.worker.collectives import Collective
from quire.worker.collectives_shared_memory import SharedMemoryCollective
from quire.worker.models.transformers_model import TransformersModel, load_part

T = TypeVar("T")
TIMEOUT_S = 60.0


def run_ranks(size: int, work: Callable[[Collective], T], *, slot_bytes: int = 2**16) -> list[T]:
    """What `work` gives on each rank. The first error of any rank is raised."""
    store = dist.HashStore()
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            pids = [os.getpid()] * size
            collective = SharedMemoryCollective.connect(store, rank=rank, pids=pids, timeout_s=TIMEOUT_S, slot_bytes=slot_bytes)
            with torch.inference_mode():
                results[rank] = work(collective)
            collective.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.05)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def load_parts(folder: ModelFolder, size: int, *, dtype: str = "float32") -> Sequence[TransformersModel]:
    """Every rank's share. One after the other: transformers changes process-wide state while it loads."""
    return [load_part(folder, dtype=dtype, device="cpu", rank=rank, size=size) for rank in range(size)]
