"""The Scheduler object alone, in this process: what planning costs, without sockets and encoding."""

import gc
import time
from typing import Final

from quire.bench.echo_rank import EchoRank, echo
from quire.bench.scheduler_feed import BLOCK_SIZE, GATEWAY, TERM, attach_group, rank_hello, submit
from quire.bench.steady_decode import GROUP_ID, MAX_PROMPT_TOKENS, SteadyDecode
from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.messages import PROTOCOL_VERSION, Hello, StepPlan, Submit, Tokens

# Nothing that is measured depends on the time, so it stands still.
NOW_S: Final = 0.0
# Tokens of a prompt that admission finds cached when prompts share a prefix, as with a long system prompt.
NUM_SHARED_TOKENS: Final = 960


class SteadyScheduler:
    """A Scheduler in steady decode."""

    def __init__(self, load: SteadyDecode) -> None:
        self._num_running = load.num_running
        self._scheduler = _scheduler(max_waiting=load.num_running)
        self._scheduler.attach(load.attach(), NOW_S)
        self._scheduler.rank_hello(load.hello(), NOW_S)
        for request in load.submits():
            self._scheduler.submit(GATEWAY, request, NOW_S)
        self._rank = EchoRank()
        self._num_done = 0  # steps with their result
        self._plan = self._next_plan()
        while self._plan.chunks or self._rank.num_samples < self._num_running:
            result, ack = self._rank.execute(self._plan)
            self._plan = self._next_plan()
            self._scheduler.apply(GROUP_ID, result, NOW_S)
            self._scheduler.ack(GROUP_ID, ack, NOW_S)
            self._num_done += 1
        self._scheduler.take_outbox()

    def measure(self, num_steps: int) -> float:
        """Microseconds of CPU per sequence and step, of the next `num_steps` ones: plan k + 1, apply result k."""
        scheduler, plan, outbox = self._scheduler, None, self._scheduler.take_outbox()
        steps = range(self._num_done, self._num_done + num_steps)
        answers = [echo(TERM, step_id, self._num_running) for step_id in steps]
        gc.collect()
        start_s = time.thread_time()
        for result, ack in answers:
            plan = scheduler.next_plan(GROUP_ID, NOW_S)
            scheduler.apply(GROUP_ID, result, NOW_S)
            scheduler.ack(GROUP_ID, ack, NOW_S)
            outbox = scheduler.take_outbox()
        spent_s = time.thread_time() - start_s
        self._num_done += num_steps
        # Steps are numbered densely, so the last plan says that there was one in each turn.
        assert plan is not None, "there was nothing to plan"
        assert plan.step_id == self._num_done, plan
        [(_, tokens)] = outbox.to_gateways
        assert isinstance(tokens, Tokens), tokens
        assert len(tokens.token_ids) == self._num_running, "a sequence ended, or was not planned"
        return spent_s * 1e6 / (self._num_running * num_steps)

    def _next_plan(self) -> StepPlan:
        plan = self._scheduler.next_plan(GROUP_ID, NOW_S)
        assert plan is not None, "there is room in the group for every request"
        return plan


class AdmittingScheduler:
    """A Scheduler with idle groups, each with room for one request; its requests come one at a time and end with their first token.

    With shares_prefix every prompt begins with the same NUM_SHARED_TOKENS tokens, which every group has cached.
    """

    def __init__(self, num_groups: int, *, shares_prefix: bool) -> None:
        self._num_shared_tokens = NUM_SHARED_TOKENS if shares_prefix else 0
        self._num_submitted = 0
        self._scheduler = _scheduler(max_waiting=num_groups)
        self._ranks: dict[str, EchoRank] = {f"g{number}": EchoRank() for number in range(num_groups)}
        for group_id in self._ranks:
            self._scheduler.attach(attach_group(group_id, max_sequences=1, max_model_len=2 * MAX_PROMPT_TOKENS), NOW_S)
            # Room for a second prompt in the cache.
            num_blocks = 2 * (MAX_PROMPT_TOKENS // BLOCK_SIZE + 1)
            self._scheduler.rank_hello(rank_hello(group_id, num_gpu_blocks=num_blocks, max_rows=1), NOW_S)
        if shares_prefix:  # one request for each group's only row
            for request in self._requests(num_groups):
                self._scheduler.submit(GATEWAY, request, NOW_S)
            self._answer(self._turn())

    def measure(self, num_requests: int) -> float:
        """Microseconds of CPU per request, from its submission to the first plan with it: what a turn of the scheduler's process
        does, which asks every group for its plan."""
        requests = self._requests(num_requests)
        gc.collect()
        spent_s = 0.0
        for request in requests:
            start_s = time.thread_time()
            self._scheduler.submit(GATEWAY, request, NOW_S)
            plans = self._turn()
            spent_s += time.thread_time() - start_s
            [(_, plan)] = plans
            [add] = plan.add_rows
            assert add.token_ids == request.prompt_ids, "the plan is of another request"
            assert add.num_computed == self._num_shared_tokens, add.num_computed
            self._answer(plans)
        return spent_s * 1e6 / num_requests

    def _requests(self, count: int) -> list[Submit]:
        first, self._num_submitted = self._num_submitted, self._num_submitted + count
        return [
            submit(number, num_prompt_tokens=MAX_PROMPT_TOKENS, max_tokens=1, num_shared_tokens=self._num_shared_tokens)
            for number in range(first, first + count)
        ]

    def _turn(self) -> list[tuple[str, StepPlan]]:
        """Every plan that can be made now."""
        scheduler = self._scheduler
        scheduler.tick(NOW_S)
        plans = [(group_id, plan) for group_id in list(scheduler.groups) if (plan := scheduler.next_plan(group_id, NOW_S)) is not None]
        scheduler.take_outbox()
        return plans

    def _answer(self, plans: list[tuple[str, StepPlan]]) -> None:
        """Until every group is idle again."""
        while plans:
            for group_id, plan in plans:
                result, ack = self._ranks[group_id].execute(plan)
                self._scheduler.apply(group_id, result, NOW_S)
                self._scheduler.ack(group_id, ack, NOW_S)
            plans = self._turn()


def _scheduler(*, max_waiting: int) -> Scheduler:
    scheduler = Scheduler(
        SchedulerConfig("bench", max_waiting_requests=max(1, max_waiting), max_waiting_tokens=max(1, max_waiting) * MAX_PROMPT_TOKENS)
    )
    scheduler.hello(GATEWAY, Hello(PROTOCOL_VERSION, GATEWAY.decode()))
    return scheduler
