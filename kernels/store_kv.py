"""Writing a step's new keys and values into the paged cache."""

import torch
from torch import Tensor


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot of one layer's paged cache.

    key, value:   [num_tokens, num_kv_heads, head_dim], any strides
    kv_cache:     [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view, same dtype
    slot_mapping: [num_tokens] int64; slot = block_id * block_size + offset, -1 skips (padding)

    Slots other than -1 must be distinct: which of two writes stays is not defined.
    """
    assert key.shape == value.shape, (key.shape, value.shape)
    assert key.shape[1:] == (kv_cache.shape[2], kv_cache.shape[4]), (key.shape, kv_cache.shape)
    assert key.dtype == kv_cache.dtype, (key.dtype, kv_cache.dtype)
    written = slot_mapping >= 0
    if not bool(written.all()):
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    block_ids = slot_mapping // kv_cache.shape[3]
    offsets = slot_mapping % kv_cache.shape[3]
    kv_cache[block_ids, 0, :, offsets] = key
    kv_cache[block_ids, 1, :, offsets] = value


def store_kv_reference(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """The same, token by token."""
    block_size = kv_cache.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            kv_cache[slot // block_size, :, :, slot % block_size] = torch.stack((key[token], value[token]))
