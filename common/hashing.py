"""Names for the contents of blocks: chained hashes of full blocks, under a root that keeps tenants and models apart.

The gateway hashes prompts, the scheduler hashes a block when decoding fills it; both use this file, so the names agree.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import Final

# Hashes are sha256 cut to 16 bytes: nobody can aim at a collision, and a table of a million blocks stays small.
HASH_BYTES: Final = 16


def cache_root(*, model: str, adapter: str, tenant_scope: str, cache_salt: str) -> bytes:
    """The parent of a sequence's first block. Two requests share blocks only if all four agree.

    Each part is preceded by its length, so no two different quadruples spell the same bytes.
    """
    digest = hashlib.sha256(b"quire.block.v1")
    for part in (model, adapter, tenant_scope, cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()[:HASH_BYTES]


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block that follows `parent` and holds `token_ids`."""
    return hashlib.sha256(parent + _little_endian(token_ids)).digest()[:HASH_BYTES]


def hash_full_blocks(root: bytes, token_ids: Sequence[int], *, block_size: int) -> list[bytes]:
    """The names of all full blocks of a token sequence, in order; a last partial block has none."""
    encoded = _little_endian(token_ids)
    hashes: list[bytes] = []
    parent = root
    block_bytes = 4 * block_size
    for start in range(0, len(encoded) - block_bytes + 1, block_bytes):
        parent = hashlib.sha256(parent + encoded[start : start + block_bytes]).digest()[:HASH_BYTES]
        hashes.append(parent)
    return hashes


def _little_endian(token_ids: Sequence[int]) -> bytes:
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
