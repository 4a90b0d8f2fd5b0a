"""Names of block contents."""

from hypothesis import given
from hypothesis import strategies as st

from quire.common.hashing import HASH_BYTES, cache_root, hash_block, hash_full_blocks

ROOT = cache_root(model="m", adapter="", tenant_scope="t", cache_salt="")
TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKEN_IDS, st.sampled_from([1, 2, 4, 16]))
def test_hashing_a_prompt_equals_hashing_its_blocks_one_by_one(token_ids: list[int], block_size: int) -> None:
    parent, one_by_one = ROOT, []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        one_by_one.append(parent)
    assert hash_full_blocks(ROOT, token_ids, block_size=block_size) == one_by_one
    assert all(len(name) == HASH_BYTES for name in one_by_one)


@given(TOKEN_IDS, TOKEN_IDS)
def test_a_block_is_named_for_everything_before_it(first: list[int], second: list[int]) -> None:
    same = hash_full_blocks(ROOT, [*first, 7], block_size=1)[-1] == hash_full_blocks(ROOT, [*second, 7], block_size=1)[-1]
    assert same == (first == second)


def test_every_part_of_the_root_tells_requests_apart() -> None:
    neutral = {"model": "m", "adapter": "", "tenant_scope": "t", "cache_salt": ""}
    roots = {cache_root(**neutral)}
    roots |= {cache_root(**(neutral | {part: "other"})) for part in neutral}
    roots.add(cache_root(model="mt", adapter="", tenant_scope="", cache_salt=""))  # the same letters, parted elsewhere
    assert len(roots) == 6
