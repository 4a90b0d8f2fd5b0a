"""The block ledger: golden stories, and random use against its own invariants."""

import random

import pytest

from quire.cluster.scheduler.block_pool import BlockPool, OutOfBlocks


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


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_every_invariant(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12, block_size=4)
    tables: list[list[int]] = []
    for step in range(400):
        action = rng.randrange(4)
        if action == 0 and pool.num_available:
            tables.append(pool.allocate(rng.randint(1, pool.num_available)))
        elif action == 1 and tables:
            pool.free(tables.pop(rng.randrange(len(tables))))
        elif action == 2 and tables:
            shared = rng.choice(tables)
            pool.fork(shared)
            tables.append(list(shared))
        elif action == 3 and tables:
            pool.publish(rng.choice(rng.choice(tables)), b"%d" % rng.randrange(30))
            found = pool.find([b"%d" % rng.randrange(30)])
            if found:
                pool.fork(found)
                tables.append(found)
        pool.check()
        held = {block for table in tables for block in table}
        assert pool.num_held == len(held), step
        assert all(pool.ref_count(b) == sum(table.count(b) for table in tables) for b in range(12))
