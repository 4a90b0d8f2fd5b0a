"""A scheduler with groups of simulated ranks and one gateway, in lock step and without chance: for tests that tell a story.

Every token that arrives is compared with what the pretended model says without any scheduler, and a sequence that ends must
have them all. `check` runs after every event, and no sequence may hold a block that it does not use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
from beam_reference import reference_beam_search
from fake_ranks import FakeRank, expected_completion, hello
from scripted_model import ScriptedModel

from quire.cluster.scheduler.group import Group
from quire.cluster.scheduler.request import RequestState
from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    BeamSearch,
    Cancel,
    ControlUp,
    DetachGroup,
    DrainGroup,
    Failed,
    Finish,
    Finished,
    GroupLost,
    Hello,
    PromptLogprobs,
    Rejected,
    SamplingState,
    SequenceStart,
    SessionUp,
    StepPlan,
    Submit,
    Tokens,
    Welcome,
)

GATEWAY: Final = b"gateway"
CONFIG: Final = SchedulerConfig("s", max_waiting_requests=8, max_waiting_tokens=100)
NEUTRAL: Final = SamplingState()
STEP_S: Final = 0.01  # how far the clock moves with every step


@dataclass
class RankGroup:
    """The ranks of one group under one term, and the plans on their way to them."""

    group_id: str
    term: int
    rank: FakeRank
    plans: list[StepPlan] = field(default_factory=list)  # sent, not executed
    history: list[StepPlan] = field(default_factory=list)  # all that were sent


@dataclass
class Story:
    """Groups g0, g1, … of one size each, and what a gateway and the controller saw."""

    block_size: int = 4
    num_blocks: int = 16
    num_cpu_blocks: int = 0
    max_rows: int = 8
    max_batched_tokens: int = 16
    max_model_len: int = 1000
    num_groups: int = 1
    preemption: str = "auto"
    prefill_tokens_per_s: float = 0.0  # what the ranks measured; 0 is nothing
    config: SchedulerConfig = CONFIG

    def __post_init__(self) -> None:
        self.now_s = 0.0
        self.model = ScriptedModel()
        self.scheduler = Scheduler(self.config)
        self.groups: dict[str, RankGroup] = {}
        self.submitted: dict[str, Submit] = {}
        self.completions: dict[tuple[str, int], list[int]] = {}  # tokens received, by (request, sequence)
        self.ends: dict[str, Finished | Failed | Rejected] = {}
        self.sequence_ends: dict[tuple[str, int], Finished] = {}
        self.messages: list[SessionUp] = []  # all that the gateway got
        self.welcomes: list[Welcome] = []
        self.control: list[ControlUp] = []
        self.copies_are_slow = False  # they end only when a plan waits for them
        self.copies_fail = False
        self.device_s = 0.0  # how long the ranks say that their steps take; 0 is not measured
        self._names: dict[int, str] = {}  # of requests, by handle
        self._expected: dict[str, list[list[int]]] = {}
        self._kept: set[tuple[str, int]] = set()  # sequences that the gateway ended
        for index in range(self.num_groups):
            self.attach(f"g{index}")
        self.scheduler.hello(GATEWAY, Hello(PROTOCOL_VERSION, "gateway"))
        self.deliver()

    # -- what was seen --------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Tokens received of each request's first sequence."""
        return {name: tokens for (name, index), tokens in self.completions.items() if index == 0}

    @property
    def plans(self) -> list[StepPlan]:
        return self.groups["g0"].plans

    @property
    def history(self) -> list[StepPlan]:
        return self.groups["g0"].history

    def group(self, group_id: str = "g0") -> Group:
        """The group as the scheduler sees it."""
        return self.scheduler.groups[group_id]

    def name(self, handle: int) -> str:
        return self._names[handle]

    def expected(self, name: str) -> list[list[int]]:
        """The completions of a request, by sequence, without any scheduler. Those of a search are its best, best first."""
        if name not in self._expected:
            submit = self.submitted[name]
            prompt, sampling, most = submit.prompt_ids, submit.sampling, submit.max_tokens
            if submit.beam is not None:
                best = reference_beam_search(prompt, sampling, submit.beam, max_tokens=most, candidates=self.model.candidates)
                self._expected[name] = [hypothesis.tokens for hypothesis in best[: submit.n]]
            else:
                self._expected[name] = [
                    expected_completion(prompt, sampling, max_tokens=most, index=start.index, draw=self.model.draw)
                    for start in submit.sequences
                ]
        return self._expected[name]

    # -- controller -----------------------------------------------------------------------------------------------------

    def attach(self, group_id: str, *, term: int = 1) -> None:
        """A group comes, or comes again under a higher term, with empty pools."""
        self.scheduler.attach(
            AttachGroup(
                PROTOCOL_VERSION,
                group_id,
                term,
                "m",
                1,
                self.block_size,
                self.max_model_len,
                self.max_rows,
                self.max_batched_tokens,
                self.preemption,
            ),
            self.now_s,
        )
        message = hello(
            group_id,
            term=term,
            num_gpu_blocks=self.num_blocks,
            num_cpu_blocks=self.num_cpu_blocks,
            max_rows=self.max_rows,
            prefill_tokens_per_s=((self.max_model_len, self.prefill_tokens_per_s),) if self.prefill_tokens_per_s else (),
            copy_bytes_per_s=1e9,
        )
        self.groups[group_id] = RankGroup(
            group_id,
            term,
            FakeRank(
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                num_cpu_blocks=self.num_cpu_blocks,
                term=term,
                waits_for=lambda copy_id: self.copies_are_slow,
                fails=lambda copy_id: self.copies_fail,
                draw=self.model.draw,
                candidates=self.model.candidates,
            ),
        )
        self.scheduler.rank_hello(message, self.now_s)
        self.deliver()

    def detach(self, group_id: str, *, reason: str = "a rank died") -> None:
        """The controller says that the group's term is over."""
        self.scheduler.detach(DetachGroup(group_id, self.groups.pop(group_id).term, reason), self.now_s)
        self.deliver()

    def drain(self, group_id: str = "g0", *, comes_back: bool = False) -> None:
        self.scheduler.drain(DrainGroup(group_id, self.groups[group_id].term, comes_back))
        self.deliver()

    # -- gateway --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        name: str,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int = 4,
        n: int = 1,
        num_beams: int = 0,
        tenant: str = "local",
        priority: int = 2,
        attempt: int = 0,
        time_left_s: float = 100.0,
        sampling: SamplingState = NEUTRAL,
        resumed_ids: tuple[int, ...] = (),
        cache_salt: str = "",
    ) -> None:
        """A request arrives. num_beams: it is a beam search."""
        root = cache_root(model="m", adapter="", tenant_scope=tenant, cache_salt=cache_salt)
        submit = Submit(
            request_id=name,
            attempt=attempt,
            tenant=tenant,
            priority=priority,
            model="m",
            adapter="",
            prompt_ids=tuple(prompt_ids),
            block_hashes=tuple(hash_full_blocks(root, prompt_ids, block_size=self.block_size)),
            cache_root=root,
            sequences=tuple(SequenceStart(index, resumed_ids) for index in range(num_beams or n)),
            n=n,
            sampling=sampling,
            max_tokens=max_tokens,
            time_left_s=time_left_s,
            age_s=0.0,
            beam=BeamSearch(num_beams) if num_beams else None,
        )
        self.submitted[name] = submit
        self._expected.pop(name, None)
        for index in range(n):
            self.completions[name, index] = list(resumed_ids)
        self.scheduler.submit(GATEWAY, submit, self.now_s)
        self.deliver()

    def cancel(self, name: str, *, sequence: int | None = None) -> None:
        self.scheduler.cancel(GATEWAY, Cancel(name, self.submitted[name].attempt, sequence, "client"))
        self.deliver()

    def finish(self, name: str, *, kept_tokens: int, sequence: int = 0) -> None:
        """The gateway saw a stop string behind so many tokens."""
        self._kept.add((name, sequence))
        self.scheduler.finish(GATEWAY, Finish(name, self.submitted[name].attempt, sequence, kept_tokens), self.now_s)
        self.deliver()

    # -- steps ----------------------------------------------------------------------------------------------------------

    def plan(self, group_id: str = "g0") -> StepPlan | None:
        """Send the next plan, if there is one."""
        plan = self.scheduler.next_plan(group_id, self.now_s)
        self.scheduler.check()
        if plan is not None:
            group = self.groups[group_id]
            group.plans.append(plan)
            group.history.append(plan)
            self._check_waste(group_id)
        return plan

    def send(self) -> int:
        """Make plans for all groups as far as the scheduler goes; how many."""
        count = 0
        for group_id in list(self.groups):
            while self.plan(group_id) is not None:
                count += 1
        return count

    def answer(self, group_id: str = "g0") -> None:
        """The ranks do the oldest plan, and the scheduler hears of it."""
        group = self.groups[group_id]
        result, ack = group.rank.execute(group.plans.pop(0))
        result = msgspec.structs.replace(result, device_s=self.device_s)
        self.scheduler.apply(group_id, result, self.now_s)
        self.scheduler.ack(group_id, ack, self.now_s)
        self.deliver()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.scheduler.tick(self.now_s)
        self.deliver()

    def step(self) -> None:
        """A moment passes, all plans that can be made are sent, and each group's oldest is answered."""
        self.pass_time(STEP_S)
        self.send()
        for group in list(self.groups.values()):
            if group.plans:
                self.answer(group.group_id)

    def run(self, *, max_steps: int = 1000) -> None:
        """Go on until nothing is left to do."""
        for _ in range(max_steps):
            if not any(group.plans for group in self.groups.values()) and not self.send():
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")

    # -- helpers --------------------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        """The scheduler's messages arrive."""
        self.scheduler.check()
        outbox = self.scheduler.take_outbox()
        for control in outbox.to_controller:
            self.control.append(control)
            if isinstance(control, GroupLost) and self.groups[control.group_id].term == control.term:
                del self.groups[control.group_id]
        for gateway, message in outbox.to_gateways:
            assert gateway == GATEWAY
            self.messages.append(message)
            self._receive(message)

    def _receive(self, message: SessionUp) -> None:
        match message:
            case Welcome():
                self.welcomes.append(message)
            case Accepted():
                self._names[message.handle] = message.request_id
            case Rejected():
                self.ends[message.request_id] = message
            case Tokens():
                self._receive_tokens(message)
            case Finished():
                name, index = self._names[message.handle], message.sequence
                assert not self._has_ended(name, index), f"{name}.{index} ended twice"
                received, expected = self.completions[name, index], self.expected(name)[index]
                assert (name, index) in self._kept or received == expected, f"{name}.{index} ended after {len(received)} tokens"
                self.sequence_ends[name, index] = message
                if message.is_last:
                    self.ends[name] = message
            case Failed():
                name = self._names[message.handle]
                assert name not in self.ends, f"{name} ended twice"
                self.ends[name] = message
            case PromptLogprobs():
                pass

    def _receive_tokens(self, message: Tokens) -> None:
        place = 0
        for handle, index, offset, count in zip(message.handles, message.sequences, message.first_offsets, message.counts, strict=True):
            name = self._names[handle]
            received = self.completions[name, index]
            assert not self._has_ended(name, index), f"{name}.{index}: a token came after the end"
            assert offset == len(received), f"{name}.{index}: a gap or a duplicate"
            received += message.token_ids[place : place + count]
            place += count
            assert received == self.expected(name)[index][: len(received)], f"{name}.{index}: wrong tokens"

    def _has_ended(self, name: str, index: int) -> bool:
        return name in self.ends or (name, index) in self.sequence_ends

    def _check_waste(self, group_id: str) -> None:
        """A running sequence has the blocks that its known and planned tokens take, and no other."""
        for request in self.group(group_id).running.values():
            if request.state is RequestState.RUNNING:
                for sequence in request.sequences:
                    if sequence.block_table:  # those that will be forked have none yet
                        num_used = math.ceil(max(sequence.num_planned, sequence.prefill_end) / self.block_size)
                        assert len(sequence.block_table) == num_used, f"{self.name(request.handle)} holds a block that it does not use"


def config(**changes: Any) -> SchedulerConfig:
    """CONFIG with other values."""
    return replace(CONFIG, **changes)
