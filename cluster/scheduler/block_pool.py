"""Which KV blocks of a pool are free, held or cached: ids only, never their memory."""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Final

from quire.common.messages import BlockState

_STATE_OF_COUNT: Final = bytes([BlockState.FREE, BlockState.HELD]) + bytes([BlockState.SHARED]) * 254


class OutOfBlocks(Exception):
    """Fewer blocks are free or cached than were asked for."""


class BlockPool:
    """The ledger of one pool of blocks, numbered from 0.

    Each block is in one of three states:

        free     holds nothing that anybody knows of
        held     ref_count >= 1 sequences use it
        cached   nobody holds it, but the hash of its contents (common/hashing.py) is known and it may be found again

    free + cached + held = num_blocks, always. `publish` makes a block findable, a held one too.
    """

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free = deque(range(num_blocks))
        # Invariant: exactly the findable blocks without a holder, least recently used first. A plain dict keeps that order too, but looks
        # for its first key among all those that were deleted before it: 500 blocks of a pool of 42,000 took 4 ms instead of 0.1.
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Invariant: each other's inverse.
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_shared(self) -> int:
        """Blocks with more than one holder."""
        return self.num_held - self._ref_counts.count(1)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def ref_counts(self) -> bytes:
        """Number of holders of each block, by id, 255 standing for more."""
        try:
            return bytes(self._ref_counts)  # twenty times as fast
        except ValueError:
            return bytes(min(count, 255) for count in self._ref_counts)

    def states(self) -> bytes:
        """BlockState of each block, by id."""
        states = bytearray(self.ref_counts().translate(_STATE_OF_COUNT))
        for block_id in self._cached:
            states[block_id] = BlockState.CACHED
        return bytes(states)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one holder: free ones first, then cached ones, least recently used first, whose contents
        are forgotten.

        All or nothing: on error the pool is unchanged.

        Raises:
            OutOfBlocks: fewer are available. Admission answers first, so this is a scheduler bug, not load.
        """
        if num_blocks > self.num_available:
            raise OutOfBlocks(f"{num_blocks} blocks asked for, {self.num_available} of {self.num_blocks} available")
        taken: list[int] = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block_id)]
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def fork(self, block_ids: Iterable[int]) -> None:
        """Add one holder to each block: held ones, and cached ones, which become held."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                assert block_id in self._cached, f"block {block_id} is free: it has no contents to share"
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Take one holder away from each block of a block table.

        A block without holders becomes cached if it can be found, else free. The last blocks of the table go first,
        so that of a cached prefix the end is forgotten before the beginning, without which the end cannot be found.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id]
            assert count > 0, f"block {block_id} has no holder to take away"
            self._ref_counts[block_id] = count - 1
            if count == 1:
                if block_id in self._hash_of:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Make a held block findable by the hash of its contents. If another block has that hash already, nothing changes."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} has no holder; only a holder knows its contents"
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Make held blocks unfindable: their contents turned out to be wrong."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} has no holder"
            block_hash = self._hash_of.pop(block_id, None)
            if block_hash is not None:
                del self._block_of[block_hash]

    def find(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of hashes, from the first, that are all known. `fork` them before the next `allocate`."""
        found: list[int] = []
        for block_hash in block_hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def knows(self, block_hash: bytes) -> bool:
        return block_hash in self._block_of

    def num_known(self, block_hashes: Sequence[bytes]) -> int:
        """About as many as `find` would find, in a few looks: the end of a prefix is forgotten before its beginning, so who
        knows a block nearly always knows those before it."""
        return bisect_left(range(len(block_hashes)), True, key=lambda place: block_hashes[place] not in self._block_of)

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these are cached and not held: forking them takes that many from `num_available`."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def check(self, holders: Sequence[int] | None = None) -> None:
        """Assert every invariant; with `holders`, the number of holders of each block counted elsewhere, that they agree."""
        counts, cached = self._ref_counts, self._cached.keys()
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        held = {block_id for block_id, count in enumerate(counts) if count}
        assert free.isdisjoint(held), "a free block is held"
        assert cached.isdisjoint(free), "a cached block is free"
        assert cached.isdisjoint(held), "a cached block is held"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is in no state"
        assert not counts or min(counts) >= 0
        hashes = self._hash_of
        assert dict(zip(hashes.values(), hashes, strict=True)) == self._block_of
        assert hashes.keys() >= cached, "a cached block cannot be found"
        assert free.isdisjoint(hashes), "a free block can be found"
        assert holders is None or list(holders) == counts, "a block is held by nobody, or not by all that use it"
