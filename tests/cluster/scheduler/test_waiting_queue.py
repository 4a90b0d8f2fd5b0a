"""The order of waiting requests, beside a twin that sorts them all anew at every look."""

from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from slow_waiting_queue import SlowWaitingQueue, Waiting

from quire.cluster.scheduler import waiting_queue
from quire.cluster.scheduler.request import Request
from quire.cluster.scheduler.waiting_queue import WaitingQueue
from quire.common.messages import SamplingState, SequenceStart, Submit

AGEING_S: Final = 2.0
PATIENCE_S: Final = 3.0
MAX_REQUESTS: Final = 6
MAX_TOKENS: Final = 40
WEIGHTS: Final = {"double": 2.0}
TENANTS: Final = ["double", "single", "other"]
MODELS: Final = ["m", "n"]
# Quarters of a second are exact in floating point, so that both sides see an age at the same moment.
QUARTERS: Final = st.integers(0, 12).map(lambda quarters: quarters / 4)


def new_queue() -> WaitingQueue:
    return WaitingQueue(max_requests=MAX_REQUESTS, max_tokens=MAX_TOKENS, ageing_s=AGEING_S, patience_s=PATIENCE_S, tenant_weights=WEIGHTS)


def request(
    handle: int,
    *,
    model: str = "m",
    tenant: str = "single",
    priority: int = 2,
    num_tokens: int = 1,
    arrival_s: float = 0.0,
    deadline_s: float = 100.0,
) -> Request:
    submit = Submit(
        request_id=str(handle),
        attempt=0,
        tenant=tenant,
        priority=priority,
        model=model,
        adapter="",
        prompt_ids=(7,) * num_tokens,
        block_hashes=(),
        cache_root=b"",
        sequences=(SequenceStart(0),),
        n=1,
        sampling=SamplingState(),
        max_tokens=1,
        time_left_s=0.0,
        age_s=0.0,
    )
    return Request(handle=handle, gateway=b"gateway", submit=submit, arrival_s=arrival_s, deadline_s=deadline_s)


class QueueBesideItsTwin(RuleBasedStateMachine):
    """Requests arrive, are taken out to run, come back preempted and end, while time passes and tenants are charged."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = new_queue()
        self.twin = SlowWaitingQueue(ageing_s=AGEING_S, patience_s=PATIENCE_S, weights=WEIGHTS)
        self.now_s = 10.0
        self.requests: list[Request] = []
        self.running: list[Request] = []

    @rule(
        model=st.sampled_from(MODELS),
        tenant=st.sampled_from(TENANTS),
        priority=st.integers(1, 3),
        num_tokens=st.integers(1, 20),
        age_s=QUARTERS,
        time_left_s=QUARTERS,
    )
    def arrive(self, model: str, tenant: str, priority: int, num_tokens: int, age_s: float, time_left_s: float) -> None:
        has_room = len(self.twin.waiting) < MAX_REQUESTS and self.num_waiting_tokens() + num_tokens <= MAX_TOKENS
        assert self.queue.has_room(num_tokens) == has_room
        if not has_room:
            return
        new = request(
            len(self.requests),
            model=model,
            tenant=tenant,
            priority=priority,
            num_tokens=num_tokens,
            arrival_s=self.now_s - age_s,
            deadline_s=self.now_s + time_left_s,
        )
        self.requests.append(new)
        self.queue.open_account(tenant)
        self.twin.open_account(tenant)
        self.push(new, level=priority, since_s=new.arrival_s)

    @precondition(lambda self: self.twin.waiting)
    @rule(data=st.data())
    def begin_to_run(self, data: st.DataObject) -> None:
        waiting = data.draw(st.sampled_from(self.twin.waiting))
        self.twin.waiting.remove(waiting)
        taken = self.requests[waiting.handle]
        self.queue.remove(taken)
        assert taken.level == self.twin.level(waiting, self.now_s)
        self.running.append(taken)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def come_back_preempted(self, data: st.DataObject) -> None:
        """Whatever the bounds of the queue: it was let in once. It keeps the class that it had risen to."""
        back = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        back.num_preemptions += 1
        self.push(back, level=back.level, since_s=self.now_s)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        tenant = self.running.pop(data.draw(st.integers(0, len(self.running) - 1))).submit.tenant
        self.queue.close_account(tenant)
        self.twin.accounts[tenant].num_active -= 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 20))
    def serve(self, data: st.DataObject, num_tokens: int) -> None:
        tenant = data.draw(st.sampled_from(self.running)).submit.tenant
        self.queue.charge(tenant, num_tokens)
        self.twin.charge(tenant, num_tokens)

    @rule(passed_s=QUARTERS)
    def wait(self, passed_s: float) -> None:
        levels = [self.twin.level(waiting, self.now_s) for waiting in self.twin.waiting]
        self.now_s += passed_s
        any_rose = levels != [self.twin.level(waiting, self.now_s) for waiting in self.twin.waiting]
        due_s = self.queue.next_rise_s()
        assert not any_rose or (due_s is not None and due_s <= self.now_s), "nobody would wake up to let a request rise"
        assert self.queue.rise(self.now_s) == any_rose

    @invariant()
    def they_agree(self) -> None:
        self.queue.check()
        for model in MODELS:
            assert [waiting.handle for waiting in self.queue.in_order(model)] == self.twin.in_order(model, self.now_s)
        assert sorted(self.queue.models()) == sorted({waiting.model for waiting in self.twin.waiting})
        assert (len(self.queue), self.queue.num_tokens) == (len(self.twin.waiting), self.num_waiting_tokens())
        first = self.queue.first()
        earliest_s = min((waiting.arrival_s for waiting in self.twin.waiting), default=None)
        assert (first.arrival_s if first else None) == earliest_s

    def push(self, request: Request, *, level: int, since_s: float) -> None:
        self.queue.push(request, self.now_s)
        submit = request.submit
        self.twin.waiting.append(
            Waiting(
                handle=request.handle,
                model=submit.model,
                tenant=submit.tenant,
                num_tokens=len(submit.prompt_ids),
                arrival_s=request.arrival_s,
                deadline_s=request.deadline_s,
                is_preempted=request.is_preempted,
                level=level,
                since_s=since_s,
            )
        )
        self.queue.rise(self.now_s)  # a request may come with an age

    def num_waiting_tokens(self) -> int:
        return sum(waiting.num_tokens for waiting in self.twin.waiting)


def test_the_queue_is_in_the_order_that_its_slow_twin_finds_by_sorting() -> None:
    run_state_machine_as_test(QueueBesideItsTwin, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))


def test_idle_tenants_are_forgotten_when_there_are_many_and_those_that_wait_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_queue, "MAX_IDLE_TENANTS", 5)
    queue = new_queue()
    queue.open_account("waits")
    queue.charge("waits", 7)
    for index in range(1000):
        queue.open_account(f"t{index}")
        queue.close_account(f"t{index}")
    assert len(queue._tenants) <= 2 * 5 + 1
    queue.close_account("waits")
    queue.open_account("waits")
    assert queue._tenants["waits"].served == 7, "what an active tenant was served is forgotten"
