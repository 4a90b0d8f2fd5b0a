"""Names of block contents."""

import hashlib

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


@given(TOKEN_IDS, st.sampled_from([1, 3, 16]))
def test_a_name_is_the_cut_sha256_of_the_parents_name_and_of_little_endian_tokens(token_ids: list[int], block_size: int) -> None:
    """Spelled out once more: the gateway and the scheduler of two versions, on two machines, must mean the same by a name."""
    parent, expected = ROOT, []
    for start in range(0, len(token_ids) // block_size * block_size, block_size):
        content = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids[start : start + block_size])
        parent = hashlib.sha256(parent + content).digest()[:16]
        expected.append(parent)
    assert hash_full_blocks(ROOT, tuple(token_ids), block_size=block_size) == expected


@given(st.tuples(*[st.text(max_size=3)] * 4), st.tuples(*[st.text(max_size=3)] * 4))
def test_roots_agree_only_if_all_four_parts_do(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    names = ("model", "adapter", "tenant_scope", "cache_salt")
    roots = [cache_root(**dict(zip(names, parts, strict=True))) for parts in (first, second)]
    assert (roots[0] == roots[1]) == (first == second)


def test_every_part_of_the_root_tells_requests_apart() -> None:
    neutral = {"model": "m", "adapter": "", "tenant_scope": "t", "cache_salt": ""}
    roots = {cache_root(**neutral)}
    roots |= {cache_root(**(neutral | {part: "other"})) for part in neutral}
    roots.add(cache_root(model="mt", adapter="", tenant_scope="", cache_salt=""))  # the same letters, parted elsewhere
    assert len(roots) == 6
