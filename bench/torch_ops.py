"""The operations around attention as one writes them with torch alone: what our kernels are measured against.

Any device. None waits for the GPU, so that all can be captured into a CUDA graph.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_rms_norm(hidden: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> Tensor:
    """Add to the residual in place, give its norm."""
    residual.add_(hidden)
    return F.rms_norm(residual, (hidden.shape[-1],), weight, eps)


def torch_silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def torch_rotary_store(
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
) -> Tensor:
    """As models of transformers do it, in the model's number format; shapes as for kernels/rotary_store.py, without padding."""
    cos, sin = (part[:, None].to(query.dtype) for part in cos_sin[positions].chunk(2, dim=1))

    def rotated(heads: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            heads = F.rms_norm(heads, (heads.shape[-1],), norm, eps)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    torch_store_kv(rotated(key, key_norm), value, kv_cache, slot_mapping)
    return rotated(query, query_norm)


def torch_store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Shapes as for kernels/store_kv.py, without padding."""
    block_size = kv_cache.shape[3]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[:, 0][block_ids, :, offsets] = key
    kv_cache[:, 1][block_ids, :, offsets] = value


def torch_copy_blocks(blocks: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    blocks.index_copy_(0, target_ids, blocks.index_select(0, source_ids))


def torch_sample(logits: Tensor, options: Mapping[str, float]) -> Tensor:
    """One token per row. options: temperature (0 is greedy), top_k, top_p, min_p, the same for all rows; what is missing is off."""
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits / temperature
    if "top_k" in options or "top_p" in options:
        ascending, order = scores.sort(dim=-1)
        if "top_k" in options:
            ascending = ascending.masked_fill(ascending < ascending[:, -int(options["top_k"]), None], float("-inf"))
        if "top_p" in options:
            removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options["top_p"]
            removed[:, -1] = False
            ascending = ascending.masked_fill(removed, float("-inf"))
        scores = torch.empty_like(ascending).scatter_(1, order, ascending)
    probabilities = scores.softmax(dim=-1)
    if "min_p" in options:
        least = options["min_p"] * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    # The largest of probability by exponential noise is a draw; torch.multinomial would wait for the GPU.
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)
