"""Everything between a layer's q/k/v product and its attention, in one launch: norms, rotation, the write to the cache."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton
from quire.kernels.store_kv import store_kv, store_kv_reference

# A program per token fills the GPU up to here; of more tokens a program takes several, and has more bytes on their way at once: 43.4
# instead of 58.0 us for 8192 tokens of 16/8 heads with norms, 41.8 with 16 tokens and 8 warps (NVIDIA H200, 2026-11-30). A power of two,
# since graph_sizes.warmed() runs one size from each to the next, and less than 1024, of which every model has a graph.
MAX_TOKENS_ALONE: Final = 512
_TOKENS_TOGETHER: Final = 4
_WARPS_TOGETHER: Final = 4
# Of a token's queries in a program: they, their angles and their results lie in registers.
_MAX_NUMBERS_PER_WARP: Final = 1024
_MAX_WARPS: Final = 16


def rotary_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    output: Tensor | None = None,
    key_output: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values into their slots, give back the queries.

    query:        [num_tokens, num_heads, head_dim]  last dim contiguous, as are those of key and value
    key, value:   [num_tokens, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads
    kv_cache:     [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view, last two dims contiguous
    slot_mapping: [num_tokens] int64; -1 writes nothing to the cache (padding); others distinct
    positions:    [num_tokens] int64
    cos_sin:      [max_positions, rotary_dim] float32, see rotary_table(); dims from rotary_dim on are not rotated
    query_norm, key_norm: [head_dim]; weights of an RMS norm of each head before the rotation, or neither
    output:       [num_tokens, num_heads, head_dim], may be `query` itself; new if None
    key_output:   [num_tokens, num_kv_heads, head_dim], may be `key` itself; None: the rotated keys go to the cache alone

    Dim i is rotated with dim i + rotary_dim / 2, as Llama's checkpoints have it. Sums and products are float32.
    """
    assert (query_norm is None) == (key_norm is None), "queries and keys are normed both or neither"
    assert kv_cache.stride()[3:] == (kv_cache.shape[4], 1), kv_cache.stride()
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1, (query.stride(), key.stride(), value.stride())
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if output is None else output
    if not runs_triton(query):
        cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
        turned_key = _rotated(key, key_norm, cos, sin, eps)
        store_kv(turned_key, value, kv_cache, slot_mapping)
        if key_output is not None:
            key_output.copy_(turned_key)
        return output.copy_(_rotated(query, query_norm, cos, sin, eps))
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    rotary_dim = cos_sin.shape[1]
    padded_group = triton.next_power_of_2(group)
    num_together, num_warps = _program(num_tokens, numbers=padded_group * triton.next_power_of_2(head_dim))
    # A program per few tokens and group of heads: every number is read and written once, and small batches still fill the GPU.
    _rotary_store_kernel[(num_kv_heads, triton.cdiv(num_tokens, num_together))](
        output,
        key_output,
        kv_cache,
        query,
        key,
        value,
        slot_mapping,
        positions,
        cos_sin,
        query_norm,
        key_norm,
        num_tokens,
        eps,
        *output.stride()[:2],
        *((0, 0) if key_output is None else key_output.stride()[:2]),
        *kv_cache.stride()[:3],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        PADDED_HALF=triton.next_power_of_2(rotary_dim // 2),
        PADDED_REST=triton.next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0,
        GROUP=group,
        PADDED_GROUP=padded_group,
        TOKENS=num_together,
        BLOCK_SIZE=kv_cache.shape[3],
        num_warps=num_warps,
    )
    return output


def _program(num_tokens: int, *, numbers: int) -> tuple[int, int]:
    """How many tokens a program takes, and its warps. numbers: of a token's queries in one program, padded"""
    if numbers > _MAX_NUMBERS_PER_WARP:
        return 1, min(_MAX_WARPS, max(_WARPS_TOGETHER, numbers // _MAX_NUMBERS_PER_WARP))
    return (1, 1) if num_tokens <= MAX_TOKENS_ALONE else (_TOKENS_TOGETHER, _WARPS_TOGETHER)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotary_store_kernel(
    output: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM]
    key_output: tl.tensor,  # None, or [num_tokens, num_kv_heads, HEAD_DIM]
    kv_cache: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    query: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM]
    key: tl.tensor,  # [num_tokens, num_kv_heads, HEAD_DIM]
    value: tl.tensor,  # [num_tokens, num_kv_heads, HEAD_DIM]
    slot_mapping: tl.tensor,  # [num_tokens]
    positions: tl.tensor,  # [num_tokens]
    cos_sin: tl.tensor,  # [max_positions, ROTARY_DIM]
    query_norm: tl.tensor,  # None, or [HEAD_DIM]
    key_norm: tl.tensor,  # None, or [HEAD_DIM]
    num_tokens: int,
    eps: float,
    output_token_stride: int,
    output_head_stride: int,
    key_output_token_stride: int,
    key_output_head_stride: int,
    block_stride: int,
    kind_stride: int,
    head_stride: int,
    query_token_stride: int,
    query_head_stride: int,
    key_token_stride: int,
    key_head_stride: int,
    value_token_stride: int,
    value_head_stride: int,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * TOKENS
    # Asked for before anything is written, so that a program waits for all of it at once; angles and norms are in the cache.
    query_row = tl.arange(0, TOKENS * PADDED_GROUP)
    query_token = begin + query_row // PADDED_GROUP
    in_group = query_row % PADDED_GROUP
    is_query = (in_group < GROUP) & (query_token < num_tokens)
    query_head = kv_head * GROUP + in_group
    query_source = query + query_token * query_token_stride + query_head * query_head_stride
    query_first, query_second = _load_halves(query_source, is_query, ROTARY_DIM, PADDED_HALF)

    token = begin + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    key_source = key + token * key_token_stride + kv_head * key_head_stride
    key_first, key_second = _load_halves(key_source, is_token, ROTARY_DIM, PADDED_HALF)
    value_source = value + token * value_token_stride + kv_head * value_head_stride
    value_first, value_second = _load_halves(value_source, is_token, ROTARY_DIM, PADDED_HALF)
    slot = tl.load(slot_mapping + token, mask=is_token, other=-1).to(tl.int64)
    query_position = tl.load(positions + query_token, mask=is_query, other=0).to(tl.int64)
    position = tl.load(positions + token, mask=is_token, other=0).to(tl.int64)

    _rotate(
        output + query_token * output_token_stride + query_head * output_head_stride, is_query, None,
        query_source, is_query, query_first, query_second, query_norm, cos_sin + query_position * ROTARY_DIM, eps,
        HEAD_DIM, ROTARY_DIM, PADDED_HALF, PADDED_REST,
    )  # fmt: skip
    has_slot = slot >= 0
    target = kv_cache + slot // BLOCK_SIZE * block_stride + kv_head * head_stride + slot % BLOCK_SIZE * HEAD_DIM
    also = None if key_output is None else key_output + token * key_output_token_stride + kv_head * key_output_head_stride
    _rotate(
        target, has_slot, also,
        key_source, is_token, key_first, key_second, key_norm, cos_sin + position * ROTARY_DIM, eps,
        HEAD_DIM, ROTARY_DIM, PADDED_HALF, PADDED_REST,
    )  # fmt: skip
    half = tl.arange(0, PADDED_HALF)[None, :]
    is_half = has_slot[:, None] & (half < ROTARY_DIM // 2)
    value_target = (target + kind_stride)[:, None]
    tl.store(value_target + half, value_first, mask=is_half)
    tl.store(value_target + ROTARY_DIM // 2 + half, value_second, mask=is_half)
    if PADDED_REST > 0:
        rest = ROTARY_DIM + tl.arange(0, PADDED_REST)[None, :]
        is_rest = has_slot[:, None] & (rest < HEAD_DIM)
        tl.store(value_target + rest, tl.load(value_source[:, None] + rest, mask=is_rest), mask=is_rest)


@triton.jit
def _load_halves(
    source: tl.tensor,  # [rows] pointers
    is_row: tl.tensor,  # [rows]
    ROTARY_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    half = tl.arange(0, PADDED_HALF)[None, :]
    is_number = is_row[:, None] & (half < ROTARY_DIM // 2)
    first = tl.load(source[:, None] + half, mask=is_number, other=0.0)
    return first, tl.load(source[:, None] + ROTARY_DIM // 2 + half, mask=is_number, other=0.0)


@triton.jit
def _rotate(
    target: tl.tensor,  # [rows] pointers
    is_target: tl.tensor,  # [rows]; of is_row those that have a target
    also: tl.tensor,  # None, or [rows] pointers: where the result of every row goes as well
    source: tl.tensor,  # [rows] pointers to all dims; what is not rotated is read here
    is_row: tl.tensor,  # [rows]
    first: tl.tensor,  # [rows, PADDED_HALF]
    second: tl.tensor,  # [rows, PADDED_HALF]
    norm: tl.tensor,  # None, or [HEAD_DIM]
    angles: tl.tensor,  # [rows] pointers to cosines and sines
    eps: float,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
) -> None:
    half = tl.arange(0, PADDED_HALF)[None, :]
    is_half = half < ROTARY_DIM // 2
    cos = tl.load(angles[:, None] + half, mask=is_half, other=0.0)
    sin = tl.load(angles[:, None] + ROTARY_DIM // 2 + half, mask=is_half, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if PADDED_REST > 0:
        rest = ROTARY_DIM + tl.arange(0, PADDED_REST)[None, :]
        is_rest = rest < HEAD_DIM
        others = tl.load(source[:, None] + rest, mask=is_row[:, None] & is_rest, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if PADDED_REST > 0:
            squares += tl.sum(others * others, 1)
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = first * factor * tl.load(norm + half, mask=is_half, other=0.0).to(tl.float32)
        second = second * factor * tl.load(norm + ROTARY_DIM // 2 + half, mask=is_half, other=0.0).to(tl.float32)
        if PADDED_REST > 0:
            others = others * factor * tl.load(norm + rest, mask=is_rest, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    turned, other_turned = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
    _store_halves(target, is_target, turned, other_turned, ROTARY_DIM, PADDED_HALF)
    if PADDED_REST > 0:
        tl.store(target[:, None] + rest, others.to(dtype), mask=is_target[:, None] & is_rest)
    if also is not None:
        _store_halves(also, is_row, turned, other_turned, ROTARY_DIM, PADDED_HALF)
        if PADDED_REST > 0:
            tl.store(also[:, None] + rest, others.to(dtype), mask=is_row[:, None] & is_rest)


@triton.jit
def _store_halves(
    target: tl.tensor,  # [rows] pointers
    is_row: tl.tensor,  # [rows]
    first: tl.tensor,  # [rows, PADDED_HALF]
    second: tl.tensor,  # [rows, PADDED_HALF]
    ROTARY_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> None:
    half = tl.arange(0, PADDED_HALF)[None, :]
    is_number = is_row[:, None] & (half < ROTARY_DIM // 2)
    tl.store(target[:, None] + half, first, mask=is_number)
    tl.store(target[:, None] + ROTARY_DIM // 2 + half, second, mask=is_number)


def rotary_table(frequencies: Tensor, *, max_positions: int, scaling: float = 1.0) -> Tensor:
    """cos and sin of every position's angles, times `scaling` (of models with long-context scaling).

    frequencies: [rotary_dim / 2] float32, radians per token (transformers' inv_freq)
    result:      [max_positions, rotary_dim] float32, cosines then sines
    """
    angles = torch.arange(max_positions, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies.float()
    return torch.cat((angles.cos(), angles.sin()), dim=1) * scaling


def rotary_store_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    output: Tensor,
    key_output: Tensor | None = None,
) -> None:
    """The same, step by step."""
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    turned_key = _rotated(key, key_norm, cos, sin, eps)
    output.copy_(_rotated(query, query_norm, cos, sin, eps))
    store_kv_reference(turned_key, value, kv_cache, slot_mapping)
    if key_output is not None:
        key_output.copy_(turned_key)


def _rotated(heads: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Heads [num_tokens, num_heads, head_dim], normed if told and turned by cos and sin, [num_tokens, 1, rotary_dim / 2]."""
    numbers = heads.float()
    if norm is not None:
        numbers = numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + eps) * norm.float()
    rotary_dim = 2 * cos.shape[-1]
    first, second = numbers[..., :rotary_dim].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, numbers[..., rotary_dim:])
    return torch.cat(turned, dim=-1).to(heads.dtype)
