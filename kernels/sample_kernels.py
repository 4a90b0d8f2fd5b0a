"""The two launches of sample(): a draw over all tokens, and a judgement of its winner. Apart from their wrapper for their length."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "first_token", "num_tokens"])
def draw_kernel(
    best_scores: tl.tensor,  # [4, num_rows, num_programs]: best score, largest logit (inf if one is NaN), smallest above -inf, mass
    best_ids: tl.tensor,  # [num_rows, num_programs]
    of_groups: tl.tensor,  # [2, num_rows, num_groups]: largest logit, of rows with filters; best score, of those without top-k
    logits: tl.tensor,  # [num_rows, num_tokens], of the tokens from first_token on
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
    first_token: int,
    num_tokens: int,
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
    end = tl.minimum(begin + program_tokens, num_tokens)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_id = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    smallest = tl.full([TILE], float("inf"), tl.float32)
    peak = tl.full([TILE], -3.4028234663852886e38, tl.float32)  # the least that is finite: a difference to -inf is not NaN
    mass = tl.zeros([TILE], tl.float32)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        logit = tl.load(logits + row * logits_stride + token, mask=token < end, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.where(logit == logit, logit, float("inf")))
        logit = tl.where(logit == logit, logit, float("-inf"))
        smallest = tl.minimum(smallest, tl.where(logit == float("-inf"), float("inf"), logit))
        score = logit
        if draws_here:
            counter = (first_token + first) // 4 + tl.arange(0, TILE // 4)
            score = logit + heat * _noise(counter, row_seed, row_position, row_index, purpose)
        is_better = score > best
        best = tl.where(is_better, score, best)
        best_id = tl.where(is_better, first_token + token, best_id)
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


@triton.jit(do_not_specialize=["num_rows", "own_rank"])
def judge_kernel(
    token_ids: tl.tensor,  # [num_rows]
    broken: tl.tensor,  # None, or [num_rows]
    best_scores: tl.tensor,  # [4, num_rows, PROGRAMS_OF_RANK]: here and below this rank's, those of others lie in their areas
    best_ids: tl.tensor,  # [num_rows, PROGRAMS_OF_RANK]
    of_groups: tl.tensor,  # [2, num_rows, groups of a rank]
    listed: tl.tensor,  # [num_rows, num_groups], scratch
    logits: tl.tensor,  # [num_rows, tokens of a rank]
    rows: tl.tensor,  # [num_rows]
    temperature: tl.tensor,  # [max_rows] float64
    top_k: tl.tensor,  # [max_rows]
    top_p: tl.tensor,  # [max_rows] float64
    min_p: tl.tensor,  # [max_rows] float64
    seed: tl.tensor,  # [max_rows]
    sequence_index: tl.tensor,  # [max_rows]
    position: tl.tensor,  # [max_rows]
    areas: tl.tensor,  # None of one rank; else [SIZE] int64: where each rank's memory begins
    own_rank: int,
    num_rows: int,
    vocab_size: int,
    num_groups: int,
    logits_stride: int,
    purpose: int,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS_OF_RANK: tl.constexpr,
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
    program = tl.arange(0, PROGRAMS)
    is_program = program < SIZE * PROGRAMS_OF_RANK
    rank = program // PROGRAMS_OF_RANK
    place = row * PROGRAMS_OF_RANK + program % PROGRAMS_OF_RANK
    scores_at = _on_rank(best_scores, areas, own_rank, rank, SIZE) + place
    ids_at = _on_rank(best_ids, areas, own_rank, rank, SIZE) + place
    plane = num_rows * PROGRAMS_OF_RANK
    scores = tl.load(scores_at, mask=is_program, other=float("-inf"))
    score = tl.max(scores, 0)
    ids = tl.load(ids_at, mask=is_program, other=0x7FFFFFFF)
    token_id = tl.min(tl.where(scores == score, ids, 0x7FFFFFFF), 0)
    heat = tl.load(temperature + at).to(tl.float32)
    most = tl.load(top_k + at)
    mass = tl.load(top_p + at)
    least = tl.load(min_p + at).to(tl.float32)
    peaks_of_programs = tl.load(scores_at + plane, mask=is_program, other=float("-inf"))
    largest = tl.max(peaks_of_programs, 0)
    is_broken = (largest == float("inf")) | (largest == float("-inf"))
    token_id = tl.where(is_broken, 0, token_id)
    if broken is not None:
        tl.store(broken + row, is_broken)
    if (not is_broken) & (heat > 0.0) & ((most > 0) | (mass < 1.0) | (least > 0.0)):
        row_logits = logits + row * logits_stride
        row_listed = listed + row * num_groups
        group = tl.arange(0, GROUPS)
        groups_at = _groups_at(of_groups, areas, own_rank, row, group, num_groups, SIZE, WIDTH, GROUP)
        peaks = tl.load(groups_at, mask=group < num_groups, other=float("-inf"))
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
            smallest = tl.min(tl.load(scores_at + 2 * plane, mask=is_program, other=float("inf")), 0)
            bound = tl.where(tl.sum(is_finite.to(tl.int32), 0) >= k, bound, _key(smallest))
            floor = _kth_largest(
                row_logits, areas, own_rank, row_listed, num_listed, vocab_size, k, bound, largest, SIZE, WIDTH, GROUP, GROUPS_OF_TURN,
                NUM_PIVOTS, NUM_VALUE_READINGS,
            )  # fmt: skip
        elif mass < 1.0:
            masses = tl.load(scores_at + 3 * plane, mask=is_program, other=0.0)
            total = tl.sum(tl.where(peaks_of_programs > float("-inf"), masses * tl.exp((peaks_of_programs - largest) / heat), 0.0), 0)
        is_kept = False
        is_undrawn = has_top_k & (most <= MAX_LATE_TOP_K)
        while not is_kept:
            chosen = tl.where(is_undrawn, float("-inf"), _logits(row_logits, areas, own_rank, token_id, vocab_size, SIZE, WIDTH))
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
                    logit = _logits(row_logits, areas, own_rank, token, vocab_size, SIZE, WIDTH)
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
                    # Made anew: kept from above, the places would take registers that nothing has to spare.
                    groups_at = _groups_at(of_groups, areas, own_rank, row + num_rows, group, num_groups, SIZE, WIDTH, GROUP)
                    bounds = tl.load(groups_at, mask=is_open, other=float("-inf"))
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
                        logit = _logits(row_logits, areas, own_rank, token, vocab_size, SIZE, WIDTH)
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
    areas: tl.tensor,
    own_rank: int,
    listed: tl.tensor,  # [num_listed] groups, which hold every logit at or above `bound`
    num_listed: int,
    vocab_size: int,
    k: int,
    bound: tl.tensor,
    largest: float,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
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
            token = _listed_tokens(listed, turn, num_listed, GROUP, GROUPS_OF_TURN)
            key = _key(_logits(logits, areas, own_rank, token, vocab_size, SIZE, WIDTH))
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
def _on_rank(own: tl.tensor, areas: tl.tensor, own_rank: int, rank: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Where what lies at `own` in this rank's memory lies in that of each `rank`; those behind the last are taken for the last."""
    place = own
    if SIZE > 1:
        shift = tl.load(areas + tl.minimum(rank, SIZE - 1)) - tl.load(areas + own_rank)
        place = (own.to(tl.int64) + shift).to(tl.pointer_type(own.dtype.element_ty))
    return place


@triton.jit
def _groups_at(
    of_groups: tl.tensor,
    areas: tl.tensor,
    own_rank: int,
    row: tl.tensor,
    group: tl.tensor,
    num_groups: int,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Where the numbers of a row's groups lie."""
    places = of_groups + row * num_groups + group
    if SIZE > 1:
        of_rank: tl.constexpr = WIDTH // GROUP
        places = _on_rank(of_groups, areas, own_rank, group // of_rank, SIZE) + row * of_rank + group % of_rank
    return places


@triton.jit
def _logits(
    logits: tl.tensor, areas: tl.tensor, own_rank: int, token: tl.tensor, end: int, SIZE: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Logits of a row in float32; NaN, and what is behind the end, is -inf."""
    places = logits + token if SIZE == 1 else _on_rank(logits, areas, own_rank, token // WIDTH, SIZE) + token % WIDTH
    logit = tl.load(places, mask=token < end, other=float("-inf")).to(tl.float32)
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
