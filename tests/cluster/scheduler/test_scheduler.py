"""The whole scheduler with ranks in simulation: stories, then random ones from a seed."""

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from fake_ranks import FakeRank, expected_completion, hello

from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.cluster.scheduler.timers import MAX_STALE_TIMERS
from quire.common.errors import StatusCode
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    Cancel,
    DrainGroup,
    EndReason,
    Failed,
    Finish,
    Finished,
    GroupDrained,
    GroupLost,
    GroupReady,
    Hello,
    Rejected,
    RowErrorCode,
    SamplingState,
    SequenceStart,
    StepAck,
    StepPlan,
    Submit,
    Tokens,
    Welcome,
)

GATEWAY = b"gateway"
CONFIG = SchedulerConfig("s", max_waiting_requests=8, max_waiting_tokens=100)
NEUTRAL = SamplingState()
ROOT = cache_root(model="m", adapter="", tenant_scope="local", cache_salt="")


@dataclass
class Story:
    """A scheduler with one group of simulated ranks, and what a gateway saw of each request."""

    block_size: int = 4
    num_blocks: int = 16
    max_rows: int = 8
    max_batched_tokens: int = 16
    config: SchedulerConfig = CONFIG
    now_s: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, Finished | Failed | Rejected] = field(default_factory=dict)
    control: list[object] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)  # sent, not executed
    history: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.ranks = FakeRank(block_size=self.block_size, num_blocks=self.num_blocks)
        self._names: dict[int, str] = {}
        self.welcomes: list[Welcome] = []
        self.scheduler.attach(
            AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 1, self.block_size, 1000, self.max_rows, self.max_batched_tokens), 0.0
        )
        self.scheduler.hello(GATEWAY, Hello(PROTOCOL_VERSION, "gateway"))
        self.scheduler.rank_hello(hello(num_gpu_blocks=self.num_blocks, max_rows=self.max_rows), 0.0)
        self.deliver()

    def submit(
        self,
        name: str,
        prompt_ids: list[int],
        *,
        max_tokens: int = 4,
        attempt: int = 0,
        time_left_s: float = 100.0,
        sampling: SamplingState = NEUTRAL,
        resumed_ids: tuple[int, ...] = (),
    ) -> None:
        self.scheduler.submit(
            GATEWAY,
            Submit(
                request_id=name,
                attempt=attempt,
                tenant="local",
                priority=2,
                model="m",
                adapter="",
                prompt_ids=tuple(prompt_ids),
                block_hashes=tuple(hash_full_blocks(ROOT, prompt_ids, block_size=self.block_size)),
                cache_root=ROOT,
                sequences=(SequenceStart(0, resumed_ids),),
                n=1,
                sampling=sampling,
                max_tokens=max_tokens,
                time_left_s=time_left_s,
                age_s=0.0,
            ),
            self.now_s,
        )
        self.tokens[name] = list(resumed_ids)
        self.deliver()

    def send(self) -> int:
        """Make plans as far as the scheduler goes; how many."""
        count = 0
        while (plan := self.scheduler.next_plan("g0", self.now_s)) is not None:
            self.plans.append(plan)
            self.history.append(plan)
            count += 1
            self.scheduler.check()
        return count

    def answer(self) -> None:
        """The ranks do the oldest plan, and the scheduler hears of it."""
        plan = self.plans.pop(0)
        result, ack = self.ranks.execute(plan)
        self.scheduler.apply("g0", result, self.now_s)
        self.scheduler.ack("g0", ack, self.now_s)
        self.deliver()

    def step(self) -> None:
        self.now_s += 0.01
        self.scheduler.tick(self.now_s)
        self.send()
        if self.plans:
            self.answer()
        self.deliver()

    def run(self, *, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.plans and not self.send():
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")

    def deliver(self) -> None:
        self.scheduler.check()
        outbox = self.scheduler.take_outbox()
        self.control += outbox.to_controller
        for _, message in outbox.to_gateways:
            match message:
                case Welcome():
                    self.welcomes.append(message)
                case Accepted():
                    self._names[message.handle] = message.request_id
                case Rejected():
                    self.ends[message.request_id] = message
                case Tokens():
                    columns = (message.handles, message.first_offsets, message.counts, message.token_ids)
                    for handle, offset, count, token_id in zip(*columns, strict=True):
                        name = self._names[handle]
                        assert name not in self.ends, "a token came after the end"
                        assert (offset, count) == (len(self.tokens[name]), 1)
                        self.tokens[name].append(token_id)
                case Finished() | Failed():
                    name = self._names[message.handle]
                    assert name not in self.ends, "a request ended twice"
                    self.ends[name] = message


def test_figure_6_of_the_paper_a_block_is_given_only_when_the_last_one_is_full() -> None:
    """Seven prompt tokens in blocks of four take two blocks; the eighth token fills the second, the ninth takes a third."""
    story = Story()
    story.submit("four score", [1, 2, 3, 4, 5, 6, 7], max_tokens=4)
    story.run()
    added = story.history[0].add_rows[0]
    assert added.block_ids == (0, 1)  # prompt: 4 + 3 slots, one left
    assert [plan.grow_block_ids for plan in story.history] == [(), (), (2,), (), ()]
    assert story.tokens["four score"] == expected_completion([1, 2, 3, 4, 5, 6, 7], SamplingState(), max_tokens=4)


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


def test_requests_wait_in_order_while_the_pool_cannot_hold_all_they_may_need() -> None:
    story = Story(num_blocks=4)
    story.submit("big", [1, 2, 3, 4, 5], max_tokens=7)  # 12 tokens, 3 blocks
    story.submit("second", [9, 9, 9, 9, 9], max_tokens=7)
    story.submit("small", [3], max_tokens=2)  # would fit beside the first, but came last
    story.step()
    assert len(story.scheduler.queue) == 2
    story.run()
    assert list(story.ends) == ["big", "small", "second"]  # both that waited began together, once the first had ended
    for name, prompt, count in (("big", [1, 2, 3, 4, 5], 7), ("second", [9] * 5, 7), ("small", [3], 2)):
        assert story.tokens[name] == expected_completion(prompt, SamplingState(), max_tokens=count)


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
    story.scheduler.cancel(GATEWAY, Cancel("a", 0, None, "client"))
    story.scheduler.cancel(GATEWAY, Cancel("a", 0, None, "client"))  # crossing messages are ignored
    story.run()
    group = story.scheduler.groups["g0"]
    assert group.pool.num_held == 0
    assert story.tokens["b"] == expected_completion([4, 5], SamplingState(), max_tokens=10)


def test_a_finish_from_the_gateway_counts_the_tokens_that_it_kept() -> None:
    story = Story()
    story.submit("a", [1], max_tokens=30)
    for _ in range(6):
        story.step()
    story.scheduler.finish(GATEWAY, Finish("a", 0, 0, kept_tokens=3), story.now_s)
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
    assert story.scheduler.groups["g0"].pool.num_held == 0


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


def test_a_failed_rank_ends_the_group_and_its_requests_say_so() -> None:
    story = Story()
    story.submit("a", [1, 2, 3], max_tokens=9)
    story.step()
    story.scheduler.ack("g0", StepAck(1, 1, 0, error="out of memory"), story.now_s)
    story.deliver()
    (lost,) = [message for message in story.control if isinstance(message, GroupLost)]
    assert "out of memory" in lost.reason
    end = story.ends["a"]
    assert isinstance(end, Failed)
    assert (end.code, end.retryable) == (StatusCode.UNAVAILABLE, True)
    assert "out of memory" not in end.message, "clients are not told of our insides"
    story.submit("b", [1])
    assert isinstance(story.ends["b"], Rejected)


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
    result, _ = story.ranks.execute(story.plans.pop(0))
    story.scheduler.apply("g0", msgspec.structs.replace(result, **changes), story.now_s)
    story.deliver()
    (lost,) = [message for message in story.control if isinstance(message, GroupLost)]
    assert reason in lost.reason
    assert isinstance(story.ends["a"], Failed)
    assert story.tokens["a"] == []


def test_a_row_without_finite_logits_fails_alone_and_its_blocks_are_found_by_nobody() -> None:
    story = Story()
    story.submit("bad", list(range(9)), max_tokens=3)
    story.submit("good", [7, 8], max_tokens=3)
    story.send()
    result, _ = story.ranks.execute(story.plans.pop(0))
    broken = msgspec.structs.replace(result, counts=(0, 1), token_ids=result.token_ids[1:], row_errors=((0, RowErrorCode.NOT_FINITE),))
    story.scheduler.apply("g0", broken, story.now_s)
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
        story.scheduler.cancel(GATEWAY, Cancel(f"r{index}", 0, None, "client"))
        story.deliver()
    assert len(story.scheduler._deadlines) <= MAX_STALE_TIMERS + 2


def test_a_step_that_never_ends_loses_the_group() -> None:
    story = Story()
    story.submit("a", [1], max_tokens=9)
    story.send()
    story.now_s += story.config.step_timeout_s + 1
    story.scheduler.tick(story.now_s)
    story.deliver()
    assert isinstance(story.ends["a"], Failed)
    assert "g0" not in story.scheduler.groups


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
    story.scheduler.drain(DrainGroup("g0", 1))
    story.deliver()
    story.submit("b", [1])
    assert isinstance(story.ends["b"], Rejected)
    story.run()
    assert story.tokens["a"] == expected_completion([1, 2], SamplingState(), max_tokens=6)
    assert sum(isinstance(message, GroupDrained) for message in story.control) == 1


def test_a_group_is_ready_when_its_last_rank_is_there_and_the_smallest_decides() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.attach(AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 2, 4, 100, 8, 16), 0.0)
    scheduler.rank_hello(hello(rank=0), 0.0)
    assert scheduler.take_outbox().to_controller == []
    scheduler.rank_hello(hello(rank=1, num_gpu_blocks=9), 0.0)
    (ready,) = scheduler.take_outbox().to_controller
    assert isinstance(ready, GroupReady)
    assert (ready.num_gpu_blocks, ready.max_request_tokens) == (9, 36)


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


@pytest.mark.parametrize("seed", range(60))
def test_random_stories_lose_nothing(seed: int) -> None:
    """Random arrivals, sizes, shared prefixes, stops and cancels on a small pool; replay one with -k 'random and [SEED]'."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    story = Story(
        block_size=block_size,
        num_blocks=rng.randint(12, 40) * 4 // block_size // 2,
        max_rows=rng.randint(1, 6),
        max_batched_tokens=rng.randint(6, 24),
        config=SchedulerConfig("s", max_waiting_requests=20, max_waiting_tokens=400),
    )
    wanted: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    base = [rng.randrange(50) for _ in range(12)]
    for index in range(150):
        if rng.random() < 0.3:
            name = f"r{index}"
            prompt = base[: rng.randint(0, 12)] + [rng.randrange(50) for _ in range(rng.randint(1, 5))]
            max_tokens = rng.randint(1, 8)
            sampling = SamplingState(seed=rng.randrange(3), stop_ids=tuple(rng.sample(range(997), 120)), min_tokens=rng.randint(0, 2))
            story.submit(name, prompt, max_tokens=max_tokens, sampling=sampling)
            if name not in story.ends:
                wanted[name] = expected_completion(prompt, sampling, max_tokens=max_tokens)
        if wanted and rng.random() < 0.05:
            name = rng.choice(list(wanted))
            if name not in story.ends:
                cancelled.add(name)
                story.scheduler.cancel(GATEWAY, Cancel(name, 0, None, "client"))
        if rng.random() < 0.7:
            story.send()
        if story.plans and rng.random() < 0.8:
            story.answer()
        story.deliver()
    story.run()
    assert story.scheduler.groups["g0"].pool.num_held == 0
    for name, completion in wanted.items():
        if name in cancelled:
            assert completion[: len(story.tokens[name])] == story.tokens[name]
        else:
            assert isinstance(story.ends[name], Finished), name
            assert story.tokens[name] == completion, name
