"""The swap pool of a rank on a GPU: pinned memory, and copies that run beside the computation, on streams of their own."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from quire.common.errors import InternalError
from quire.worker import host_link
from quire.worker.host_memory import available_memory_bytes
from quire.worker.kv_cache import KvCache

_log = logging.getLogger(__name__)

# Memory is pinned in pieces: when some cannot be had, those before it stay.
SLAB_BYTES: Final = 2**28
# Left to the rest of the host: what is pinned cannot be taken back under pressure.
_HOST_RESERVE_BYTES: Final = 2**30
# How much each direction copies to measure itself.
_MEASURED_BYTES: Final = 2**28


class CudaSwapPool:
    """What SwapPool is on CPU. A block is one run of bytes on both sides, so a copy is one transfer; neighbours share one.

    A copy out begins when what was launched before it has been computed, and so does a copy in, whose block may still be
    read by that. `wait` lets the device wait, not the host. `take_ended` names what has ended whenever that is; asked for after a
    step's end, it names at least what that step waited for.
    """

    # Invariant: a copy id is in at most one of _running, _done and _failed.

    def __init__(self, kv_cache: KvCache, *, num_blocks: int, slabs: Sequence[Tensor] | None = None) -> None:
        """slabs: from pin_slabs() for so many blocks; pinned here if None"""
        self._device_blocks = kv_cache.blocks
        self._slab_blocks = _slab_blocks(kv_cache)
        self._slabs = pin_slabs(kv_cache, num_blocks=num_blocks) if slabs is None else slabs
        self.num_blocks = sum(len(slab) for slab in self._slabs)
        device = kv_cache.blocks.device
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        self._running: dict[int, torch.cuda.Event] = {}  # in the order in which they started; recorded behind the copy
        self._done: list[int] = []
        self._failed: list[int] = []

    def start_out(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Start copies to CPU memory: (copy_id, device block, CPU block).

        Raises:
            InternalError: a copy's id is in use, or a block is outside its pool.
        """
        self._start(copies, self._out, is_out=True)

    def start_in(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Start copies from CPU memory: (copy_id, device block, CPU block). Raises as `start_out` does."""
        self._start(copies, self._in, is_out=False)

    def wait(self, copy_ids: Sequence[int]) -> None:
        """What is launched from now on runs behind these copies; those that are not under way ended before."""
        stream = torch.cuda.current_stream(self._device_blocks.device)
        for copy_id in copy_ids:
            if copy_id in self._running:
                stream.wait_event(self._running[copy_id])

    def take_ended(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The copies that ended since the last call: those done and those failed. Each is named once, in one of the two."""
        ended = [copy_id for copy_id, event in self._running.items() if event.query()]
        for copy_id in ended:
            del self._running[copy_id]
        done, failed = (*self._done, *ended), tuple(self._failed)
        self._done, self._failed = [], []
        return done, failed

    def clear(self) -> None:
        """Forget every copy, once none writes any more; what the blocks hold is anyone's guess afterwards."""
        self._in.synchronize()
        self._out.synchronize()
        self._running.clear()
        self._done, self._failed = [], []

    def measure(self) -> tuple[float, float]:
        """Bytes per second of copies in and of copies out, each block on its own; 0.0 without blocks. For a pool that is idle.

        Blocks of both pools hold leftovers afterwards.
        """
        assert not self._running, f"{len(self._running)} copies are under way"
        host_link.touch(self._device_blocks.device)  # what steps exchange with the host meanwhile is a kernel's
        block_bytes = self._device_blocks[:1].nbytes
        count = min(self.num_blocks, len(self._device_blocks), max(1, _MEASURED_BYTES // block_bytes))
        if count == 0:
            return 0.0, 0.0
        # Against each other's order, so that no two are neighbours on both sides.
        copies = [(index, index, count - 1 - index) for index in range(count)]
        speeds = []
        for start in (self.start_in, self.start_out):
            best_s = float("inf")
            for _ in range(3):  # the first touches everything once
                started_s = time.perf_counter()
                start(copies)
                self.clear()
                best_s = min(best_s, time.perf_counter() - started_s)
            speeds.append(count * block_bytes / best_s)
        return speeds[0], speeds[1]

    def _start(self, copies: Sequence[tuple[int, int, int]], stream: torch.cuda.Stream, *, is_out: bool) -> None:
        if not copies:
            return
        self._check(copies)
        stream.wait_stream(torch.cuda.current_stream(self._device_blocks.device))
        last: torch.cuda.Event | None = None
        with torch.cuda.stream(stream):
            for copy_ids, first_device, first_cpu in _neighbours(copies, slab_blocks=self._slab_blocks):
                on_device = self._device_blocks[first_device : first_device + len(copy_ids)]
                slab, offset = divmod(first_cpu, self._slab_blocks)
                in_memory = self._slabs[slab][offset : offset + len(copy_ids)]
                source, target = (on_device, in_memory) if is_out else (in_memory, on_device)
                try:
                    target.copy_(source, non_blocking=True)
                    event = torch.cuda.Event()
                    event.record(stream)
                except RuntimeError as error:  # what torch raises; a lost block costs a recompute, a lost rank costs them all
                    _log.error("copies %s of blocks failed: %s", copy_ids, error)
                    self._failed += copy_ids
                else:
                    self._running.update(dict.fromkeys(copy_ids, event))
                    last = event
        if last is not None:
            host_link.note_blocks(last)

    def _check(self, copies: Sequence[tuple[int, int, int]]) -> None:
        new: set[int] = set()
        for copy_id, device_block, cpu_block in copies:
            if not (0 <= device_block < len(self._device_blocks) and 0 <= cpu_block < self.num_blocks):
                raise InternalError(
                    f"copy {copy_id} is between block {device_block} of {len(self._device_blocks)} on the device "
                    f"and block {cpu_block} of {self.num_blocks} in CPU memory"
                )
            if copy_id in self._running or copy_id in self._done or copy_id in self._failed or copy_id in new:
                raise InternalError(f"copy {copy_id} is started while another copy of this id is not reported yet")
            new.add(copy_id)


def pin_slabs(kv_cache: KvCache, *, num_blocks: int) -> list[Tensor]:
    """Pinned blocks, slab by slab, each slab [n, ...] of the device pool's layout; fewer than asked for if the host has no more.

    Takes a second for 2 GiB, without holding the interpreter: for a thread of its own. No CUDA graph may be captured meanwhile.

    kv_cache: of the layout; its number of blocks does not matter
    """
    slab_blocks = _slab_blocks(kv_cache)
    slabs: list[Tensor] = []
    num_pinned = 0
    while num_pinned < num_blocks:
        count = min(slab_blocks, num_blocks - num_pinned)
        why = _too_little(count * kv_cache.block_bytes)
        if not why:
            try:
                slabs.append(kv_cache.cpu_pool(count).blocks)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
        if why:
            _log.warning("the swap pool has %d blocks instead of %d: no more memory can be pinned (%s)", num_pinned, num_blocks, why)
            break
        num_pinned += count
    return slabs


def _slab_blocks(kv_cache: KvCache) -> int:
    return max(1, SLAB_BYTES // kv_cache.block_bytes)


def _too_little(num_bytes: int) -> str:
    """Why so much memory cannot be pinned; "" if it can. The kernel would end a process rather than refuse."""
    available = available_memory_bytes()
    if available is None or available >= num_bytes + _HOST_RESERVE_BYTES:
        return ""
    return f"{available / 2**30:.2f} GiB are available, and {_HOST_RESERVE_BYTES / 2**30:.0f} GiB are left to the rest of the host"


def _neighbours(copies: Iterable[tuple[int, int, int]], *, slab_blocks: int) -> list[tuple[list[int], int, int]]:
    """Copies that follow each other on both sides, inside one slab, taken together: (their ids, first device block, first CPU block)."""
    runs: list[tuple[list[int], int, int]] = []
    for copy_id, device_block, cpu_block in copies:
        if runs:
            ids, first_device, first_cpu = runs[-1]
            is_next = (device_block, cpu_block) == (first_device + len(ids), first_cpu + len(ids))
            if is_next and cpu_block % slab_blocks:
                ids.append(copy_id)
                continue
        runs.append(([copy_id], device_block, cpu_block))
    return runs
