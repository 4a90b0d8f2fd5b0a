"""Causal attention of a whole prompt to itself, over dense keys and values: what paging does not need yet is quicker without it."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN plans each size anew, which takes longer than the attention: prompts are padded to sizes that were planned before. Below
# the smallest its advantage is gone (NVIDIA H200, 2026-11-25, 32/8 heads of 128: 414 against 363 TFLOP/s at 2048, 603 against
# 444 at 8192, and padding costs its square).
SIZE_STEP: Final = 512
MIN_TOKENS: Final = 2560


def padded_size(num_tokens: int) -> int:
    """The size at which a prompt of so many tokens is computed."""
    return -(-num_tokens // SIZE_STEP) * SIZE_STEP


def is_supported(*, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuDNN has a kernel for such heads here."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 128 and head_dim % 8 == 0


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention in which token i sees tokens 0 to i.

    query:      [num_tokens, num_heads, head_dim], any strides but the last; num_heads is a multiple of num_kv_heads
    key, value: [num_tokens, num_kv_heads, head_dim]; finite in all tokens, those of padding included
    result:     [num_tokens, num_heads, head_dim]
    """
    if not query.is_cuda:
        return dense_attention_reference(query, key, value, scale=scale)
    query, key, value = (part[None].transpose(1, 2) for part in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def dense_attention_reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """The same in float32, step by step."""
    group = query.shape[1] // key.shape[1]
    queries = query.float().transpose(0, 1)
    keys, values = (part.float().transpose(0, 1).repeat_interleave(group, dim=0) for part in (key, value))
    scores = queries @ keys.transpose(1, 2) * scale
    is_ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(is_ahead, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(0, 1).to(query.dtype)
