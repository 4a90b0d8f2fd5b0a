"""Choosing each row's next token: temperature, top-k, top-p, min-p, typical-p, then Gumbel-max with noise that scheduling cannot change."""

from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import num_multiprocessors, runs_triton
from quire.kernels.philox import philox, philox_reference, words_of

# Noise rows start at multiples of 64 floats, so that vectorised log sees a row at the same alignment in every batch.
_ROW_COUNTERS: Final = 16
# Tokens of one turn of the loops, and the fewest that are worth a program of their own.
_DRAW_TILE: Final = 1024
_MIN_TOKENS_PER_PROGRAM: Final = 8192
# The first launch keeps the largest logit and the best score of groups of tokens, no smaller than a cache line of float32. All
# groups of a row stay in the registers of the second launch, beside a turn's tokens; twice as many of either spill (sm_90).
_MIN_GROUP: Final = 32
_MAX_GROUPS: Final = 4096
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
) -> Tensor:
    """One token id per row.

    logits:      [num_rows, vocab_size] float32, bfloat16 or float16, last dim contiguous; -inf marks forbidden tokens
    purpose:     DrawPurpose; target and draft draws of one position differ
    has_typical: whether any row has a typical_p below 1: it has no kernel, so all rows take the reference, which waits for the
                 device. Otherwise a GPU is never waited for, and the launches can be captured in a CUDA graph
    token_ids:   [num_rows] int64, filled and returned if given
    broken:      [num_rows] bool, filled with what `broken_rows` says; padding is not broken
    result:      [num_rows] int64; 0 for broken rows and padding

    The filters mean what transformers' warpers of the same names mean, in the same order. A row's token depends on that row
    alone. The GPU draws with the same integers and takes the same token, but where two scores are closer than float32 rounding.
    """
    if token_ids is None:
        token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if runs_triton(logits) and not has_typical:
        _sample_without_sorting(logits, inputs, purpose=purpose, token_ids=token_ids, broken=broken)
    else:
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


def _sample_without_sorting(logits: Tensor, inputs: SamplingInputs, *, purpose: int, token_ids: Tensor, broken: Tensor | None) -> None:
    """Gumbel-max over all tokens first; the filters then only judge the winner, and the next best one if they refuse it.

    What the filters keep is closed upwards: if a token is refused, so is every less likely one. So the draw goes on among the
    tokens above it, and the first winner that is kept is the winner among the kept.

    The first launch reads the row and keeps the largest logit and the best score of each group of tokens. The second reads the
    groups alone that these cannot rule out: the k-th largest of the largest bounds the k-th largest logit from below, tokens above
    a winner are in groups whose largest reaches it, and what wins after it is in the groups with the best scores, but where a
    refused token has one of those. Rows of a small top-k draw for the first time in the second launch.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    assert vocab_size < 255 * _TURN_TOKENS, vocab_size
    wanted = max(1, 4 * num_multiprocessors(logits.device) // max(1, num_rows))
    num_programs = triton.next_power_of_2(min(wanted, triton.cdiv(vocab_size, _MIN_TOKENS_PER_PROGRAM)))
    program_tokens = triton.cdiv(triton.cdiv(vocab_size, num_programs), _DRAW_TILE) * _DRAW_TILE
    group_tokens = max(_MIN_GROUP, triton.next_power_of_2(triton.cdiv(vocab_size, _MAX_GROUPS)))
    num_groups = triton.cdiv(vocab_size, group_tokens)
    best_scores = torch.empty((4, num_rows, num_programs), dtype=torch.float32, device=logits.device)
    best_ids = torch.empty((num_rows, num_programs), dtype=torch.int32, device=logits.device)
    of_groups = torch.empty((2, num_rows, num_groups), dtype=torch.float32, device=logits.device)
    listed = torch.empty((num_rows, num_groups), dtype=torch.int32, device=logits.device)
    settings = (inputs.rows, inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
    key = (inputs.seed, inputs.sequence_index, inputs.position)
    _draw_kernel[(num_programs, num_rows)](
        best_scores,
        best_ids,
        of_groups,
        logits,
        *settings,
        *key,
        num_rows,
        vocab_size,
        num_groups,
        logits.stride(0),
        program_tokens,
        purpose,
        TILE=_DRAW_TILE,
        GROUP=group_tokens,
        MAX_LATE_TOP_K=_MAX_LATE_TOP_K,
        num_warps=4,
    )
    _judge_kernel[(num_rows,)](
        token_ids,
        broken,
        best_scores,
        best_ids,
        of_groups,
        listed,
        logits,
        *settings,
        *key,
        num_rows,
        vocab_size,
        num_groups,
        logits.stride(0),
        purpose,
        PROGRAMS=num_programs,
        GROUP=group_tokens,
        GROUPS=triton.next_power_of_2(num_groups),
        GROUPS_OF_TURN=_TURN_TOKENS // group_tokens,
        NUM_PIVOTS=_NUM_PIVOTS,
        NUM_VALUE_READINGS=_NUM_VALUE_READINGS,
        MAX_LATE_TOP_K=_MAX_LATE_TOP_K,
        num_warps=16,  # of one program a row: bound by its instructions, it wants all schedulers busy
    )


@triton.jit(do_not_specialize=["num_rows"])
def _draw_kernel(
    best_scores: tl.tensor,  # [4, num_rows, num_programs]: best score, largest logit (inf if one is NaN), smallest above -inf, mass
    best_ids: tl.tensor,  # [num_rows, num_programs]
    of_groups: tl.tensor,  # [2, num_rows, num_groups]: largest logit, of rows with filters; best score, of those without top-k
    logits: tl.tensor,  # [num_rows, vocab_size]
    rows: tl.tensor,  # [num_rows]
    temperature: tl.tensor,  # [max_rows] float64
    top_k: tl.tensor,  # [max_rows]
    top_p: tl.tensor,  # [max_rows] float64
    min_p: tl.tensor,  # [max_rows] float64
    seed: tl.tensor,  # [max_rows]
    sequence_index: tl.tensor,  # [max_rows]
    position: tl.tensor,  # [max_rows]
    num_rows: int,
    vocab_size: int,
    num_groups: int,
    logits_stride: int,
    program_tokens: int,
    purpose: int,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_LATE_TOP_K: tl.constexpr,
) -> None:
    """The best token of a part of each row, unfiltered, and what the filters need to know of the part.

    The mass is the sum of exp((logit - largest) / temperature), `largest` being the part's; of rows with top-p and without top-k.
    """
    row = tl.program_id(1).to(tl.int64)
    at = tl.load(rows + row)
    if at < 0:
        return
    heat = tl.load(temperature + at).to(tl.float32)
    most = tl.load(top_k + at)
    has_top_k = (most > 0) & (most < vocab_size)
    draws_here = (heat > 0.0) & ((not has_top_k) | (most > MAX_LATE_TOP_K))
    has_top_p = tl.load(top_p + at) < 1.0
    has_filters = (heat > 0.0) & (has_top_k | has_top_p | (tl.load(min_p + at) > 0.0))
    needs_mass = (heat > 0.0) & has_top_p & (not has_top_k)
    row_seed = tl.load(seed + at)
    row_position = tl.load(position + at)
    row_index = tl.load(sequence_index + at)
    begin = tl.program_id(0) * program_tokens
    end = tl.minimum(begin + program_tokens, vocab_size)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_id = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    smallest = tl.full([TILE], float("inf"), tl.float32)
    peak = tl.full([TILE], -3.0e38, tl.float32)  # finite, so that a difference to -inf is not NaN
    mass = tl.zeros([TILE], tl.float32)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        logit = tl.load(logits + row * logits_stride + token, mask=token < end, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.where(logit == logit, logit, float("inf")))
        logit = tl.where(logit == logit, logit, float("-inf"))
        smallest = tl.minimum(smallest, tl.where(logit == float("-inf"), float("inf"), logit))
        score = logit
        if draws_here:
            counter = first // 4 + tl.arange(0, TILE // 4)
            score = logit + heat * _noise(counter, row_seed, row_position, row_index, purpose)
        is_better = score > best
        best = tl.where(is_better, score, best)
        best_id = tl.where(is_better, token, best_id)
        if has_filters:
            group = first // GROUP + tl.arange(0, TILE // GROUP)
            place = of_groups + row * num_groups + group
            tl.store(place, tl.max(tl.reshape(logit, [TILE // GROUP, GROUP]), 1), mask=group < num_groups)
            if not has_top_k:
                place = of_groups + (row + num_rows) * num_groups + group
                tl.store(place, tl.max(tl.reshape(score, [TILE // GROUP, GROUP]), 1), mask=group < num_groups)
        if needs_mass:
            change = tl.exp(-tl.abs(logit - peak) / heat)
            mass = tl.where(logit > peak, mass * change + 1.0, mass + change)
            peak = tl.maximum(logit, peak)
    place = row * tl.num_programs(0) + tl.program_id(0)
    score = tl.max(best, 0)
    tl.store(best_scores + place, score)
    tl.store(best_ids + place, tl.min(tl.where(best == score, best_id, 0x7FFFFFFF), 0))
    tl.store(best_scores + num_rows * tl.num_programs(0) + place, tl.max(largest, 0))
    tl.store(best_scores + 2 * num_rows * tl.num_programs(0) + place, tl.min(smallest, 0))
    if needs_mass:
        mass_of_part = tl.sum(mass * tl.exp((peak - tl.max(peak, 0)) / heat), 0)
        tl.store(best_scores + 3 * num_rows * tl.num_programs(0) + place, mass_of_part)


@triton.jit(do_not_specialize=["num_rows"])
def _judge_kernel(
    token_ids: tl.tensor,  # [num_rows]
    broken: tl.tensor,  # None, or [num_rows]
    best_scores: tl.tensor,  # [4, num_rows, PROGRAMS]
    best_ids: tl.tensor,  # [num_rows, PROGRAMS]
    of_groups: tl.tensor,  # [2, num_rows, num_groups]
    listed: tl.tensor,  # [num_rows, num_groups], scratch
    logits: tl.tensor,  # [num_rows, vocab_size]
    rows: tl.tensor,  # [num_rows]
    temperature: tl.tensor,  # [max_rows] float64
    top_k: tl.tensor,  # [max_rows]
    top_p: tl.tensor,  # [max_rows] float64
    min_p: tl.tensor,  # [max_rows] float64
    seed: tl.tensor,  # [max_rows]
    sequence_index: tl.tensor,  # [max_rows]
    position: tl.tensor,  # [max_rows]
    num_rows: int,
    vocab_size: int,
    num_groups: int,
    logits_stride: int,
    purpose: int,
    PROGRAMS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_OF_TURN: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    NUM_VALUE_READINGS: tl.constexpr,
    MAX_LATE_TOP_K: tl.constexpr,
) -> None:
    """The best token of each row that the row's filters keep."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(rows + row)
    if at < 0:
        tl.store(token_ids + row, 0)
        if broken is not None:
            tl.store(broken + row, False)
        return
    place = row * PROGRAMS + tl.arange(0, PROGRAMS)
    scores = tl.load(best_scores + place)
    score = tl.max(scores, 0)
    token_id = tl.min(tl.where(scores == score, tl.load(best_ids + place), 0x7FFFFFFF), 0)
    heat = tl.load(temperature + at).to(tl.float32)
    most = tl.load(top_k + at)
    mass = tl.load(top_p + at)
    least = tl.load(min_p + at).to(tl.float32)
    peaks_of_programs = tl.load(best_scores + num_rows * PROGRAMS + place)
    largest = tl.max(peaks_of_programs, 0)
    is_broken = (largest == float("inf")) | (largest == float("-inf"))
    token_id = tl.where(is_broken, 0, token_id)
    if broken is not None:
        tl.store(broken + row, is_broken)
    if (not is_broken) & (heat > 0.0) & ((most > 0) | (mass < 1.0) | (least > 0.0)):
        row_logits = logits + row * logits_stride
        row_listed = listed + row * num_groups
        group = tl.arange(0, GROUPS)
        peaks = tl.load(of_groups + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
        tail = (1.0 - mass).to(tl.float32)
        least = tl.minimum(tl.maximum(least, 0.0), 1.0)
        has_top_k = (most > 0) & (most < vocab_size)
        num_listed = tl.full([], 0, tl.int32)
        total = tl.full([], 0.0, tl.float32)
        floor = tl.full([], -0x80000000, tl.int32)  # keys below it are refused by top-k
        if has_top_k:
            k = most.to(tl.int32)
            is_finite = peaks > float("-inf")
            bound = _bound_of_kth_largest(_key(peaks), is_finite, k)
            num_listed = _list_groups(row_listed, group, is_finite & (_key(peaks) >= bound))
            smallest = tl.min(tl.load(best_scores + 2 * num_rows * PROGRAMS + place), 0)
            bound = tl.where(tl.sum(is_finite.to(tl.int32), 0) >= k, bound, _key(smallest))
            floor = _kth_largest(
                row_logits, row_listed, num_listed, vocab_size, k, bound, largest, GROUP, GROUPS_OF_TURN, NUM_PIVOTS, NUM_VALUE_READINGS
            )
        elif mass < 1.0:
            masses = tl.load(best_scores + 3 * num_rows * PROGRAMS + place)
            total = tl.sum(tl.where(peaks_of_programs > float("-inf"), masses * tl.exp((peaks_of_programs - largest) / heat), 0.0), 0)
        is_kept = False
        is_undrawn = has_top_k & (most <= MAX_LATE_TOP_K)
        while not is_kept:
            chosen = tl.where(is_undrawn, float("-inf"), _logits(row_logits, token_id, vocab_size))
            is_undrawn = False
            is_kept = (_key(chosen) >= floor) & (tl.exp((chosen - largest) / heat) >= least)
            if is_kept & (mass < 1.0):
                if not has_top_k:
                    num_listed = _list_groups(row_listed, group, peaks >= chosen)
                num_above = tl.zeros([GROUPS_OF_TURN, GROUP], tl.int32)
                whole = tl.zeros([GROUPS_OF_TURN, GROUP], tl.float32)
                part = tl.zeros([GROUPS_OF_TURN, GROUP], tl.float32)  # the mass above the chosen token; with top-k, the rest of it
                for turn in range(0, num_listed, GROUPS_OF_TURN):
                    token = _listed_tokens(row_listed, turn, num_listed, GROUP, GROUPS_OF_TURN)
                    logit = _logits(row_logits, token, vocab_size)
                    is_above = (logit > chosen) | ((logit == chosen) & (token > token_id))
                    weight = tl.where(_key(logit) >= floor, tl.exp((logit - largest) / heat), 0.0)
                    num_above += is_above.to(tl.int32)
                    whole += weight
                    part += tl.where(is_above == has_top_k, 0.0, weight)
                total = tl.where(has_top_k, _sum(whole), total)
                up_to_chosen = tl.where(has_top_k, _sum(part), total - _sum(part))
                is_kept = (_sum(num_above) == 0) | (up_to_chosen > tail * total)
            if not is_kept:
                is_open = (peaks >= chosen) & (tl.exp((peaks - largest) / heat) >= least)
                untried = tl.full([], float("-inf"), tl.float32)
                if not has_top_k:
                    scores_at = of_groups + (row + num_rows) * num_groups + group
                    bounds = tl.load(scores_at, mask=is_open, other=float("-inf"))
                    is_tried = is_open & (_key(bounds) >= _bound_of_kth_largest(_key(bounds), is_open, GROUPS_OF_TURN // 2))
                    untried = tl.max(tl.where(is_tried, float("-inf"), bounds), 0)
                    num_listed = _list_groups(row_listed, group, is_tried)
                is_drawn = False
                refused, refused_id = chosen, token_id
                while not is_drawn:
                    best = tl.full([GROUPS_OF_TURN, GROUP], float("-inf"), tl.float32)
                    best_id = tl.full([GROUPS_OF_TURN, GROUP], 0x7FFFFFFF, tl.int32)
                    for turn in range(0, num_listed, GROUPS_OF_TURN):
                        token = _listed_tokens(row_listed, turn, num_listed, GROUP, GROUPS_OF_TURN)
                        logit = _logits(row_logits, token, vocab_size)
                        is_open_token = (logit > refused) | ((logit == refused) & (token > refused_id))
                        is_open_token = is_open_token & (_key(logit) >= floor) & (tl.exp((logit - largest) / heat) >= least)
                        counter = _listed_tokens(row_listed, turn, num_listed, GROUP // 4, GROUPS_OF_TURN)
                        noise = _noise(counter, tl.load(seed + at), tl.load(position + at), tl.load(sequence_index + at), purpose)
                        noisy = tl.where(is_open_token, logit + heat * noise, float("-inf"))
                        is_better = noisy > best
                        best = tl.where(is_better, noisy, best)
                        best_id = tl.where(is_better, token, best_id)
                    score = tl.max(tl.max(best, 1), 0)
                    token_id = tl.min(tl.min(tl.where(best == score, best_id, 0x7FFFFFFF), 1), 0)
                    is_drawn = has_top_k | (score >= untried)
                    if not is_drawn:  # refused tokens have the best scores of the groups tried: take all that are open
                        num_listed = _list_groups(row_listed, group, is_open)
                        untried = tl.full([], float("-inf"), tl.float32)
    tl.store(token_ids + row, token_id.to(tl.int64))


@triton.jit
def _bound_of_kth_largest(keys: tl.tensor, is_counted: tl.tensor, k: int) -> tl.tensor:
    """A key with at least k of the counted keys at or above it, and not many more unless they are equal; the least if k have no bound."""
    low = tl.min(tl.where(is_counted, keys, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(is_counted, keys, -0x80000000), 0).to(tl.int64) + 1
    num_at_low = tl.sum(is_counted.to(tl.int32), 0)
    while (high - low > 1) & (num_at_low > k + k // 4 + 16):
        middle = low + (high - low) // 2
        count = tl.sum((is_counted & (keys >= middle)).to(tl.int32), 0)
        num_at_low = tl.where(count >= k, count, num_at_low)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
    return low.to(tl.int32)


@triton.jit
def _list_groups(listed: tl.tensor, group: tl.tensor, is_listed: tl.tensor) -> tl.tensor:
    """Write the groups that are listed, in order; how many they are."""
    ones = is_listed.to(tl.int32)
    tl.debug_barrier()  # threads may still read the list before
    tl.store(listed + tl.cumsum(ones, 0) - 1, group, mask=is_listed)
    tl.debug_barrier()
    return tl.sum(ones, 0)


@triton.jit
def _listed_tokens(listed: tl.tensor, turn: int, num_listed: int, GROUP: tl.constexpr, GROUPS_OF_TURN: tl.constexpr) -> tl.tensor:
    """The tokens of the groups of one turn: [GROUPS_OF_TURN, GROUP]; behind the last group, tokens that no vocabulary has."""
    index = turn + tl.arange(0, GROUPS_OF_TURN)
    group = tl.load(listed + index, mask=index < num_listed, other=0x1FFFFFF)
    return group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _sum(tile: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _kth_largest(
    logits: tl.tensor,  # [vocab_size]
    listed: tl.tensor,  # [num_listed] groups, which hold every logit at or above `bound`
    num_listed: int,
    vocab_size: int,
    k: int,
    bound: tl.tensor,
    largest: float,
    GROUP: tl.constexpr,
    GROUPS_OF_TURN: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    NUM_VALUE_READINGS: tl.constexpr,
) -> tl.tensor:
    """A key with exactly k keys at or above it, or, where that splits equal logits, the k-th largest key.

    Each reading counts for NUM_PIVOTS keys and leaves a fifth of an interval: of logits first, which soon separates what is
    spread as logits are; then of keys, which ends after 14 readings whatever the logits are.
    """
    low = bound.to(tl.int64)  # at least k keys are >= low, if there are so many finite ones
    high = _key(largest).to(tl.int64) + 1  # fewer than k keys are >= high
    num_at_low = tl.full([], 0x7FFFFFFF, tl.int32)
    num_readings = 0
    while (high - low > 1) & (num_at_low != k):
        is_by_value = num_readings < NUM_VALUE_READINGS
        counters = tl.zeros([GROUPS_OF_TURN, GROUP], tl.int32)  # a byte for each pivot: no lane sees 256 tokens of a row
        for turn in range(0, num_listed, GROUPS_OF_TURN):
            key = _key(_logits(logits, _listed_tokens(listed, turn, num_listed, GROUP, GROUPS_OF_TURN), vocab_size))
            for index in tl.static_range(NUM_PIVOTS):
                is_above = key >= _pivot(low, high, index, is_by_value, NUM_PIVOTS)
                counters += is_above.to(tl.int32) << (8 * index)
        old_low, old_high = low, high
        for index in tl.static_range(NUM_PIVOTS):
            count = _sum((counters >> (8 * index)) & 0xFF)
            pivot = _pivot(old_low, old_high, index, is_by_value, NUM_PIVOTS).to(tl.int64)
            num_at_low = tl.where((count >= k) & (pivot >= low), count, num_at_low)
            low = tl.where(count >= k, tl.maximum(pivot, low), low)
            high = tl.where(count < k, tl.minimum(pivot, high), high)
        num_readings += 1
    return low.to(tl.int32)


@triton.jit
def _pivot(low: tl.tensor, high: tl.tensor, index: tl.constexpr, is_by_value: tl.tensor, NUM_PIVOTS: tl.constexpr) -> tl.tensor:
    """One of the keys that divide [low, high), evenly by logits or by keys."""
    bottom, top = _value(low.to(tl.int32)), _value((high - 1).to(tl.int32))
    by_value = _key(bottom + (top - bottom) * ((index + 1) / (NUM_PIVOTS + 1)))
    by_key = (low + (high - low) * (index + 1) // (NUM_PIVOTS + 1)).to(tl.int32)
    return tl.where(is_by_value, by_value, by_key)


@triton.jit
def _logits(logits: tl.tensor, token: tl.tensor, end: int) -> tl.tensor:
    """Logits in float32; NaN, and what is behind the end, is -inf."""
    logit = tl.load(logits + token, mask=token < end, other=float("-inf")).to(tl.float32)
    return tl.where(logit == logit, logit, float("-inf"))


@triton.jit
def _key(logit: tl.tensor) -> tl.tensor:
    """An int32 that orders as the float32 does."""
    bits = logit.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _noise(counter: tl.tensor, seed: tl.tensor, position: tl.tensor, sequence_index: tl.tensor, purpose: int) -> tl.tensor:
    """Gumbel noise of the four tokens from 4 * counter on, for each counter, along the last dim: see gumbel_noise()."""
    zeros = counter * 0
    words = tl.philox(
        seed,
        counter.to(tl.uint32),
        (zeros + position).to(tl.uint32),
        (zeros + sequence_index).to(tl.uint32),
        (zeros + purpose).to(tl.uint32),
    )
    bits = tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3])) >> 9
    uniform = (bits.to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))
