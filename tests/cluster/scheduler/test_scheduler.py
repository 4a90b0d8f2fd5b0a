"""The whole scheduler with ranks in simulation: stories, then random ones from a seed."""

import math
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from fake_ranks import expected_completion, hello
from hypothesis import given, settings
from hypothesis import strategies as st
from story import CONFIG, GATEWAY, NEUTRAL, Story, config

from quire.cluster.scheduler.scheduler import MAX_GROUP_DEATHS, Scheduler
from quire.cluster.scheduler.timers import MAX_STALE_TIMERS
from quire.common.errors import StatusCode
from quire.common.messages import (
    PROTOCOL_VERSION,
    AttachGroup,
    DetachGroup,
    DrainGroup,
    EndReason,
    Failed,
    Finished,
    GroupDrained,
    GroupLost,
    GroupReady,
    Rejected,
    RowErrorCode,
    SamplingState,
    StepAck,
    StepResult,
)


def test_one_plan_is_always_on_its_way_while_another_computes() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=5)
    num_sent = story.send()
    assert num_sent == 2  # the prompt, and the first decode without having seen its token
    assert story.history[1].chunks == ()
    story.answer()
    num_sent = story.send()
    assert num_sent == 1
    story.run()
    assert len(story.tokens["a"]) == 5


@given(num_prompt_tokens=st.integers(1, 40), max_tokens=st.integers(1, 12), block_size=st.sampled_from([1, 2, 3, 4, 16]))
@settings(max_examples=60, deadline=None)
def test_a_block_is_given_only_for_a_token_that_is_written_now(num_prompt_tokens: int, max_tokens: int, block_size: int) -> None:
    """So the waste is less than one block per sequence, at every step."""
    story = Story(block_size=block_size, num_blocks=60, max_batched_tokens=64)
    story.submit("a", range(num_prompt_tokens), max_tokens=max_tokens)
    for num_written in range(num_prompt_tokens, num_prompt_tokens + max_tokens):
        story.plan()
        assert story.group().pool.num_held == math.ceil(num_written / block_size)
        story.answer()
    assert isinstance(story.ends["a"], Finished)
    assert story.group().pool.num_held == 0


def test_a_stop_token_costs_one_wasted_row_and_no_wrong_token() -> None:
    free = expected_completion([5, 6], SamplingState(), max_tokens=20)
    sampling = SamplingState(stop_ids=(free[3],))
    story = Story()
    story.submit("a", [5, 6], max_tokens=20, sampling=sampling)
    story.run()
    assert story.tokens["a"] == free[: free.index(free[3]) + 1]
    end = story.ends["a"]
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_id, end.usage.num_completion_tokens) == (EndReason.STOP, free[3], len(story.tokens["a"]))


def test_min_tokens_keeps_a_stop_token_from_ending_the_sequence() -> None:
    free = expected_completion([5, 6], SamplingState(), max_tokens=6)
    story = Story()
    story.submit("a", [5, 6], max_tokens=6, sampling=SamplingState(stop_ids=(free[0],), min_tokens=5))
    story.run()
    assert len(story.tokens["a"]) == 6


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows() -> None:
    story = Story(num_blocks=64)
    story.submit("short", [1, 2, 3], max_tokens=30)
    story.step()
    story.submit("long", list(range(40)), max_tokens=3)
    story.run()
    chunk_plans = [plan for plan in story.history if plan.chunks and plan.chunks[0].row == 1]
    assert [plan.chunks[0].count for plan in chunk_plans] == [15, 15, 10]  # 16 a step, one of them for the row that decodes
    assert story.tokens["long"] == expected_completion(list(range(40)), SamplingState(), max_tokens=3)


def test_a_prompt_seen_before_is_found_but_its_last_token_is_computed() -> None:
    story = Story()
    prompt = list(range(8))
    for name in ("first", "second"):
        story.submit(name, prompt)
        story.run()
    first, second = story.ends["first"], story.ends["second"]
    assert isinstance(first, Finished)
    assert isinstance(second, Finished)
    assert (first.usage.num_cached_tokens, second.usage.num_cached_tokens) == (0, 4)
    assert story.tokens["first"] == story.tokens["second"]


def test_decoded_blocks_are_found_by_a_prompt_that_continues_them() -> None:
    story = Story()
    story.submit("first", [1, 2, 3], max_tokens=9)
    story.run()
    story.submit("next", [1, 2, 3, *story.tokens["first"], 7], max_tokens=2)
    story.run()
    end = story.ends["next"]
    assert isinstance(end, Finished)
    assert end.usage.num_cached_tokens == 8


def test_a_request_that_fits_goes_before_one_that_does_not_and_all_finish() -> None:
    story = Story(num_blocks=4)
    story.submit("big", [1, 2, 3, 4, 5], max_tokens=7)  # begins with 2 blocks and ends with 3
    story.submit("second", [9, 9, 9, 9, 9], max_tokens=7)  # 2 blocks, and one must stay free for the first
    story.submit("small", [3], max_tokens=2)
    story.step()
    assert [request.submit.request_id for request in story.scheduler.queue.all()] == ["second"]
    story.run()
    assert list(story.ends) == ["small", "big", "second"]
    assert all(isinstance(end, Finished) for end in story.ends.values())


def test_running_requests_grow_by_preempting_the_latest_and_none_is_lost() -> None:
    story = Story(num_blocks=4, preemption="recompute")
    story.submit("first", [1, 2, 3, 4], max_tokens=9)
    story.submit("last", [5, 6, 7], max_tokens=9)
    story.run()
    first, last = story.ends["first"], story.ends["last"]
    assert isinstance(first, Finished)
    assert isinstance(last, Finished)
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)


def test_a_request_larger_than_the_pool_is_refused_with_the_arithmetic() -> None:
    story = Story(num_blocks=4)
    story.submit("a", list(range(10)), max_tokens=7)
    end = story.ends["a"]
    assert isinstance(end, Rejected)
    assert end.code == StatusCode.INVALID_ARGUMENT
    assert "10 tokens and max_tokens is 7, 17 together; the largest group holds 16" in end.message


def test_a_full_queue_refuses_with_a_delay() -> None:
    story = Story(max_rows=1)
    for index in range(9):
        story.submit(f"r{index}", [index], max_tokens=3)
    end = story.ends["r8"]
    assert isinstance(end, Rejected)
    assert (end.code, end.reason, end.retry_after_s) == (StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 1.0)
    story.run()
    assert all(isinstance(story.ends[f"r{index}"], Finished) for index in range(8))


@pytest.mark.parametrize("num_steps", range(5))
def test_a_cancel_gives_every_block_back_in_every_state(num_steps: int) -> None:
    story = Story()
    story.submit("a", list(range(20)), max_tokens=10)
    story.submit("b", [4, 5], max_tokens=10)
    for _ in range(num_steps):
        story.step()
    story.cancel("a")
    story.cancel("a")  # crossing messages are ignored
    story.run()
    assert story.group().pool.num_held == 0
    assert story.tokens["b"] == expected_completion([4, 5], SamplingState(), max_tokens=10)


def test_a_finish_from_the_gateway_counts_the_tokens_that_it_kept() -> None:
    story = Story()
    story.submit("a", [1], max_tokens=30)
    for _ in range(6):
        story.step()
    story.finish("a", kept_tokens=3)
    story.run()
    end = story.ends["a"]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.num_completion_tokens) == (EndReason.STOP, 3)


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs() -> None:
    story = Story(max_rows=1)
    story.submit("runs", [1], max_tokens=40, time_left_s=0.1)
    story.submit("waits", [2], max_tokens=40, time_left_s=0.2)
    for _ in range(30):
        story.step()
    for name in ("runs", "waits"):
        end = story.ends[name]
        assert isinstance(end, Failed)
        assert end.code == StatusCode.DEADLINE_EXCEEDED


def test_a_higher_attempt_resumes_where_the_lower_one_stood() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9)
    for _ in range(4):
        story.step()
    received = tuple(story.tokens["a"])
    assert 0 < len(received) < 9
    story.submit("a", [1, 2, 3], max_tokens=9, attempt=1, resumed_ids=received)
    story.run()
    assert story.tokens["a"] == expected_completion([1, 2, 3], SamplingState(), max_tokens=9)
    story.submit("b", [1], max_tokens=30)
    story.submit("b", [1], max_tokens=30)
    assert isinstance(story.ends["b"], Rejected)
    assert story.ends["b"].code == StatusCode.ALREADY_EXISTS


def test_a_lost_gateway_takes_its_requests_along() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9)
    story.step()
    story.scheduler.gateway_lost(GATEWAY)
    story.scheduler.check()
    assert story.group().pool.num_held == 0


def test_a_gateway_that_was_given_up_learns_it_from_its_next_welcome() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9)
    story.scheduler.gateway_lost(GATEWAY)
    story.submit("b", [1, 2, 3], max_tokens=9)
    end = story.ends["b"]
    assert isinstance(end, Rejected)
    assert (end.code, end.reason) == (StatusCode.UNAVAILABLE, "SESSION_LOST")
    assert story.welcomes[-1].session > story.welcomes[0].session
    story.submit("c", [1, 2, 3], max_tokens=4)
    story.run()
    assert story.tokens["c"] == expected_completion([1, 2, 3], NEUTRAL, max_tokens=4)


def test_a_failed_rank_ends_the_group_and_its_requests_go_on_under_the_next_term() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9, n=2)
    story.submit("beams", [4, 5], max_tokens=5, num_beams=3, n=2)
    for _ in range(3):
        story.step()
    num_received = len(story.tokens["a"])
    assert 0 < num_received < 9
    story.scheduler.ack("g0", StepAck(1, 1, 0, error="out of memory"), story.now_s)
    story.deliver()
    (lost,) = [message for message in story.control if isinstance(message, GroupLost)]
    assert "out of memory" in lost.reason
    assert story.ends == {}
    assert len(story.scheduler.queue) == 2
    story.attach("g0", term=2)
    story.run()
    end = story.ends["a"]
    assert isinstance(end, Finished)
    assert end.usage.num_completion_tokens == 18
    assert isinstance(story.ends["beams"], Finished)


def test_a_term_that_is_over_does_not_come_back() -> None:
    story = Story()
    story.attach("g0", term=3)
    story.submit("a", [1, 2, 3])
    story.scheduler.attach(AttachGroup(PROTOCOL_VERSION, "g0", 2, "m", 1, 4, 100, 8, 16), story.now_s)
    story.scheduler.detach(DetachGroup("g0", 1, "late news"), story.now_s)
    story.deliver()
    assert story.group().term == 3
    story.run()
    assert isinstance(story.ends["a"], Finished)


def test_requests_of_a_model_that_stays_unserved_fail_in_the_end_and_are_not_told_of_our_insides() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9)
    story.step()
    story.scheduler.ack("g0", StepAck(1, 1, 0, error="out of memory"), story.now_s)
    story.deliver()
    story.submit("b", [1])
    refused = story.ends["b"]
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "NO_READY_GROUP")
    story.pass_time(CONFIG.unserved_timeout_s - 0.1)
    assert "a" not in story.ends
    story.pass_time(0.1)
    end = story.ends["a"]
    assert isinstance(end, Failed)
    assert (end.code, end.reason, end.retryable) == (StatusCode.UNAVAILABLE, "NO_READY_GROUP", True)
    assert "out of memory" not in end.message


def test_a_request_that_was_there_when_too_many_groups_died_is_given_to_no_further_one() -> None:
    story = Story(num_groups=2)
    story.submit("poison", [1, 2, 3], max_tokens=40)
    for death in range(MAX_GROUP_DEATHS):
        story.step()
        (group_id,) = [group_id for group_id in story.groups if story.group(group_id).running]
        story.detach(group_id)
        assert ("poison" in story.ends) == (death == MAX_GROUP_DEATHS - 1)
        story.attach(group_id, term=death + 2)
    end = story.ends["poison"]
    assert isinstance(end, Failed)
    assert (end.code, end.reason, end.retryable) == (StatusCode.INTERNAL, "GROUP_DIED", False)


def test_a_request_that_no_group_can_hold_any_more_keeps_nobody_else_waiting() -> None:
    story = Story(num_blocks=16)
    story.submit("large", range(20), max_tokens=20)
    story.step()
    story.detach("g0")
    story.num_blocks = 4  # the group comes back with less memory
    story.attach("g0", term=2)
    story.submit("small", [1, 2, 3])
    story.run()
    assert isinstance(story.ends.get("small"), Finished)
    if "large" not in story.ends:  # it may wait for a group that can hold it
        story.num_blocks = 16
        story.attach("g1")
        story.run()
        assert isinstance(story.ends["large"], Finished)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step_id": 7}, "step 7 came out of turn; expected: 0"),
        ({"counts": (), "token_ids": ()}, "has 0 samples of 0 tokens and 0 token ids; the plan has 1 samples"),
        ({"token_ids": ()}, "has 1 samples of 1 tokens and 0 token ids"),
        ({"counts": (2,), "token_ids": (1, 2)}, "has counts (2,)"),
        ({"row_errors": ((0, 1),)}, "with errors at [0]"),
        ({"counts": (0,), "token_ids": (), "row_errors": ((0, 99),)}, "unknown row errors [99]"),
        ({"counts": (0,), "token_ids": ()}, "has counts (0,)"),
    ],
)
def test_a_result_that_does_not_answer_its_plan_loses_the_group_and_no_token(changes: dict[str, Any], reason: str) -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9)
    story.send()
    result, _ = story.groups["g0"].rank.execute(story.plans.pop(0))
    story.scheduler.apply("g0", msgspec.structs.replace(result, **changes), story.now_s)
    story.deliver()
    (lost,) = [message for message in story.control if isinstance(message, GroupLost)]
    assert reason in lost.reason
    assert story.tokens["a"] == []
    story.attach("g0", term=2)
    story.run()
    assert isinstance(story.ends["a"], Finished)


def test_a_beam_search_without_any_candidate_does_not_end_in_silence() -> None:
    story = Story()
    story.submit("beams", [1, 2, 3], num_beams=2, n=2)
    story.plan()
    result, _ = story.groups["g0"].rank.execute(story.plans.pop(0))
    story.scheduler.apply("g0", msgspec.structs.replace(result, beam_candidates=((0, ()),)), story.now_s)
    story.deliver()
    if any(isinstance(message, GroupLost) for message in story.control):  # such a result may cost the group
        story.attach("g0", term=2)
        story.run()
    assert "beams" in story.ends


def test_a_row_without_any_allowed_token_is_the_requests_own_fault() -> None:
    story = Story()
    story.submit("narrow", list(range(9)), max_tokens=3)
    story.send()
    result, _ = story.groups["g0"].rank.execute(story.plans.pop(0))
    barred = msgspec.structs.replace(result, counts=(0,), token_ids=(), row_errors=((0, RowErrorCode.NO_ALLOWED_TOKEN),))
    story.scheduler.apply("g0", barred, story.now_s)
    story.deliver()
    end = story.ends["narrow"]
    assert isinstance(end, Failed)
    assert (end.code, end.reason, end.retryable) == (StatusCode.INVALID_ARGUMENT, "NO_ALLOWED_TOKEN", False)


def test_a_row_without_finite_logits_fails_alone_and_its_blocks_are_found_by_nobody() -> None:
    story = Story()
    story.submit("bad", list(range(9)), max_tokens=3)
    story.submit("good", [7, 8], max_tokens=3)
    story.send()
    result, ack = story.groups["g0"].rank.execute(story.plans.pop(0))
    broken = msgspec.structs.replace(result, counts=(0, 1), token_ids=result.token_ids[1:], row_errors=((0, RowErrorCode.NOT_FINITE),))
    story.scheduler.apply("g0", broken, story.now_s)
    story.scheduler.ack("g0", ack, story.now_s)
    story.deliver()
    story.run()
    end = story.ends["bad"]
    assert isinstance(end, Failed)
    assert (end.code, end.reason) == (StatusCode.INTERNAL, "NOT_FINITE")
    assert story.tokens["good"] == expected_completion([7, 8], NEUTRAL, max_tokens=3)
    story.submit("again", list(range(9)), max_tokens=3)
    story.run()
    again = story.ends["again"]
    assert isinstance(again, Finished)
    assert again.usage.num_cached_tokens == 0


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    story = Story()
    for index in range(3000):
        story.submit(f"r{index}", [1], max_tokens=1, time_left_s=600.0)
        story.cancel(f"r{index}")
    assert len(story.scheduler._deadlines) <= MAX_STALE_TIMERS + 2


@pytest.mark.parametrize(
    ("device_s", "timeout_s"),
    [
        (0.0, CONFIG.first_step_timeout_s),  # how long such a step takes is not known
        (0.1, CONFIG.min_step_timeout_s),
        (1.0, 1.0 * CONFIG.step_timeout_factor),
    ],
)
def test_a_step_that_never_ends_loses_the_group_after_a_multiple_of_what_such_a_step_takes(device_s: float, timeout_s: float) -> None:
    story = Story()
    story.device_s = device_s
    story.submit("a", [1], max_tokens=9)
    for _ in range(4):
        story.step()
    num_received = len(story.tokens["a"])
    while story.plans:  # so that the next one is timed from when it is sent
        story.answer()
    story.send()
    story.pass_time(timeout_s * 0.999)
    assert "g0" in story.scheduler.groups
    story.pass_time(timeout_s * 0.002)
    assert "g0" not in story.scheduler.groups
    (lost,) = [message for message in story.control if isinstance(message, GroupLost)]
    assert f"took longer than {timeout_s:g} s" in lost.reason
    assert num_received <= len(story.tokens["a"]) < 9
    story.attach("g0", term=2)
    story.run()
    assert isinstance(story.ends["a"], Finished)


def test_an_idle_group_gets_a_heartbeat_and_a_working_one_none_too_many() -> None:
    story = Story()
    num_at_once = story.send()
    story.now_s += story.config.heartbeat_s + 0.1
    num_later = story.send()
    assert (num_at_once, num_later) == (0, 1)
    assert (story.history[0].chunks, story.history[0].add_rows) == ((), ())
    story.answer()
    num_soon_after = story.send()
    assert num_soon_after == 0


def test_a_draining_group_finishes_what_runs_and_then_says_so() -> None:
    story = Story()
    story.submit("a", [1, 2], max_tokens=6)
    story.step()
    story.drain()
    story.submit("b", [1])
    assert isinstance(story.ends["b"], Rejected)
    story.run()
    assert story.tokens["a"] == expected_completion([1, 2], SamplingState(), max_tokens=6)
    assert sum(isinstance(message, GroupDrained) for message in story.control) == 1


def test_what_waits_for_a_group_that_comes_back_is_not_refused() -> None:
    story = Story()
    story.submit("a", [1, 2], max_tokens=6)
    story.step()
    story.submit("b", [3], max_tokens=2)
    story.drain(comes_back=True)
    story.run()
    assert story.tokens["a"] == expected_completion([1, 2], SamplingState(), max_tokens=6)
    assert sum(isinstance(message, GroupDrained) for message in story.control) == 1
    assert "b" not in story.ends
    story.attach("g0", term=2)
    story.run()
    assert story.tokens["b"] == expected_completion([3], SamplingState(), max_tokens=2)


def test_a_group_is_ready_when_its_last_rank_is_there_and_the_smallest_decides() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.attach(AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 2, 4, 100, 8, 16), 0.0)
    scheduler.rank_hello(hello(rank=0), 0.0)
    assert scheduler.take_outbox().to_controller == []
    scheduler.rank_hello(hello(rank=1, num_gpu_blocks=9), 0.0)
    (ready,) = scheduler.take_outbox().to_controller
    assert isinstance(ready, GroupReady)
    assert (ready.num_gpu_blocks, ready.max_request_tokens) == (9, 36)


def test_a_controller_that_was_started_anew_is_told_what_it_may_have_missed() -> None:
    scheduler = Scheduler(CONFIG)
    attach = AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 1, 4, 100, 8, 16)
    scheduler.attach(attach, 0.0)
    scheduler.rank_hello(hello(), 0.0)
    first = scheduler.take_outbox().to_controller
    scheduler.attach(attach, 1.0)
    assert scheduler.take_outbox().to_controller == first, "ready"
    for _ in range(2):
        scheduler.drain(DrainGroup("g0", 1))
        assert scheduler.take_outbox().to_controller == [GroupDrained("g0", 1)]
    scheduler.rank_hello(hello(), 1.0)
    scheduler.apply("g0", StepResult(1, 77), 1.0)
    (lost,) = scheduler.take_outbox().to_controller
    assert isinstance(lost, GroupLost)
    scheduler.attach(attach, 2.0)
    assert scheduler.take_outbox().to_controller == [lost]
    scheduler.attach(msgspec.structs.replace(attach, term=2), 3.0)
    scheduler.rank_hello(hello(term=2), 3.0)
    (ready,) = scheduler.take_outbox().to_controller
    assert isinstance(ready, GroupReady)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 99}, "rank 1 speaks version 99"),
        ({"layout_version": 7}, "with layout 7"),
        ({"model_fingerprint": "other"}, "rank 1 holds another model"),
    ],
)
def test_ranks_that_do_not_agree_are_refused_by_name(changes: dict[str, object], expected: str) -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.attach(AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 2, 4, 100, 8, 16), 0.0)
    scheduler.rank_hello(hello(rank=0), 0.0)
    scheduler.rank_hello(msgspec.structs.replace(hello(rank=1), **changes), 0.0)
    (lost,) = scheduler.take_outbox().to_controller
    assert isinstance(lost, GroupLost)
    assert expected in lost.reason


def test_ranks_whose_block_tables_differ_are_lost_by_name() -> None:
    scheduler = Scheduler(replace(CONFIG, checks_ranks=True))
    scheduler.attach(AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 3, 4, 100, 8, 16), 0.0)
    for rank in range(3):
        scheduler.rank_hello(hello(rank=rank), 0.0)
    plans = [scheduler.groups["g0"].heartbeat(0.0) for _ in range(2)]
    assert all(plan.debug_checksum for plan in plans)
    scheduler.take_outbox()
    # A rank may be a step ahead of another.
    for step, rank, checksum in ((0, 0, 7), (1, 0, 8), (0, 1, 7), (0, 2, 7), (1, 2, 8)):
        scheduler.ack("g0", StepAck(term=1, step_id=step, rank=rank, checksum=checksum), 0.0)
        assert not scheduler.take_outbox().to_controller
    scheduler.ack("g0", StepAck(term=1, step_id=1, rank=1, checksum=9), 0.0)
    (lost,) = scheduler.take_outbox().to_controller
    assert isinstance(lost, GroupLost)
    assert "the block tables of ranks 0 and 1 differ after step 1: 0x00000008 and 0x00000009" in lost.reason


@pytest.mark.parametrize("seed", range(60))
def test_random_stories_lose_nothing(seed: int) -> None:
    """Random arrivals, sizes, shared prefixes, stops and cancels on a small pool; replay one with -k 'random and [SEED]'."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    story = Story(
        block_size=block_size,
        num_blocks=rng.randint(12, 40) * 4 // block_size // 2,
        num_cpu_blocks=rng.choice([0, 10, 40]),
        max_rows=rng.randint(2, 6),
        max_batched_tokens=rng.randint(6, 24),
        num_groups=rng.choice([1, 2]),
        config=config(max_waiting_requests=20, max_waiting_tokens=400),
    )
    submitted: set[str] = set()
    cancelled: set[str] = set()
    base = [rng.randrange(50) for _ in range(12)]
    for index in range(150):
        if rng.random() < 0.3:
            name = f"r{index}"
            prompt = base[: rng.randint(0, 12)] + [rng.randrange(50) for _ in range(rng.randint(1, 5))]
            sampling = SamplingState(seed=rng.randrange(3), stop_ids=tuple(rng.sample(range(997), 120)), min_tokens=rng.randint(0, 2))
            story.submit(name, prompt, max_tokens=rng.randint(1, 8), n=rng.choice([1, 1, 2]), sampling=sampling)
            if name not in story.ends:
                submitted.add(name)
        if submitted and rng.random() < 0.05:
            name = rng.choice(sorted(submitted))
            if name not in story.ends:
                cancelled.add(name)
                story.cancel(name)
        if rng.random() < 0.7:
            story.send()
        for group_id in list(story.groups):
            if story.groups[group_id].plans and rng.random() < 0.8:
                story.answer(group_id)
    story.run()
    assert all(group.pool.num_held == group.cpu_pool.num_held == 0 for group in story.scheduler.groups.values())
    for name in submitted - cancelled:
        assert isinstance(story.ends[name], Finished), name


@pytest.mark.parametrize(("preemption", "num_blocks"), [("swap", 60), ("recompute", 49)])
def test_a_row_that_waits_for_its_share_and_is_preempted_meanwhile_is_not_held(preemption: str, num_blocks: int) -> None:
    """More rows decode than a step has tokens for beside a prompt, so some wait; ranks refuse to hold a row that they have removed."""
    story = Story(
        block_size=8,
        num_blocks=num_blocks,
        num_cpu_blocks=200,
        max_rows=16,
        max_batched_tokens=16,
        max_model_len=1000,
        preemption=preemption,
        config=config(max_waiting_requests=100, max_waiting_tokens=100_000),
    )
    story.submit("long", [1] * 150, max_tokens=5, priority=3)
    for number in range(15):
        story.submit(f"short{number}", [100 + number] * 2, max_tokens=30)
    story.run()
    assert {plan.step_id for plan in story.history if plan.hold_rows}, "nobody waited"
    ends = [end for end in story.ends.values() if isinstance(end, Finished)]
    assert [end.reason for end in ends] == [EndReason.LENGTH] * 16, story.ends
    assert any(end.num_preemptions for end in ends), "nobody was preempted"
