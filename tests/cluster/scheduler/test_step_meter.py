"""What a group learns of its steps stays within what it has seen."""

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.cluster.scheduler.step_meter import MIN_PREFILL_TOKENS, StepMeter

SECONDS: Final = st.floats(1e-4, 10.0)
# Sums of floats are compared with so much room.
ROOM: Final = 1 + 1e-9


def new_meter(
    *, prefill_tokens_per_s: tuple[tuple[int, float], ...] = (), copy_bytes_per_s: float = 0.0, block_bytes: int = 1000
) -> StepMeter:
    return StepMeter(prefill_tokens_per_s=prefill_tokens_per_s, copy_bytes_per_s=copy_bytes_per_s, block_bytes=block_bytes)


def test_nothing_is_known_before_the_first_step() -> None:
    meter = new_meter()
    assert meter.predict(num_prefill_tokens=0, num_decoding=1) is None
    assert meter.predict(num_prefill_tokens=100, num_decoding=0) is None
    assert meter.time_out_s(num_prefill_tokens=0, num_decoding=1, factor=5) is None
    assert meter.recompute_s(100) is None
    assert meter.swap_s(100, backlog=100) == 0.0
    assert meter.copy_steps(100) == 0


def test_copies_take_as_many_steps_as_fit_into_their_time() -> None:
    meter = new_meter(copy_bytes_per_s=1e6, block_bytes=1000)  # a block a millisecond
    assert meter.copy_steps(100) == 0, "no step was seen yet"
    meter.observe(device_s=0.010, num_prefill_tokens=0, num_decoding=3, num_copies=0)
    assert [meter.copy_steps(count) for count in (0, 9, 11, 19, 21, 105)] == [0, 0, 1, 1, 2, 10]


@given(st.lists(SECONDS, min_size=1, max_size=30))
def test_a_decode_step_is_predicted_within_what_was_seen(seen_s: list[float]) -> None:
    meter = new_meter()
    for device_s in seen_s:
        meter.observe(device_s=device_s, num_prefill_tokens=0, num_decoding=3, num_copies=0)
    predicted_s = meter.predict(num_prefill_tokens=0, num_decoding=3)
    assert predicted_s is not None
    assert min(seen_s) / ROOM <= predicted_s <= max(seen_s) * ROOM


@given(st.lists(st.tuples(SECONDS, st.integers(MIN_PREFILL_TOKENS, 8192)), min_size=1, max_size=30), st.integers(1, 10_000))
def test_a_recompute_is_priced_within_the_speeds_that_were_seen(steps: list[tuple[float, int]], num_tokens: int) -> None:
    meter = new_meter()
    for device_s, num_prefill_tokens in steps:
        meter.observe(device_s=device_s, num_prefill_tokens=num_prefill_tokens, num_decoding=0, num_copies=0)
    speeds = [num_prefill_tokens / device_s for device_s, num_prefill_tokens in steps]
    recompute_s = meter.recompute_s(num_tokens)
    assert recompute_s is not None
    assert num_tokens / max(speeds) / ROOM <= recompute_s <= num_tokens / min(speeds) * ROOM


@given(decode_s=SECONDS, mixed_s=SECONDS, num_tokens=st.integers(MIN_PREFILL_TOKENS, 8192))
def test_prefill_beside_decoding_is_given_at_least_half_of_the_step(decode_s: float, mixed_s: float, num_tokens: int) -> None:
    meter = new_meter()
    meter.observe(device_s=decode_s, num_prefill_tokens=0, num_decoding=8, num_copies=0)
    meter.observe(device_s=mixed_s, num_prefill_tokens=num_tokens, num_decoding=8, num_copies=0)
    recompute_s = meter.recompute_s(num_tokens)
    assert recompute_s is not None
    assert recompute_s == pytest.approx(max(mixed_s - decode_s, mixed_s / 2))


@given(st.lists(SECONDS, min_size=1, max_size=30), st.floats(1.0, 10.0))
def test_a_time_out_is_never_less_than_so_many_times_the_step_just_seen(seen_s: list[float], factor: float) -> None:
    meter = new_meter()
    time_out_s: float | None = None
    for device_s in seen_s:
        meter.observe(device_s=device_s, num_prefill_tokens=0, num_decoding=1, num_copies=0)
        time_out_s = meter.time_out_s(num_prefill_tokens=0, num_decoding=1, factor=factor)
        assert time_out_s is not None
        assert time_out_s >= factor * device_s / ROOM
    assert time_out_s is not None
    assert time_out_s <= factor * max(seen_s) * ROOM


def test_a_long_step_is_forgotten_in_time() -> None:
    meter = new_meter()
    meter.observe(device_s=10.0, num_prefill_tokens=0, num_decoding=1, num_copies=0)
    for _ in range(500):
        meter.observe(device_s=0.01, num_prefill_tokens=0, num_decoding=1, num_copies=0)
    assert meter.time_out_s(num_prefill_tokens=0, num_decoding=1, factor=5) == pytest.approx(0.05, rel=0.01)


@given(decode_s=SECONDS, stolen_s=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), num_copies=st.integers(1, 50))
def test_a_step_with_copies_says_what_they_steal_and_nothing_about_steps_without(
    decode_s: float, stolen_s: list[float], num_copies: int
) -> None:
    meter = new_meter()
    meter.observe(device_s=decode_s, num_prefill_tokens=0, num_decoding=1, num_copies=0)
    for more_s in stolen_s:
        meter.observe(device_s=decode_s + more_s, num_prefill_tokens=0, num_decoding=1, num_copies=num_copies)
    assert meter.predict(num_prefill_tokens=0, num_decoding=1) == decode_s
    # Each block is copied twice, out and in; before it is known, a copy is thought to steal nothing.
    assert 0.0 <= meter.swap_s(7, backlog=0) <= 2 * 7 * max(stolen_s) / num_copies * ROOM + 1e-12


@given(num_blocks=st.integers(0, 1000), backlog=st.integers(0, 1000), bytes_per_s=st.floats(1e6, 1e11))
def test_a_swap_waits_for_the_copies_before_it(num_blocks: int, backlog: int, bytes_per_s: float) -> None:
    meter = new_meter(copy_bytes_per_s=bytes_per_s, block_bytes=1 << 20)
    assert meter.swap_s(num_blocks, backlog=backlog) == pytest.approx(backlog * (1 << 20) / bytes_per_s)


@given(SECONDS, st.integers(0, 8192), st.integers(0, 256))
def test_steps_without_a_time_or_without_tokens_teach_nothing(device_s: float, num_prefill_tokens: int, num_decoding: int) -> None:
    meter = new_meter()
    meter.observe(device_s=0.0, num_prefill_tokens=num_prefill_tokens, num_decoding=num_decoding, num_copies=0)
    meter.observe(device_s=device_s, num_prefill_tokens=0, num_decoding=0, num_copies=3)
    assert meter.time_out_s(num_prefill_tokens=num_prefill_tokens, num_decoding=num_decoding, factor=5) is None


@pytest.mark.parametrize(("num_tokens", "speed"), [(1, 1000.0), (128, 1000.0), (129, 8000.0), (2048, 8000.0), (9000, 8000.0)])
def test_until_prefill_is_seen_its_speed_comes_from_the_table_made_at_load(num_tokens: int, speed: float) -> None:
    meter = new_meter(prefill_tokens_per_s=((128, 1000.0), (2048, 8000.0)))
    assert meter.recompute_s(num_tokens) == num_tokens / speed


def test_a_few_prompt_tokens_say_nothing_about_the_speed_of_prefill() -> None:
    meter = new_meter()
    meter.observe(device_s=1.0, num_prefill_tokens=MIN_PREFILL_TOKENS - 1, num_decoding=0, num_copies=0)
    assert meter.recompute_s(100) is None
