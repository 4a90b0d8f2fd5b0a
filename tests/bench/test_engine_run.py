import pytest

from quire.bench.engine_run import RunMeter
from quire.common.errors import InternalError
from quire.common.messages import Accepted, EndReason, Finished, Spans, Tokens, UsageCounts


def tokens(*handles: int) -> Tokens:
    count = len(handles)
    return Tokens(handles, (0,) * count, (0,) * count, (1,) * count, (5,) * count)


def finished(handle: int, *, num_preemptions: int = 0) -> Finished:
    return Finished(handle, 0, EndReason.LENGTH, None, True, UsageCounts(1, 0, 1), Spans(0, 0, 0, 0), num_preemptions)


def meter(*handles: int) -> RunMeter:
    """Of as many requests, all accepted."""
    made = RunMeter([f"r{handle}" for handle in handles])
    for handle in handles:
        made.on_accepted(Accepted(f"r{handle}", 0, handle))
    return made


def test_a_steady_step_is_the_gap_between_messages_in_which_all_decode() -> None:
    run = meter(1, 2)
    for at_s, handles in ((1.0, (1,)), (2.0, (1, 2)), (2.5, (1, 2)), (3.1, (1, 2)), (9.0, (2,)), (9.2, (2,))):
        run.on_tokens(tokens(*handles), at_s)
    assert run.steady_step_s() == pytest.approx(0.55)
    assert run.requests[0].gaps_s == pytest.approx([1.0, 0.5, 0.6])
    assert run.num_tokens == 9


def test_a_message_of_two_steps_is_no_steady_step() -> None:
    run = meter(1, 2)
    for at_s, handles in ((1.0, (1, 2)), (1.1, (1, 2, 1, 2)), (1.2, (1, 2))):
        run.on_tokens(tokens(*handles), at_s)
    assert run.steady_step_s() is None
    assert run.num_tokens == 8


def test_a_run_ends_with_its_last_request() -> None:
    run = meter(1, 2)
    run.on_finished(finished(2, num_preemptions=3), 4.0)
    assert (run.num_unfinished, run.num_preemptions) == (1, 3)
    run.on_finished(finished(1), 7.0)
    assert (run.num_unfinished, run.total_s) == (0, 7.0)
    with pytest.raises(InternalError, match="ended twice"):
        run.on_finished(finished(1), 8.0)


def test_what_other_runs_left_is_not_counted() -> None:
    run = meter(1)
    run.on_accepted(Accepted("r9", 0, 9))
    run.on_tokens(tokens(9), 1.0)
    run.on_finished(finished(9), 2.0)
    assert (run.num_tokens, run.num_unfinished) == (0, 1)
