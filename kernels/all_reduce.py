"""Sums over the ranks of a group through memory that each of them can read: one launch, with the norm that follows.

Each rank's peer memory (worker/peer_memory.py) begins with flags, [size, MAX_PROGRAMS] int32, then come its areas. Program i of a
rank meets program i of every other rank: it writes the number of this meeting into its place of their flags and waits until
theirs are in its own. What a rank wrote before the launch, or a program before the meeting, the others can read after it. The
numbers go up by one with each meeting of a program, and wrap around.

Nobody waits once more for the end of the reading. Instead what is read now is not written again before one more
meeting: whoever comes to that has ended this launch. Partial sums have areas that take turns; what programs write themselves has two
slots, by the meeting's number.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import num_multiprocessors

# Programs of a launch at most. All of them can run at once: one that waits never keeps another from starting.
MAX_PROGRAMS: Final = 512
# Bytes that a program of a flat sum or of an exchange reads of each rank in a turn.
_TURN_BYTES: Final = 4096
_EXCHANGE_WARPS: Final = 4


@dataclass(frozen=True, slots=True)
class Peers:
    """The peer memory of a group as one rank sees it.

    flags, areas: [size] int64, on the device: where each rank's flags and its data begin, in rank order
    meetings:     [MAX_PROGRAMS] int32, on the device: the number of each program's last meeting; all zeros at first
    """

    rank: int
    size: int
    flags: Tensor
    areas: Tensor
    meetings: Tensor


def sum_norm(
    peers: Peers,
    weight: Tensor,
    *,
    area: int,
    residual: Tensor,
    eps: float,
    output: Tensor,
    adds: bool = True,
) -> None:
    """Sum the ranks' partial results, add the sum to the residual stream, and take the RMS norm of that.

    weight:           [width], of the norm
    area:             bytes from the start of the areas to the partial result of each rank: [num_tokens, width], contiguous, of
                      `output`'s dtype. It must not be that of the launch before
    residual, output: [num_tokens, width], last dim contiguous
    adds:             whether there is something in the residual stream already

    Sums are float32, in rank order, rounded to the dtype once; then as `rms_norm`. So all ranks have the same numbers.
    """
    num_tokens, width = output.shape
    assert num_tokens * max(width, output.stride(0), residual.stride(0)) < 2**31, "places of a step's numbers are 32 bits"
    padded_width = triton.next_power_of_2(width)
    num_warps = max(1, min(16, padded_width // 512))
    _sum_norm_kernel[(min(num_tokens, _max_programs(output.device, num_warps=num_warps)),)](
        output,
        residual,
        weight,
        peers.flags,
        peers.areas,
        peers.meetings,
        peers.rank,
        area,
        eps,
        num_tokens,
        output.stride(0),
        residual.stride(0),
        SIZE=peers.size,
        MAX=MAX_PROGRAMS,
        WIDTH=width,
        PADDED_WIDTH=padded_width,
        ADDS=adds,
        num_warps=num_warps,
    )


def _max_programs(device: torch.device, *, num_warps: int) -> int:
    """So many that all are resident: 32 warps of them per multiprocessor."""
    return min(MAX_PROGRAMS, num_multiprocessors(device) * max(1, 32 // num_warps))


def meet(peers: Peers) -> None:
    """Wait until every rank has come here: what each wrote before, the launches after this can read."""
    _meet_kernel[(1,)](peers.flags, peers.meetings, peers.rank, SIZE=peers.size, MAX=MAX_PROGRAMS, num_warps=1)


@triton.jit(do_not_specialize=["own_rank"])
def _meet_kernel(flags: tl.tensor, meetings: tl.tensor, own_rank: int, SIZE: tl.constexpr, MAX: tl.constexpr) -> None:
    _meet(flags, meetings, own_rank, SIZE, MAX)


@triton.jit
def _meet(flags: tl.tensor, meetings: tl.tensor, own_rank: int, SIZE: tl.constexpr, MAX: tl.constexpr) -> tl.tensor:
    """Wait until this program of every rank has come here; the number of the meeting."""
    program = tl.program_id(0)
    number = tl.load(meetings + program) + 1
    # All threads must have read the number, and written what the others will read, before one tells them.
    tl.debug_barrier()
    tl.store(meetings + program, number)
    own = tl.load(flags + own_rank).to(tl.pointer_type(tl.int32)) + program
    for step in tl.static_range(1, SIZE):
        place = tl.load(flags + (own_rank + step) % SIZE).to(tl.pointer_type(tl.int32)) + own_rank * MAX + program
        tl.atomic_xchg(place, number, sem="release", scope="sys")
    for step in tl.static_range(1, SIZE):
        # By difference, which stays right when the numbers wrap around.
        while tl.atomic_add(own + (own_rank + step) % SIZE * MAX, 0, sem="acquire", scope="sys") - number < 0:
            pass
    tl.debug_barrier()
    return number


@triton.jit(do_not_specialize=["own_rank", "num_tokens", "area"])
def _sum_norm_kernel(
    output: tl.tensor,  # [num_tokens, WIDTH]
    residual: tl.tensor,  # [num_tokens, WIDTH]
    weight: tl.tensor,  # [WIDTH]
    flags: tl.tensor,  # [SIZE]
    areas: tl.tensor,  # [SIZE]
    meetings: tl.tensor,  # [MAX]
    own_rank: int,
    area: int,
    eps: float,
    num_tokens: int,
    output_stride: int,
    residual_stride: int,
    SIZE: tl.constexpr,
    MAX: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    column = tl.arange(0, PADDED_WIDTH)
    is_column = column < WIDTH
    dtype = output.dtype.element_ty
    factors = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    _meet(flags, meetings, own_rank, SIZE, MAX)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        numbers = tl.zeros([PADDED_WIDTH], tl.float32)
        for rank in tl.static_range(SIZE):
            partial = tl.multiple_of((tl.load(areas + rank) + area).to(tl.pointer_type(dtype)), 16)
            place = partial + token * WIDTH + column
            # ".cv": what another rank wrote is never taken from this multiprocessor's own cache. Triton 3.6 leaves it out, where the
            # meeting's acquire alone has emptied that cache.
            numbers += tl.load(place, mask=is_column, other=0.0, cache_modifier=".cv").to(tl.float32)
        numbers = numbers.to(dtype).to(tl.float32)
        stream = residual + token * residual_stride + column
        if ADDS:
            numbers += tl.load(stream, mask=is_column, other=0.0).to(tl.float32)
        sums = numbers.to(dtype)
        tl.store(stream, sums, mask=is_column)
        numbers = sums.to(tl.float32)
        scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
        tl.store(output + token * output_stride + column, (numbers * scale * factors).to(dtype), mask=is_column)


def all_reduce(peers: Peers, tensor: Tensor, *, area: int, slot_bytes: int, in_two_shots: bool = False) -> None:
    """Replace a contiguous tensor by its sum over the ranks.

    area:         bytes from the start of the areas to two slots of `slot_bytes`, for this and `all_gather` alone; the tensor
                  fits into one of them
    in_two_shots: each rank sums its share and reads the others' sums, for which they meet a second time. In one shot each reads all
                  numbers of all others: size - 1 times the tensor, instead of 2 * (size - 1) / size times

    Sums are float32, in rank order, rounded once: the same on all ranks, and either way.
    """
    assert tensor.is_contiguous(), tensor.stride()
    assert tensor.nbytes <= slot_bytes, (tensor.nbytes, slot_bytes)
    numbers = tensor.view(-1)
    if not in_two_shots:
        _exchange(peers, numbers, numbers, area=area, slot_bytes=slot_bytes, sums=True)
        return
    turn = _TURN_BYTES // tensor.element_size()
    share = triton.cdiv(turn, peers.size)
    _two_shots_kernel[(_num_programs(numbers),)](
        numbers,
        peers.flags,
        peers.areas,
        peers.meetings,
        peers.rank,
        area,
        slot_bytes,
        len(numbers),
        SIZE=peers.size,
        MAX=MAX_PROGRAMS,
        TURN=turn,
        SHARE=share,
        PADDED_SHARE=triton.next_power_of_2(share),
        num_warps=_EXCHANGE_WARPS,
    )


def all_gather(peers: Peers, part: Tensor, output: Tensor, *, area: int, slot_bytes: int) -> None:
    """Copy the parts of all ranks behind each other.

    part:   any shape, contiguous, as all ranks have it; fits into a slot as for `all_reduce`
    output: [size, *part.shape], contiguous
    """
    assert part.is_contiguous(), part.stride()
    assert output.is_contiguous(), output.stride()
    assert part.nbytes <= slot_bytes, (part.nbytes, slot_bytes)
    _exchange(peers, part.view(-1), output.view(-1), area=area, slot_bytes=slot_bytes, sums=False)


def _exchange(peers: Peers, part: Tensor, output: Tensor, *, area: int, slot_bytes: int, sums: bool) -> None:
    _exchange_kernel[(_num_programs(part),)](
        output,
        part,
        peers.flags,
        peers.areas,
        peers.meetings,
        peers.rank,
        area,
        slot_bytes,
        len(part),
        SIZE=peers.size,
        MAX=MAX_PROGRAMS,
        TURN=_TURN_BYTES // part.element_size(),
        SUMS=sums,
        num_warps=_EXCHANGE_WARPS,
    )


def _num_programs(part: Tensor) -> int:
    """The same for the same part of a slot, whatever is done: who writes there again must have met who read it."""
    num_turns = triton.cdiv(part.nbytes, _TURN_BYTES)
    return int(min(num_turns, _max_programs(part.device, num_warps=_EXCHANGE_WARPS)))


@triton.jit
def _show(part: tl.tensor, areas: tl.tensor, own_rank: int, start: int, num_numbers: int, TURN: tl.constexpr) -> None:
    """Copy this program's turns of a rank's part to `start` bytes into its own areas, where the others read it after a meeting."""
    number = tl.arange(0, TURN)
    own = tl.multiple_of((tl.load(areas + own_rank) + start).to(tl.pointer_type(part.dtype.element_ty)), 16)
    for first in range(tl.program_id(0) * TURN, num_numbers, tl.num_programs(0) * TURN):
        is_number = first + number < num_numbers
        tl.store(own + first + number, tl.load(part + first + number, mask=is_number), mask=is_number)


@triton.jit(do_not_specialize=["own_rank", "area"])
def _exchange_kernel(
    output: tl.tensor,  # [num_numbers], or [SIZE * num_numbers]
    part: tl.tensor,  # [num_numbers]; may be the output
    flags: tl.tensor,  # [SIZE]
    areas: tl.tensor,  # [SIZE]
    meetings: tl.tensor,  # [MAX]
    own_rank: int,
    area: int,
    slot_bytes: int,
    num_numbers: int,
    SIZE: tl.constexpr,
    MAX: tl.constexpr,
    TURN: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    dtype = part.dtype.element_ty
    program = tl.program_id(0)
    start = area + ((tl.load(meetings + program) + 1) & 1).to(tl.int64) * slot_bytes
    _show(part, areas, own_rank, start, num_numbers, TURN)
    _meet(flags, meetings, own_rank, SIZE, MAX)
    number = tl.arange(0, TURN)
    for first in range(program * TURN, num_numbers, tl.num_programs(0) * TURN):
        is_number = first + number < num_numbers
        total = tl.zeros([TURN], tl.float32)
        for rank in tl.static_range(SIZE):
            theirs = tl.multiple_of((tl.load(areas + rank) + start).to(tl.pointer_type(dtype)), 16)
            numbers = tl.load(theirs + first + number, mask=is_number, cache_modifier=".cv")
            if SUMS:
                total += numbers.to(tl.float32)
            else:
                tl.store(output + rank * num_numbers + first + number, numbers, mask=is_number)
        if SUMS:
            tl.store(output + first + number, total.to(dtype), mask=is_number)


@triton.jit(do_not_specialize=["own_rank", "area"])
def _two_shots_kernel(
    output: tl.tensor,  # [num_numbers], this rank's part at first
    flags: tl.tensor,  # [SIZE]
    areas: tl.tensor,  # [SIZE]
    meetings: tl.tensor,  # [MAX]
    own_rank: int,
    area: int,
    slot_bytes: int,
    num_numbers: int,
    SIZE: tl.constexpr,
    MAX: tl.constexpr,
    TURN: tl.constexpr,
    SHARE: tl.constexpr,  # numbers of a turn that a rank sums
    PADDED_SHARE: tl.constexpr,
) -> None:
    dtype = output.dtype.element_ty
    program = tl.program_id(0)
    parity = (tl.load(meetings + program) + 1) & 1
    parts = area + parity.to(tl.int64) * slot_bytes
    # Written between the two meetings: what the first has read lies in the other slot, and what was read from this one before has ended.
    sums = area + (1 - parity).to(tl.int64) * slot_bytes
    _show(output, areas, own_rank, parts, num_numbers, TURN)
    _meet(flags, meetings, own_rank, SIZE, MAX)
    column = tl.arange(0, PADDED_SHARE)
    is_share = column < SHARE
    place = own_rank * SHARE + column
    own = tl.multiple_of((tl.load(areas + own_rank) + sums).to(tl.pointer_type(dtype)), 16)
    for first in range(program * TURN, num_numbers, tl.num_programs(0) * TURN):
        is_number = is_share & (place < TURN) & (first + place < num_numbers)
        total = tl.zeros([PADDED_SHARE], tl.float32)
        for rank in tl.static_range(SIZE):
            theirs = tl.multiple_of((tl.load(areas + rank) + parts).to(tl.pointer_type(dtype)), 16)
            total += tl.load(theirs + first + place, mask=is_number, other=0.0, cache_modifier=".cv").to(tl.float32)
        tl.store(own + first + place, total.to(dtype), mask=is_number)
    _meet(flags, meetings, own_rank, SIZE, MAX)
    for first in range(program * TURN, num_numbers, tl.num_programs(0) * TURN):
        for rank in tl.static_range(SIZE):
            theirs = tl.multiple_of((tl.load(areas + rank) + sums).to(tl.pointer_type(dtype)), 16)
            place = rank * SHARE + column
            is_number = is_share & (place < TURN) & (first + place < num_numbers)
            numbers = tl.load(theirs + first + place, mask=is_number, cache_modifier=".cv")
            tl.store(output + first + place, numbers, mask=is_number)
