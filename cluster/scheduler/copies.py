"""The copies between a group's GPU and CPU blocks that its ranks have been told of and have not all acknowledged."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from quire.cluster.scheduler.block_pool import BlockPool
from quire.cluster.scheduler.request import Request, Transfer


@dataclass(frozen=True, slots=True)
class Copy:
    """One block on its way. It holds both blocks until every rank has said that its part is done."""

    request: Request
    transfer: Transfer
    is_out: bool  # from GPU to CPU
    gpu_block: int
    cpu_block: int


class CopyLedger:
    """All copies under way of one group."""

    def __init__(self, gpu_pool: BlockPool, cpu_pool: BlockPool, *, num_ranks: int) -> None:
        self._gpu_pool = gpu_pool
        self._cpu_pool = cpu_pool
        self._num_ranks = num_ranks
        self._next_id = 0
        self._under_way: dict[int, Copy] = {}
        self._ranks_left: dict[int, set[int]] = {}  # by copy id

    def __len__(self) -> int:
        return len(self._under_way)

    def start(self, copies: Iterable[tuple[int, int]], *, request: Request, transfer: Transfer, is_out: bool) -> list[tuple[int, int, int]]:
        """Hold the blocks of (gpu block, cpu block) pairs; the (copy id, gpu block, cpu block) that the plan must name."""
        named = []
        for gpu_block, cpu_block in copies:
            copy_id = self._next_id
            self._next_id += 1
            self._gpu_pool.fork([gpu_block])
            self._cpu_pool.fork([cpu_block])
            self._under_way[copy_id] = Copy(request, transfer, is_out, gpu_block, cpu_block)
            self._ranks_left[copy_id] = set(range(self._num_ranks))
            transfer.num_left += 1
            named.append((copy_id, gpu_block, cpu_block))
        return named

    def objection(self, rank: int, copy_ids: Iterable[int]) -> str:
        """Why a rank cannot have ended these copies, "" if it can."""
        wrong = [copy_id for copy_id in copy_ids if rank not in self._ranks_left.get(copy_id, ())]
        return f"rank {rank} ended copies {wrong} that are not under way there" if wrong else ""

    def ended(self, rank: int, *, done: Iterable[int], failed: Iterable[int]) -> list[Copy]:
        """Take in that a rank has ended copies; those that have now ended on all ranks, whose blocks are not held any more."""
        for copy_id in failed:
            self._under_way[copy_id].transfer.failed = True
        completed = []
        for copy_id in (*done, *failed):
            ranks_left = self._ranks_left[copy_id]
            ranks_left.remove(rank)
            if ranks_left:
                continue
            del self._ranks_left[copy_id]
            copy = self._under_way.pop(copy_id)
            self._gpu_pool.free([copy.gpu_block])
            self._cpu_pool.free([copy.cpu_block])
            copy.transfer.num_left -= 1
            completed.append(copy)
        return completed

    def ids(self) -> tuple[int, ...]:
        return tuple(self._under_way)

    def under_way(self) -> list[Copy]:
        return list(self._under_way.values())

    def num_leaving(self) -> int:
        """GPU blocks that will be free once the copies out of them have ended."""
        held = Counter(copy.gpu_block for copy in self._under_way.values() if copy.is_out)  # twice by two that shared it
        return sum(self._gpu_pool.ref_count(block_id) == count for block_id, count in held.items())
