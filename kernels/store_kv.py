"""Writing a step's new keys and values into the paged cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot of one layer's paged cache.

    key, value:   [num_tokens, num_kv_heads, head_dim], any strides
    kv_cache:     [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view, same dtype, last two dims contiguous
    slot_mapping: [num_tokens] int64; slot = block_id * block_size + offset, -1 skips (padding)

    Slots other than -1 must be distinct: which of two writes stays is not defined.
    """
    assert key.shape == value.shape, (key.shape, value.shape)
    assert key.shape[1:] == (kv_cache.shape[2], kv_cache.shape[4]), (key.shape, kv_cache.shape)
    assert key.dtype == kv_cache.dtype, (key.dtype, kv_cache.dtype)
    if runs_triton(key):
        _launch(key, value, kv_cache, slot_mapping)
        return
    written = slot_mapping >= 0
    if not bool(written.all()):
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    block_ids = slot_mapping // kv_cache.shape[3]
    offsets = slot_mapping % kv_cache.shape[3]
    kv_cache[block_ids, 0, :, offsets] = key
    kv_cache[block_ids, 1, :, offsets] = value


def _launch(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    _store_kv_kernel[(num_tokens, num_kv_heads)](
        kv_cache,
        key,
        value,
        slot_mapping,
        *kv_cache.stride()[:3],
        *key.stride(),
        *value.stride(),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv_cache.shape[3],
        num_warps=1,
    )


@triton.jit
def _store_kv_kernel(
    kv_cache: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    key: tl.tensor,  # [num_tokens, num_kv_heads, HEAD_DIM]
    value: tl.tensor,  # [num_tokens, num_kv_heads, HEAD_DIM]
    slot_mapping: tl.tensor,  # [num_tokens]
    block_stride: int,
    kind_stride: int,
    head_stride: int,
    key_token_stride: int,
    key_head_stride: int,
    key_dim_stride: int,
    value_token_stride: int,
    value_head_stride: int,
    value_dim_stride: int,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    dim = tl.arange(0, PADDED_DIM)
    is_written = dim < HEAD_DIM
    target = kv_cache + slot // BLOCK_SIZE * block_stride + kv_head * head_stride + slot % BLOCK_SIZE * HEAD_DIM + dim
    source = key + token * key_token_stride + kv_head * key_head_stride + dim * key_dim_stride
    tl.store(target, tl.load(source, mask=is_written), mask=is_written)
    source = value + token * value_token_stride + kv_head * value_head_stride + dim * value_dim_stride
    tl.store(target + kind_stride, tl.load(source, mask=is_written), mask=is_written)


def store_kv_reference(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """The same, token by token."""
    block_size = kv_cache.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            kv_cache[slot // block_size, :, :, slot % block_size] = torch.stack((key[token], value[token]))
