"""The block ledger: small stories, and random use beside a slow twin."""

from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from slow_block_pool import SlowBlockPool

from quire.cluster.scheduler.block_pool import BlockPool, OutOfBlocks
from quire.common.messages import BlockState

ALL_NAMES: Final = [b"a", b"b", b"c", b"d", b"e"]
NAMES: Final = st.sampled_from(ALL_NAMES)


def test_blocks_are_given_in_order_and_come_back() -> None:
    pool = BlockPool(4, block_size=4)
    assert pool.allocate(3) == [0, 1, 2]
    assert (pool.num_free, pool.num_held, pool.num_cached) == (1, 3, 0)
    pool.free([0, 1, 2])
    assert (pool.num_free, pool.num_held, pool.num_cached) == (4, 0, 0)
    pool.check()


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(4, block_size=4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 4 available"):
        pool.allocate(2)
    assert pool.allocate(1) == [3]
    pool.check()


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2, block_size=4)
    (block,) = pool.allocate(1)
    pool.fork([block])
    assert (pool.ref_count(block), pool.num_shared) == (2, 1)
    pool.free([block])
    assert (pool.ref_count(block), pool.num_free) == (1, 1)
    pool.free([block])
    assert pool.num_free == 2
    pool.check()


def test_named_blocks_are_found_after_their_holder_left_until_their_place_is_needed() -> None:
    pool = BlockPool(3, block_size=4)
    table = pool.allocate(2)
    for block, name in zip(table, [b"first", b"second"], strict=True):
        pool.publish(block, name)
    pool.free(table)
    assert (pool.num_free, pool.num_cached, pool.num_available) == (1, 2, 3)
    assert pool.find([b"first", b"second", b"third"]) == table
    assert pool.find([b"other", b"second"]) == []

    pool.allocate(2)  # takes the free block and forgets the end of the cached prefix, not its beginning
    assert pool.find([b"first", b"second"]) == [table[0]]
    pool.fork([table[0]])
    assert (pool.num_held, pool.num_cached) == (3, 0)
    pool.check()


def test_a_name_belongs_to_the_first_block_that_took_it() -> None:
    pool = BlockPool(2, block_size=4)
    first, second = pool.allocate(2)
    pool.publish(first, b"name")
    pool.publish(second, b"name")
    assert pool.find([b"name"]) == [first]
    pool.free([second])
    assert pool.num_free == 1  # without a name of its own it is simply free
    pool.check()


def test_each_block_is_told_by_its_holders_and_its_state() -> None:
    pool = BlockPool(5, block_size=4)
    cached, shared, _, very_shared = pool.allocate(4)
    pool.publish(cached, b"a")
    pool.free([cached])
    pool.fork([shared])
    for _ in range(299):
        pool.fork([very_shared])
    assert list(pool.ref_counts()) == [0, 2, 1, 255, 0]
    assert list(pool.states()) == [BlockState.CACHED, BlockState.SHARED, BlockState.HELD, BlockState.SHARED, BlockState.FREE]
    assert pool.num_shared == 2


class PoolBesideItsTwin(RuleBasedStateMachine):
    """Any use of the pool by holders that keep its rules: it does what the slow, obvious one does, block by block."""

    @initialize(num_blocks=st.integers(1, 8))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, block_size=4)
        self.twin = SlowBlockPool(num_blocks)
        self.tables: list[list[int]] = []

    @rule(num_blocks=st.integers(0, 9))
    def allocate(self, num_blocks: int) -> None:
        taken = self.twin.allocate(num_blocks)
        if taken is None:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(num_blocks)
        else:
            assert self.pool.allocate(num_blocks) == taken
            self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        shared = data.draw(st.sampled_from(self.tables))
        self.pool.fork(shared)
        self.twin.fork(shared)
        self.tables.append(list(shared))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        self.twin.free(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=NAMES)
    def publish(self, data: st.DataObject, name: bytes) -> None:
        block_id = data.draw(st.sampled_from(self.held_blocks()))
        self.pool.publish(block_id, name)
        self.twin.publish(block_id, name)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.held_blocks()))
        self.pool.unpublish([block_id])
        self.twin.unpublish([block_id])

    @rule(names=st.lists(NAMES, max_size=4, unique=True))
    def find_and_hold(self, names: list[bytes]) -> None:
        found = self.pool.find(names)
        assert found == self.twin.find(names)
        assert self.pool.num_unheld(found) == sum(self.twin.blocks[block_id].num_holders == 0 for block_id in found)
        self.pool.fork(found)
        self.twin.fork(found)
        self.tables.append(found)

    @invariant()
    def they_agree(self) -> None:
        holders = [block.num_holders for block in self.twin.blocks]
        assert holders == [sum(table.count(block_id) for table in self.tables) for block_id in range(self.pool.num_blocks)]
        self.pool.check(holders)
        num_free, num_cached = len(self.twin.free_blocks()), len(self.twin.cached_blocks())
        assert (self.pool.num_free, self.pool.num_cached, self.pool.num_available) == (num_free, num_cached, num_free + num_cached)
        assert self.pool.num_held == self.pool.num_blocks - num_free - num_cached
        assert self.pool.num_shared == sum(count > 1 for count in holders)
        assert list(self.pool.ref_counts()) == holders
        assert {name for name in ALL_NAMES if self.pool.knows(name)} == {block.name for block in self.twin.blocks if block.name}

    def held_blocks(self) -> list[int]:
        return sorted({block_id for table in self.tables for block_id in table})


def test_the_pool_does_what_its_slow_twin_does_block_by_block() -> None:
    run_state_machine_as_test(PoolBesideItsTwin, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))
