"""The blocks that a rank keeps in CPU memory, and the copies between them and the blocks of its device."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.common.errors import InternalError
from quire.worker.kv_cache import KvCache

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Copy:
    source: Tensor  # one block
    target: Tensor  # one block


class SwapPool:
    """A pool of blocks in CPU memory, laid out as the device's pool is, so that a block is copied as one run of bytes.

    A copy is started, runs beside what follows, and has ended when `wait` or `take_ended` says so. Here a started copy is
    performed as late as that allows: when it is waited for, else when the ended ones are asked for, after the forward pass.
    So a plan that forgets to wait for a copy computes wrong tokens every time on any machine, not now and then on a fast one.
    """

    # Invariant: a copy id is in at most one of _started, _done and _failed.

    def __init__(self, kv_cache: KvCache, *, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._device_blocks = kv_cache.blocks
        self._cpu_blocks = kv_cache.cpu_pool(num_blocks).blocks
        self._started: dict[int, _Copy] = {}  # in the order in which they started
        self._done: list[int] = []
        self._failed: list[int] = []

    def start_out(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Start copies to CPU memory: (copy_id, device block, CPU block).

        Raises:
            InternalError: a copy's id is in use, or a block is outside its pool.
        """
        for copy_id, device_block, cpu_block in copies:
            self._check(copy_id, device_block, cpu_block)
            self._started[copy_id] = _Copy(source=self._device_blocks[device_block], target=self._cpu_blocks[cpu_block])

    def start_in(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Start copies from CPU memory: (copy_id, device block, CPU block). Raises as `start_out` does."""
        for copy_id, device_block, cpu_block in copies:
            self._check(copy_id, device_block, cpu_block)
            self._started[copy_id] = _Copy(source=self._cpu_blocks[cpu_block], target=self._device_blocks[device_block])

    def wait(self, copy_ids: Sequence[int]) -> None:
        """Return when these copies have ended, well or not; those that are not under way ended before."""
        for copy_id in copy_ids:
            if copy_id in self._started:
                self._perform(copy_id)

    def take_ended(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The copies that ended since the last call: those done and those failed. Each is named once, in one of the two."""
        for copy_id in list(self._started):
            self._perform(copy_id)
        ended = tuple(self._done), tuple(self._failed)
        self._done, self._failed = [], []
        return ended

    def clear(self) -> None:
        """Forget every copy; what the blocks hold is anyone's guess afterwards."""
        self._started.clear()
        self._done, self._failed = [], []

    def measure(self) -> tuple[float, float]:
        """Bytes per second of copies in and of copies out; 0.0, not measured: memory copies to itself here."""
        return 0.0, 0.0

    def _perform(self, copy_id: int) -> None:
        copy = self._started.pop(copy_id)
        try:
            copy.target.copy_(copy.source)
        except RuntimeError as error:  # what torch raises; one lost block costs a recompute, a lost rank costs them all
            _log.error("copy %d of a block failed: %s", copy_id, error)
            self._failed.append(copy_id)
        else:
            self._done.append(copy_id)

    def _check(self, copy_id: int, device_block: int, cpu_block: int) -> None:
        if not (0 <= device_block < len(self._device_blocks) and 0 <= cpu_block < self.num_blocks):
            raise InternalError(
                f"copy {copy_id} is between block {device_block} of {len(self._device_blocks)} on the device "
                f"and block {cpu_block} of {self.num_blocks} in CPU memory"
            )
        if copy_id in self._started or copy_id in self._done or copy_id in self._failed:
            raise InternalError(f"copy {copy_id} is started while another copy of this id is not reported yet")
