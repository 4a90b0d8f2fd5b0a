"""Choosing each row's next token: temperature, top-k, top-p, min-p, typical-p, then Gumbel-max with noise that scheduling cannot change."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quire.kernels.philox import philox, philox_reference, words_of

# Noise rows start at multiples of 64 floats, so that vectorised log sees a row at the same alignment in every batch.
_ROW_COUNTERS: Final = 16


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """How each row of logits is sampled; tensors of [num_rows]."""

    temperature: Tensor  # float32; 0 takes the most likely token
    top_k: Tensor  # int64; 0 keeps all
    top_p: Tensor  # float64, so that 1 - top_p rounds to float32 once; 1 keeps all
    min_p: Tensor  # float32; 0 keeps all
    typical_p: Tensor  # float32; 1 keeps all
    seed: Tensor  # int64, the bits of the unsigned seed
    sequence_index: Tensor  # int64
    position: Tensor  # int64; the place in the sequence that the drawn token takes


def sample(logits: Tensor, inputs: SamplingInputs, *, purpose: int) -> Tensor:
    """One token id per row.

    logits:  [num_rows, vocab_size] float32; -inf marks forbidden tokens
    purpose: DrawPurpose; target and draft draws of one position differ
    result:  [num_rows] int64

    The filters mean what transformers' warpers of the same names mean, in the same order. A row's token depends on that row
    alone. Rows that `broken_rows` names get any id.
    """
    token_ids = logits.argmax(dim=-1)
    random_rows = inputs.temperature.nonzero()[:, 0]  # greedy rows need no noise
    if random_rows.numel() == 0:
        return token_ids
    picked = SamplingInputs(*(getattr(inputs, name)[random_rows] for name in SamplingInputs.__slots__))
    scores = logits[random_rows]
    # Taking the maximum away first changes no probability and keeps a tiny temperature from overflowing.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / picked.temperature[:, None]
    scores = filter_top_k_top_p(scores, top_k=picked.top_k, top_p=picked.top_p)
    scores = filter_min_p(scores, min_p=picked.min_p)
    scores = filter_typical_p(scores, typical_p=picked.typical_p)
    token_ids[random_rows] = (scores + gumbel_noise(logits.shape[-1], picked, purpose=purpose)).argmax(dim=-1)
    return token_ids


def broken_rows(logits: Tensor) -> Tensor:
    """Which rows cannot be sampled: they hold NaN or +inf, or nothing but -inf.

    logits: [num_rows, vocab_size]; result: [num_rows] bool
    """
    return ~logits.amax(dim=-1).isfinite()  # NaN wins a maximum


def filter_top_k_top_p(scores: Tensor, *, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Forbid what is below the k-th largest score, then the least likely tail whose probabilities sum to at most 1 - top_p.

    scores: [num_rows, vocab_size] float32; top_k: [num_rows] int64, 0 keeps all; top_p: [num_rows] float64, 1 keeps all
    """
    rows = ((top_k > 0) | (top_p < 1)).nonzero()[:, 0]
    if rows.numel() == 0:
        return scores
    vocab_size = scores.shape[-1]
    top_k, top_p = top_k[rows], top_p[rows]
    ascending, order = scores[rows].sort(dim=-1, stable=True)
    kept = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    kth_largest = ascending.gather(1, (vocab_size - kept)[:, None])
    ascending = ascending.masked_fill(ascending < kth_largest, float("-inf"))
    # A sum is never at most -1: rows without top_p lose nothing, not even what rounds to probability 0.
    tail = torch.where(top_p < 1, 1 - top_p, -1.0).float()
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= tail[:, None]
    removed[:, -1] = False
    ascending = ascending.masked_fill(removed, float("-inf"))
    filtered = scores.clone()
    filtered[rows] = torch.empty_like(ascending).scatter_(1, order, ascending)
    return filtered


def filter_min_p(scores: Tensor, *, min_p: Tensor) -> Tensor:
    """Forbid tokens less likely than min_p times the most likely one.

    scores: [num_rows, vocab_size] float32; min_p: [num_rows] float32, 0 keeps all
    """
    if not bool((min_p > 0).any()):
        return scores
    probabilities = scores.softmax(dim=-1)
    least = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < least, float("-inf"))


def filter_typical_p(scores: Tensor, *, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, until they make up typical_p of the probability.

    scores: [num_rows, vocab_size] float32; typical_p: [num_rows] float32, 1 keeps all
    """
    rows = (typical_p < 1).nonzero()[:, 0]
    if rows.numel() == 0:
        return scores
    picked = scores[rows]
    surprise = -picked.log_softmax(dim=-1)
    probabilities = picked.softmax(dim=-1)
    # A forbidden token's part is 0 * inf. A running sum adds in the same order whatever the batch, which sum() does not promise.
    parts = torch.where(probabilities > 0, surprise * probabilities, 0.0)
    distance = (surprise - parts.cumsum(dim=-1)[:, -1:]).abs()
    ascending, order = distance.sort(dim=-1, stable=True)
    mass = picked.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (mass < typical_p[rows, None]).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    filtered = scores.clone()
    filtered[rows] = picked.masked_fill(distance > ascending.gather(1, last), float("-inf"))
    return filtered


def gumbel_noise(vocab_size: int, inputs: SamplingInputs, *, purpose: int) -> Tensor:
    """Gumbel noise of every token of every row: [num_rows, vocab_size] float32, finite.

    Key: the row's seed. Counter: (token id >> 2, position, sequence_index, purpose); word (token id & 3) is the token's.
    So a shard of the vocabulary can compute its own part, and neither the batch nor the step changes it.

    The upper 23 bits of the word make u: (bits + 0.5) / 2**23 is exact in float32 and stays inside (0, 1). With 24 bits the
    largest would round to u = 1, whose noise is infinite: once in 2**24 words, any token would win against all others.
    """
    num_counters = -(-vocab_size // (4 * _ROW_COUNTERS)) * _ROW_COUNTERS
    word_index = torch.arange(num_counters, dtype=torch.int64, device=inputs.seed.device)
    seed_low, seed_high = words_of(inputs.seed[:, None])
    words = philox(
        (word_index[None], inputs.position[:, None], inputs.sequence_index[:, None], torch.full_like(word_index[None], purpose)),
        (seed_low, seed_high),
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1) >> 9
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-23
    return -(-uniform.log()).log()[:, :vocab_size]


def gumbel_noise_reference(token_id: int, *, seed: int, position: int, sequence_index: int, purpose: int) -> Tensor:
    """The noise of one token, from the unsigned seed: a float32 scalar."""
    words = philox_reference((token_id >> 2, position, sequence_index, purpose), (seed & 0xFFFFFFFF, seed >> 32))
    uniform = torch.tensor((words[token_id & 3] >> 9) + 0.5, dtype=torch.float32) * 2.0**-23
    return -(-uniform.log()).log()
