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
from quire.worker.models.transformers_model import TransformersModel, load_transformers_model

T = TypeVar("T")
TIMEOUT_S = 60.0


class ThreadRanks:
    """A group whose ranks stay connected from one run to the next."""

    def __init__(self, size: int, *, slot_bytes: int = 2**16) -> None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        pids = [os.getpid()] * size
        self.collectives: list[Collective] = _in_threads(
            size, lambda rank: SharedMemoryCollective.connect(store, rank=rank, pids=pids, timeout_s=TIMEOUT_S, slot_bytes=slot_bytes)
        )

    def run(self, work: Callable[[Collective], T]) -> list[T]:
        """What `work` gives on each rank. The first error of any rank is raised, and the group is of no use after it."""

        def run_one(rank: int) -> T:
            with torch.inference_mode():
                return work(self.collectives[rank])

        return _in_threads(len(self.collectives), run_one)


def run_ranks(size: int, work: Callable[[Collective], T], *, slot_bytes: int = 2**16) -> list[T]:
    """What `work` gives on each rank of a new group."""
    return ThreadRanks(size, slot_bytes=slot_bytes).run(work)


def load_parts(folder: ModelFolder, ranks: ThreadRanks, *, dtype: str = "float32") -> Sequence[TransformersModel]:
    """Every rank's share, joined. One after the other: transformers changes process-wide state while it loads."""
    return [load_transformers_model(folder, dtype=dtype, device="cpu", collective=collective) for collective in ranks.collectives]


def _in_threads(size: int, work: Callable[[int], T]) -> list[T]:
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:  # with an error in one, the others may wait for it in vain
            thread.join(0.01)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
