"""Choosing each row's next token: temperature, top-k, top-p, min-p, typical-p, then Gumbel-max with noise that scheduling cannot change."""

from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
from torch import Tensor

from quire.kernels.all_reduce import meet
from quire.kernels.backend import num_multiprocessors, runs_triton
from quire.kernels.philox import philox, philox_reference, words_of
from quire.kernels.sample_kernels import draw_kernel, judge_kernel
from quire.kernels.vocab_shards import MIN_TOKENS_PER_PROGRAM, DrawBuffers, VocabShards, group_tokens

# Noise rows start at multiples of 64 floats, so that vectorised log sees a row at the same alignment in every batch.
_ROW_COUNTERS: Final = 16
# Tokens of one turn of each launch's loops. All groups of a row stay in the registers of the second launch, beside a turn's
# tokens; twice as many of either spill (sm_90).
_DRAW_TILE: Final = 1024
_TURN_TOKENS: Final = 2048
# Rows of a top-k up to this draw noise for their k tokens alone, in the second launch; noise is what costs.
_MAX_LATE_TOP_K: Final = 1024
# How many thresholds one reading counts for, and how many readings halve distances before they halve bit patterns.
_NUM_PIVOTS: Final = 4
_NUM_VALUE_READINGS: Final = 5


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """How each row of logits is sampled: its place, and columns of [max_rows] with an entry for each place.

    Whole numbers are int64, others float64, with strides of 1. Kernels read through `rows`, so that a launch whose arguments
    never change, as in a CUDA graph, serves whatever batch comes.
    """

    rows: Tensor  # [num_rows] int64, the place of each row of logits in the columns; -1 is padding
    temperature: Tensor  # 0 takes the most likely token; rounded to float32 before it is used
    top_k: Tensor  # int64; 0 keeps all
    top_p: Tensor  # 1 keeps all; 1 - top_p is rounded to float32 once
    min_p: Tensor  # 0 keeps all; rounded to float32 before it is used
    typical_p: Tensor  # 1 keeps all; rounded to float32 before it is used
    seed: Tensor  # int64, the bits of the unsigned seed
    sequence_index: Tensor  # int64
    position: Tensor  # int64; the place in the sequence that the drawn token takes


def sample(
    logits: Tensor,
    inputs: SamplingInputs,
    *,
    purpose: int,
    has_typical: bool = False,
    token_ids: Tensor | None = None,
    broken: Tensor | None = None,
    shards: VocabShards | None = None,
) -> Tensor:
    """One token id per row.

    logits:      [num_rows, vocab_size] float32, bfloat16 or float16, last dim contiguous; -inf marks forbidden tokens
    purpose:     DrawPurpose; target and draft draws of one position differ
    has_typical: whether any row has a typical_p below 1: it has no kernel, so all rows take the reference, which waits for the
                 device. Otherwise a GPU is never waited for, and the launches can be captured in a CUDA graph
    token_ids:   [num_rows] int64, filled and returned if given
    broken:      [num_rows] bool, filled with what `broken_rows` says; padding is not broken
    shards:      given, the ranks of a group draw together: `logits` are the first rows of `shards.logits`, and all ranks call this with
                 the same inputs. Each draws from its own part; what they read of each other is a candidate a row, and of rows with
                 filters the tokens that these cannot rule out. For devices with kernels, and not with has_typical
    result:      [num_rows] int64; 0 for broken rows and padding; the same on all ranks

    The filters mean what transformers' warpers of the same names mean, in the same order. A row's token depends on that row
    alone. The GPU draws with the same integers and takes the same token, but where two scores are closer than float32 rounding.
    """
    if token_ids is None:
        token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if runs_triton(logits) and not has_typical:
        _sample_without_sorting(logits, inputs, purpose=purpose, token_ids=token_ids, broken=broken, shards=shards)
    else:
        assert shards is None, "parts of a vocabulary are drawn from by kernels"
        token_ids.copy_(sample_reference(logits, inputs, purpose=purpose, broken=broken))
    return token_ids


def sample_reference(logits: Tensor, inputs: SamplingInputs, *, purpose: int, broken: Tensor | None = None) -> Tensor:
    """The same, with a sort, by the filters one after the other."""
    is_padding = inputs.rows < 0
    is_broken = broken_rows(logits) & ~is_padding
    if broken is not None:
        broken.copy_(is_broken)
    token_ids = logits.argmax(dim=-1).masked_fill(is_broken | is_padding, 0)
    temperature = inputs.temperature[inputs.rows.clamp(min=0)].float()
    random_rows = ((temperature != 0) & ~is_broken & ~is_padding).nonzero()[:, 0]  # greedy rows need no noise
    if random_rows.numel() == 0:
        return token_ids
    rows = inputs.rows[random_rows]
    scores = logits[random_rows].float()
    # Taking the maximum away first changes no probability and keeps a tiny temperature from overflowing.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[random_rows, None]
    scores = filter_top_k_top_p(scores, top_k=inputs.top_k[rows], top_p=inputs.top_p[rows])
    scores = filter_min_p(scores, min_p=inputs.min_p[rows])
    scores = filter_typical_p(scores, typical_p=inputs.typical_p[rows])
    noise = gumbel_noise(logits.shape[-1], replace(inputs, rows=rows), purpose=purpose)
    token_ids[random_rows] = (scores + noise).argmax(dim=-1)
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

    scores: [num_rows, vocab_size] float32; min_p: [num_rows], 0 keeps all; rounded to float32
    """
    if not bool((min_p > 0).any()):
        return scores
    probabilities = scores.softmax(dim=-1)
    least = min_p[:, None].float() * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < least, float("-inf"))


def filter_typical_p(scores: Tensor, *, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, until they make up typical_p of the probability.

    scores: [num_rows, vocab_size] float32; typical_p: [num_rows], 1 keeps all; rounded to float32
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
    last = (mass < typical_p[rows, None].float()).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
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
    rows = inputs.rows.clamp(min=0)[:, None]
    counter = (word_index[None], inputs.position[rows], inputs.sequence_index[rows], torch.full_like(word_index[None], purpose))
    words = philox(counter, words_of(inputs.seed[rows]))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1) >> 9
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-23
    return -(-uniform.log()).log()[:, :vocab_size]


def gumbel_noise_reference(token_id: int, *, seed: int, position: int, sequence_index: int, purpose: int) -> Tensor:
    """The noise of one token, from the unsigned seed: a float32 scalar."""
    words = philox_reference((token_id >> 2, position, sequence_index, purpose), (seed & 0xFFFFFFFF, seed >> 32))
    uniform = torch.tensor((words[token_id & 3] >> 9) + 0.5, dtype=torch.float32) * 2.0**-23
    return -(-uniform.log()).log()


def _sample_without_sorting(
    logits: Tensor, inputs: SamplingInputs, *, purpose: int, token_ids: Tensor, broken: Tensor | None, shards: VocabShards | None
) -> None:
    """Gumbel-max over all tokens first; the filters then only judge the winner, and the next best one if they refuse it.

    What the filters keep is closed upwards: if a token is refused, so is every less likely one. So the draw goes on among the
    tokens above it, and the first winner that is kept is the winner among the kept.

    The first launch reads the row and keeps the largest logit and the best score of each group of tokens. The second reads the
    groups alone that these cannot rule out: the k-th largest of the largest bounds the k-th largest logit from below, tokens above
    a winner are in groups whose largest reaches it, and what wins after it is in the groups with the best scores, but where a
    refused token has one of those. Rows of a small top-k draw for the first time in the second launch.

    Of a group of ranks each makes the first launch over its part, they meet, and each makes the second over all parts.
    """
    num_rows, own_width = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    size = 1 if shards is None else shards.peers.size
    vocab_size = own_width if shards is None else shards.vocab_size
    width = own_width if shards is None else shards.width
    assert vocab_size < 255 * _TURN_TOKENS, vocab_size
    assert shards is None or logits.data_ptr() == shards.logits.data_ptr(), "other ranks read them where they are"
    wanted = max(1, 4 * num_multiprocessors(logits.device) // max(1, num_rows))
    num_programs = triton.next_power_of_2(min(wanted, triton.cdiv(width, MIN_TOKENS_PER_PROGRAM)))
    program_tokens = triton.cdiv(triton.cdiv(width, num_programs), _DRAW_TILE) * _DRAW_TILE
    group = group_tokens(vocab_size, size)
    num_groups_of_rank = triton.cdiv(width, group)
    num_groups = triton.cdiv(vocab_size, group)
    if shards is None:
        found = DrawBuffers.new(num_rows, num_programs=num_programs, num_groups=num_groups, device=logits.device)
    else:
        found = shards.buffers(num_rows, num_programs=num_programs, num_groups=num_groups_of_rank)
    listed = torch.empty((num_rows, num_groups), dtype=torch.int32, device=logits.device)
    settings = (inputs.rows, inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
    key = (inputs.seed, inputs.sequence_index, inputs.position)
    draw_kernel[(num_programs, num_rows)](
        found.scores,
        found.ids,
        found.groups,
        logits,
        *settings,
        *key,
        num_rows,
        vocab_size,
        0 if shards is None else shards.first,
        own_width,
        num_groups_of_rank,
        logits.stride(0),
        program_tokens,
        purpose,
        TILE=_DRAW_TILE,
        GROUP=group,
        MAX_LATE_TOP_K=_MAX_LATE_TOP_K,
        num_warps=4,
    )
    if shards is not None:
        meet(shards.peers)
    judge_kernel[(num_rows,)](
        token_ids,
        broken,
        found.scores,
        found.ids,
        found.groups,
        listed,
        logits,
        *settings,
        *key,
        None if shards is None else shards.peers.areas,
        0 if shards is None else shards.peers.rank,
        num_rows,
        vocab_size,
        num_groups,
        logits.stride(0),
        purpose,
        SIZE=size,
        WIDTH=0 if shards is None else width,
        PROGRAMS_OF_RANK=num_programs,
        PROGRAMS=triton.next_power_of_2(size * num_programs),
        GROUP=group,
        GROUPS=triton.next_power_of_2(num_groups),
        GROUPS_OF_TURN=_TURN_TOKENS // group,
        NUM_PIVOTS=_NUM_PIVOTS,
        NUM_VALUE_READINGS=_NUM_VALUE_READINGS,
        MAX_LATE_TOP_K=_MAX_LATE_TOP_K,
        num_warps=16,  # of one program a row: bound by its instructions, it wants all schedulers busy
    )
