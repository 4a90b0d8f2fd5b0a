import random

import pytest

from quire.client.retries import FIRST_DELAY_S, MAX_DELAY_S, Tries
from quire.common.errors import InternalError, Overloaded, QuireError, Unavailable


def tries(*, max_retries: int = 20, deadline_s: float = 1e9) -> Tries:
    return Tries(max_retries=max_retries, deadline_s=deadline_s, rng=random.Random(1))


def test_back_off_doubles_up_to_its_bound_and_is_jittered() -> None:
    ours = tries()
    delays = [ours.delay_after_s(Unavailable("x", retry_after_s=0.0), now_s=0) for _ in range(12)]
    for num_failed, delay_s in enumerate(delays):
        full_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2**num_failed)
        assert delay_s is not None
        assert full_s / 2 <= delay_s <= full_s
    assert len(set(delays)) == len(delays)


def test_the_servers_delay_is_never_cut_short() -> None:
    ours = tries()
    for _ in range(20):
        delay_s = ours.delay_after_s(Overloaded("x", retry_after_s=2.0), now_s=0)
        assert delay_s is not None
        assert 2.0 <= delay_s <= 2.5


@pytest.mark.parametrize("error", [Overloaded("x"), Unavailable("x"), InternalError("x", retry_after_s=1.0)])
def test_what_will_not_help_is_not_tried(error: QuireError) -> None:
    assert tries().delay_after_s(error, now_s=0) is None


def test_tries_are_bounded_in_number_and_by_the_deadline() -> None:
    error = Unavailable("x", retry_after_s=1.0)
    ours = tries(max_retries=2)
    assert [ours.delay_after_s(error, now_s=0) is None for _ in range(3)] == [False, False, True]
    assert tries(deadline_s=10).delay_after_s(error, now_s=9.5) is None
    assert tries(deadline_s=10).delay_after_s(error, now_s=8) is not None


def test_the_time_left_is_never_negative_and_none_without_a_deadline() -> None:
    assert tries(deadline_s=10).time_left_s(4) == 6
    assert tries(deadline_s=10).time_left_s(14) == 0
    assert tries(deadline_s=float("inf")).time_left_s(4) is None
