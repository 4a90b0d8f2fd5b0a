"""The central scheduler: requests in, step plans and tokens out. Pure: no clock, no socket; time is an argument.

The process around it (process.py) feeds it messages, sends what it asks for, and for each group repeats

    send(scheduler.next_plan(group_id, now_s)); scheduler.apply(receive())        one plan ahead
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from quire.cluster.scheduler.admission import refusal
from quire.cluster.scheduler.applied import Applied
from quire.cluster.scheduler.beam_search import BeamSearchState, num_candidates
from quire.cluster.scheduler.dispatcher import Dispatcher
from quire.cluster.scheduler.group import Group, Note
from quire.cluster.scheduler.group_counters import GroupCounters
from quire.cluster.scheduler.request import Request, RequestState, Sequence, SequenceEnd
from quire.cluster.scheduler.timers import Timers
from quire.cluster.scheduler.waiting_queue import WaitingQueue
from quire.common.errors import StatusCode
from quire.common.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    Cancel,
    ControlUp,
    DetachGroup,
    DrainGroup,
    EndReason,
    Failed,
    Finish,
    Finished,
    GroupDrained,
    GroupLost,
    GroupReady,
    Hello,
    Logprobs,
    ModelLimits,
    PromptLogprobs,
    QueueStatus,
    RankHello,
    Rejected,
    RowErrorCode,
    Sample,
    SessionUp,
    Spans,
    Status,
    StepAck,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
    UsageCounts,
    Welcome,
)

# A request that ran on so many groups when they died is not given a further one: it may be what kills them.
MAX_GROUP_DEATHS: Final = 3

_ROW_ERRORS: Final = {
    RowErrorCode.NOT_FINITE: "the model gave no finite probabilities; the weights or the number format may be at fault",
    RowErrorCode.NO_ALLOWED_TOKEN: "every token is forbidden by the request's own limits; widen its allowed tokens, or bar fewer",
    RowErrorCode.GRAMMAR: "the grammar cannot go on",
}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of the scheduler. Times are in seconds."""

    scheduler_id: str  # a new one per process, so that gateways notice a restart
    max_waiting_requests: int = 4096
    max_waiting_tokens: int = 8_000_000
    ageing_s: float = 10.0  # a waiting request rises one class per so much
    patience_s: float = 60.0  # a request is overtaken, within its class and tenant, only by those that came at most so much later
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # 1 for those that are not named
    # A group whose oldest plan is older than step_timeout_factor times what such a step takes is lost, but not before
    # min_step_timeout_s; first_step_timeout_s holds while that is not known, and for steps with copies.
    min_step_timeout_s: float = 2.0
    step_timeout_factor: float = 5.0
    first_step_timeout_s: float = 60.0
    heartbeat_s: float = 5.0  # an idle group gets an empty plan this often; a third of the ranks' lease
    unserved_timeout_s: float = 60.0  # how long requests wait for a model whose last group was lost
    checks_ranks: bool = False  # ask ranks after every step for a checksum of their block tables: a group whose ranks differ is lost
    retry_after_s: float = 1.0  # what clients are told to wait when a queue is full or no group serves


@dataclass(slots=True)
class Outbox:
    """Messages to send, in order per receiver."""

    to_gateways: list[tuple[bytes, SessionUp]] = field(default_factory=list)
    to_controller: list[ControlUp] = field(default_factory=list)


class Scheduler:
    """Holds every request from Submit to its end, and plans every step of every group."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.groups: dict[str, Group] = {}
        self.queue = WaitingQueue(
            max_requests=config.max_waiting_requests,
            max_tokens=config.max_waiting_tokens,
            ageing_s=config.ageing_s,
            patience_s=config.patience_s,
            tenant_weights=config.tenant_weights,
        )
        self._dispatcher = Dispatcher(self.queue, self.groups)
        self._gateways: dict[bytes, int] = {}  # with the number of its session
        self._num_sessions = 0
        self._by_key: dict[tuple[bytes, str], Request] = {}  # not ended; one attempt of each
        self._by_handle: dict[int, Request] = {}  # the same ones
        self._deadlines = Timers(lambda _, handle: handle in self._by_handle)
        self._unserved_since_s: dict[str, float] = {}  # by model
        self._lost: dict[str, tuple[int, str]] = {}  # groups that were given up, until the controller answers: term, reason
        self._next_handle = 0
        self._counters: dict[str, GroupCounters] = {}  # by group; the controller bounds how many there are
        self._outbox = Outbox()
        self._note: Note | None = None

    def listen(self, note: Note) -> None:
        """Have `note` called with (handle, what happened and why). For stories and debugging: it costs time."""
        self._note = self._dispatcher.note = note
        for group in self.groups.values():
            group.note = note

    def request_id(self, handle: int) -> str:
        """The client's name of a request that has not ended."""
        return self._by_handle[handle].submit.request_id

    def take_outbox(self) -> Outbox:
        """What is to be sent since the last call."""
        outbox, self._outbox = self._outbox, Outbox()
        return outbox

    # -- gateways -----------------------------------------------------------------------------------------------------

    def hello(self, gateway: bytes, message: Hello) -> None:
        """A gateway came, or came again: what it had submitted before on this link is cancelled."""
        self._forget_gateway(gateway)
        self._open_session(gateway)

    def gateway_lost(self, gateway: bytes) -> None:
        """Nobody reads this gateway's answers any more: its requests end."""
        self._forget_gateway(gateway)

    def _forget_gateway(self, gateway: bytes) -> None:
        self._gateways.pop(gateway, None)
        for request in [request for request in self._by_key.values() if request.gateway == gateway]:
            self._end(request, "its gateway is gone")

    def submit(self, gateway: bytes, message: Submit, now_s: float) -> None:
        """Queue a request, or say at once that it cannot be taken. A higher attempt supersedes a lower one of the same id."""
        if gateway not in self._gateways:  # it speaks to a scheduler that is gone, or was given up by this one; the Welcome says so
            self._open_session(gateway)
            text = "the scheduler lost its session with this gateway; submit again"
            self._reject(gateway, message, StatusCode.UNAVAILABLE, "SESSION_LOST", text, self.config.retry_after_s)
            return
        former = self._by_key.get((gateway, message.request_id))
        if former is not None:
            if former.submit.attempt >= message.attempt:
                self._reject(gateway, message, StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE", "a request with this id is in flight")
                return
            self._end(former, "a higher attempt supersedes it")
        refused = refusal(message, self._serving(message.model), self.queue, retry_after_s=self.config.retry_after_s)
        if refused is not None:
            self._to_gateway(gateway, refused)
            return
        request = self._new_request(gateway, message, now_s)
        self._by_key[request.key] = request
        self._by_handle[request.handle] = request
        self._deadlines.add(request.deadline_s, request.handle, num_live=len(self._by_handle))
        self.queue.open_account(message.tenant)
        self._enqueue(request, now_s)
        self._to_gateway(gateway, Accepted(message.request_id, message.attempt, request.handle))
        if self._note:
            what = f"{len(message.prompt_ids)} prompt tokens, at most {message.max_tokens} more, {request.num_rows} sequences"
            self._note(request.handle, f"{message.request_id!r} arrives: {what}, class {message.priority}, tenant {message.tenant!r}")

    def finish(self, gateway: bytes, message: Finish, now_s: float) -> None:
        """The gateway saw the end of a sequence (a stop string) that token ids alone do not show."""
        sequence = self._sequence(gateway, message.request_id, message.attempt, message.sequence)
        if sequence is not None and sequence.request.beam is None:
            self._finish(SequenceEnd(sequence, EndReason.STOP, None, message.kept_tokens), now_s)

    def cancel(self, gateway: bytes, message: Cancel) -> None:
        """End a request, or one sequence of it, without an answer. Unknown ones are ignored: the end may have crossed this on the
        wire."""
        request = self._by_key.get((gateway, message.request_id))
        if request is None or request.submit.attempt != message.attempt:
            return
        if message.sequence is None or request.beam is not None:
            self._end(request, f"cancelled: {message.reason}")
            return
        sequence = self._sequence(gateway, message.request_id, message.attempt, message.sequence)
        if sequence is None:
            return
        if len(request.sequences) == 1:
            self._end(request, f"its last sequence is cancelled: {message.reason}")
        else:
            self._end_sequence(sequence)

    # -- controller ---------------------------------------------------------------------------------------------------

    def attach(self, message: AttachGroup, now_s: float) -> None:
        """Plan for this group from now on, once its ranks have said hello. A higher term replaces a lower one.

        A controller that was started anew attaches groups again under the terms that they have: it is told what it may have missed.
        """
        former = self.groups.get(message.group_id)
        lost_term, reason = self._lost.get(message.group_id, (0, ""))
        if former is None and lost_term >= message.term:
            self._outbox.to_controller.append(GroupLost(message.group_id, message.term, reason))
            return
        if former is not None:
            if former.term == message.term and former.is_ready:
                self._report_ready(former)
            if former.term >= message.term:
                return
            self._drop(former, now_s)
        self._lost.pop(message.group_id, None)
        group = self.groups[message.group_id] = Group(message, ageing_s=self.config.ageing_s, checks_ranks=self.config.checks_ranks)
        group.counters = self._counters.setdefault(message.group_id, GroupCounters())
        group.note = self._note
        group.charge = lambda request, num_tokens: self.queue.charge(request.submit.tenant, num_tokens)

    def detach(self, message: DetachGroup, now_s: float) -> None:
        """The group's term is over."""
        self._lost.pop(message.group_id, None)
        group = self.groups.get(message.group_id)
        if group is not None and group.term == message.term:
            self._drop(group, now_s)

    def drain(self, message: DrainGroup) -> None:
        """Give the group nothing new; say GroupDrained when nothing is left, and once more to who asks again."""
        group = self.groups.get(message.group_id)
        if group is not None and group.term == message.term:
            group.draining = True
            group.drain_reported = False
            self._dispatcher.is_due = True
            self._tell_limits()
            if not message.comes_back and not self._serving(group.model):
                self._fail_new(group.model)
            self._report_if_drained(group)

    def status(self, query_id: int, now_s: float, *, has_blocks: bool = True, samples: tuple[Sample, ...] = ()) -> None:
        """Queue a Status for the controller. has_blocks: with what is told block by block; samples: of the process around us."""
        first = self.queue.first()
        queue = QueueStatus(
            num_waiting=len(self.queue),
            num_waiting_tokens=self.queue.num_tokens,
            max_waiting=self.queue.max_requests,
            max_waiting_tokens=self.queue.max_tokens,
            oldest_wait_s=now_s - first.arrival_s if first else 0.0,
            num_running_requests=sum(len(group.running) for group in self.groups.values()),
            num_waiting_by_priority=tuple(sorted(Counter(request.submit.priority for request in self.queue.all()).items())),
        )
        groups = tuple(self.groups[group_id].status(has_blocks=has_blocks) for group_id in sorted(self.groups))
        self._outbox.to_controller.append(Status(query_id, groups, queue, samples))

    # -- ranks --------------------------------------------------------------------------------------------------------

    def rank_hello(self, message: RankHello, now_s: float) -> None:
        """A rank is there. The group is ready when all are, and they agree on model, layout and version."""
        group = self.groups.get(message.group_id)
        if group is None or not group.oldest_term <= message.term <= group.term or group.is_ready:
            return  # of a term that is over, whose lease will end it, or one that the controller will tell us of: it says hello again
        objection = _objection(group, message)
        if objection:
            self._lose(group, objection, now_s)
            return
        group.hello(message)
        if group.is_ready:
            self._unserved_since_s.pop(group.model, None)
            self._dispatcher.is_due = True
            self._report_ready(group)
            self._tell_limits()

    def next_plan(self, group_id: str, now_s: float) -> StepPlan | None:
        """The plan to send to a group now; None while there is nothing to do, or enough was sent."""
        group = self.groups.get(group_id)
        if group is None or not group.may_plan():
            return None
        plan = None
        if self._dispatcher.is_due or group.has_work():
            for request in group.begin_step(now_s):
                self._enqueue(request, now_s)
            if group.swapped:
                group.resume_swapped(now_s)
            if self._dispatcher.is_due:
                self._dispatcher.dispatch(now_s)
            plan = group.finish_step(now_s)
        if plan is None and not group.outstanding and now_s - group.last_sent_s >= self.config.heartbeat_s:
            plan = group.heartbeat(now_s)
        if plan is not None:
            config = self.config
            group.set_time_out(least_s=config.min_step_timeout_s, first_s=config.first_step_timeout_s, factor=config.step_timeout_factor)
        return plan

    def apply(self, group_id: str, result: StepResult, now_s: float) -> None:
        """Take in the result of a group's oldest plan."""
        group = self.groups.get(group_id)
        if group is None or result.term != group.term:
            return
        objection = group.objection(result)
        if objection:
            self._lose(group, objection, now_s)
            return
        applied = group.apply(result, now_s)
        for request in applied.first:
            if request.first_token_s is None:
                request.first_token_s = now_s
                if self._note:
                    self._note(request.handle, "has its first token")
        for sequence, start, entry in applied.prompt_logprobs:
            self._send_prompt_logprobs(sequence, start, entry)
        for gateway, columns in applied.tokens_of.items():
            self._to_gateway(gateway, columns.message())
        if applied.ends or applied.failed or applied.beam_steps:
            self._act_on(group, applied, now_s)
        elif applied.has_resumable:
            self._dispatcher.is_due = True

    def ack(self, group_id: str, ack: StepAck, now_s: float) -> None:
        """A rank has done a step, or says that it cannot go on."""
        group = self.groups.get(group_id)
        if group is None or ack.term != group.term:
            return
        if ack.error:
            self._lose(group, f"rank {ack.rank} failed at step {ack.step_id}: {ack.error}", now_s)
            return
        objection = group.ack_objection(ack)
        if objection:
            self._lose(group, objection, now_s)
            return
        for request in group.acknowledged(ack, now_s):
            self._enqueue(request, now_s)
        if ack.copies_done or ack.copies_failed:
            self._dispatcher.is_due = True

    # -- time ---------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """What time alone does: requests expire or rise, groups that do not answer are lost, models stay unserved too long."""
        while (handle := self._deadlines.pop_due(now_s)) is not None:
            request = self._by_handle[handle]
            num_tokens = request.num_completion_tokens + sum(sequence.num_completion_tokens for sequence in request.sequences)
            text = f"the deadline passed after {now_s - request.arrival_s:.1f} s with {num_tokens} tokens generated"
            self._fail(request, StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", text, retryable=False)
        if self.queue.rise(now_s):
            self._dispatcher.is_due = True
        for group in list(self.groups.values()):
            due_s = group.due_s()
            if due_s is not None and now_s >= due_s:
                sent = group.outstanding[0]
                self._lose(group, f"step {sent.step_id} took longer than {sent.time_out_s:.3g} s", now_s)
        for model, since_s in list(self._unserved_since_s.items()):
            if now_s - since_s >= self.config.unserved_timeout_s:
                del self._unserved_since_s[model]
                self._fail_waiting(model, f"no worker group of model {model} came back in {self.config.unserved_timeout_s:g} s")

    def next_wake_s(self, now_s: float) -> float:
        """How long nothing will happen by time alone, in seconds from now."""
        times = [since_s + self.config.unserved_timeout_s for since_s in self._unserved_since_s.values()]
        times += [due_s for due_s in (self._deadlines.next_due_s(), self.queue.next_rise_s()) if due_s is not None]
        for group in self.groups.values():
            if group.outstanding:
                due_s = group.due_s()
                assert due_s is not None
                times.append(due_s)
            elif group.is_ready:
                times.append(group.last_sent_s + self.config.heartbeat_s)
        return max(0.0, min(times, default=now_s + self.config.heartbeat_s) - now_s)

    def check(self) -> None:
        """Assert every invariant."""
        self.queue.check()
        seen: dict[int, Request] = {}
        for group in self.groups.values():
            self._check_group(group)
            for held in (group.running, group.swapped):
                assert seen.keys().isdisjoint(held), "a request is in two places"
                seen.update(held)
        for request in self.queue.all():
            assert request.handle not in seen, "a request is in two places"
            seen[request.handle] = request
            assert request.state is RequestState.WAITING
            assert request.sequences
            for sequence in request.sequences:
                assert sequence.row < 0, "a waiting request has a row"
                assert not sequence.block_table, "a waiting request holds GPU blocks"
                assert not sequence.cpu_table, "a waiting request holds CPU blocks"
        assert seen == self._by_handle, "a request is lost"
        assert len(self._by_key) == len(self._by_handle)
        assert {request.gateway for request in seen.values()} <= self._gateways.keys()

    def _check_group(self, group: Group) -> None:
        group.check()
        for request in (*group.running.values(), *group.swapped.values()):
            assert request.group_id == group.group_id
            assert request.sequences

    # -- requests -----------------------------------------------------------------------------------------------------

    def _new_request(self, gateway: bytes, message: Submit, now_s: float) -> Request:
        handle = self._next_handle
        self._next_handle += 1
        request = Request(
            handle=handle, gateway=gateway, submit=message, arrival_s=now_s - message.age_s, deadline_s=now_s + message.time_left_s
        )
        sampling = message.sampling
        starts = message.sequences
        if message.beam is not None:
            request.beam = BeamSearchState(message.beam, message.max_tokens)
            candidates = num_candidates(message.beam.num_beams, len(sampling.stop_ids))
            sampling = msgspec.structs.replace(sampling, num_beam_candidates=candidates)
            starts = starts[:1]  # the others are forked from it; nothing of a search that ended early was sent to anybody
        for start in starts:
            resumed_ids = start.resumed_ids if message.beam is None else ()
            request.sequences.append(
                Sequence(
                    request=request,
                    handle=handle,
                    gateway=gateway,
                    index=start.index,
                    token_ids=[*message.prompt_ids, *resumed_ids],
                    num_prompt_tokens=len(message.prompt_ids),
                    max_total=len(message.prompt_ids) + message.max_tokens,
                    sampling=sampling
                    if sampling.sequence_index == start.index
                    else msgspec.structs.replace(sampling, sequence_index=start.index),
                    block_hashes=self._prompt_hashes(message),
                    cumulative_logprob=start.cumulative_logprob,
                )
            )
        return request

    def _prompt_hashes(self, message: Submit) -> list[bytes]:
        """The gateway's names of the prompt's blocks; none if it counted in blocks of another size."""
        block_size = next(group.config.block_size for group in self.groups.values() if group.model == message.model)
        return list(message.block_hashes) if len(message.block_hashes) == len(message.prompt_ids) // block_size else []

    def _sequence(self, gateway: bytes, request_id: str, attempt: int, index: int) -> Sequence | None:
        """A sequence that has not ended."""
        request = self._by_key.get((gateway, request_id))
        if request is None or request.submit.attempt != attempt:
            return None
        return next((sequence for sequence in request.sequences if sequence.index == index), None)

    def _enqueue(self, request: Request, now_s: float) -> None:
        self.queue.push(request, now_s)
        self._dispatcher.is_due = True

    # -- results ------------------------------------------------------------------------------------------------------

    def _act_on(self, group: Group, applied: Applied, now_s: float) -> None:
        """Ends, and what waits for this result to go on."""
        self._dispatcher.is_due = True
        for end in applied.ends:
            if not end.sequence.ended:
                self._finish(end, now_s)
        for request, code in applied.failed:
            if request.state is not RequestState.ENDED:
                is_the_requests = code is RowErrorCode.NO_ALLOWED_TOKEN
                status = StatusCode.INVALID_ARGUMENT if is_the_requests else StatusCode.INTERNAL
                self._fail(request, status, code.name, _ROW_ERRORS[code], retryable=False)
        for request in applied.beam_steps:
            if request.state is not RequestState.ENDED and not group.advance_beams(request):
                self._finish_beams(request, now_s)

    def _send_prompt_logprobs(self, sequence: Sequence, start: int, entry: Logprobs) -> None:
        """Pass on what a chunk said of prompt tokens, each position once: a chunk may be computed again after a preemption."""
        request = sequence.request
        first = max(start, 1)  # nothing comes before the first token
        sent = request.num_prompt_logprobs + 1  # the first position not sent
        begin, end = max(sent - first, 0), sequence.num_prompt_tokens - first
        if first > sent or begin >= min(end, len(entry.logprobs)):
            return
        kept = Logprobs(entry.logprobs[begin:end], entry.ranks[begin:end], entry.top_ids[begin:end], entry.top_logprobs[begin:end])
        request.num_prompt_logprobs += len(kept.logprobs)
        self._to_gateway(request.gateway, PromptLogprobs(request.handle, first + begin, kept))

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, end: SequenceEnd, now_s: float) -> None:
        """Say how a sequence ended well, and end it, with its request if it was the last."""
        sequence, request = end.sequence, end.sequence.request
        request.num_completion_tokens += end.num_tokens
        is_last = len(request.sequences) == 1
        logprob = sequence.cumulative_logprob if sequence.sampling.num_logprobs is not None else None
        message = self._finished(request, now_s, sequence.index, end.reason, end.stop_id, is_last=is_last, cumulative_logprob=logprob)
        if is_last:
            self._end(request, f"finishes by {end.reason.name} after {request.num_completion_tokens} tokens")
        else:
            self._end_sequence(sequence)
        self._to_gateway(request.gateway, message)

    def _finish_beams(self, request: Request, now_s: float) -> None:
        """The search has ended: send its best sequences whole, best first."""
        assert request.beam is not None
        results = request.beam.results[: request.submit.n]
        if not results:
            text = "no sequence is allowed by the request's own limits; widen its allowed tokens, or bar fewer"
            self._fail(request, StatusCode.INVALID_ARGUMENT, RowErrorCode.NO_ALLOWED_TOKEN.name, text, retryable=False)
            return
        messages: list[SessionUp] = []
        for index, result in enumerate(results):
            num_tokens = len(result.token_ids)
            request.num_completion_tokens += num_tokens
            is_last = index == len(results) - 1
            messages.append(Tokens((request.handle,), (index,), (0,), (num_tokens,), result.token_ids))
            messages.append(
                self._finished(
                    request, now_s, index, result.reason, result.stop_id, is_last=is_last, cumulative_logprob=result.cumulative_logprob
                )
            )
        self._end(request, f"its search finishes with {len(results)} sequences")
        for message in messages:
            self._to_gateway(request.gateway, message)

    def _finished(
        self,
        request: Request,
        now_s: float,
        index: int,
        reason: EndReason,
        stop_id: int | None,
        *,
        is_last: bool,
        cumulative_logprob: float | None,
    ) -> Finished:
        admitted_s = now_s if request.admitted_s is None else request.admitted_s
        first_token_s = now_s if request.first_token_s is None else request.first_token_s
        is_out = request.is_preempted and request.state in (RequestState.WAITING, RequestState.SWAPPED)
        return Finished(
            handle=request.handle,
            sequence=index,
            reason=reason,
            stop_id=stop_id,
            is_last=is_last,
            usage=UsageCounts(len(request.submit.prompt_ids), request.num_cached_tokens, request.num_completion_tokens),
            spans=Spans(
                queue_s=admitted_s - request.arrival_s,
                prefill_s=first_token_s - admitted_s,
                decode_s=now_s - first_token_s,
                preempted_s=request.preempted_s + (now_s - request.preempted_at_s if is_out else 0.0),
            ),
            num_preemptions=request.num_preemptions,
            cumulative_logprob=cumulative_logprob,
        )

    def _fail(self, request: Request, code: StatusCode, reason: str, message: str, *, retryable: bool) -> None:
        """Say why a request ended without success, and end it."""
        retry_after_s = self.config.retry_after_s if retryable else None
        self._end(request, f"fails: {message}")
        self._to_gateway(request.gateway, Failed(request.handle, code, reason, message, retryable, retry_after_s=retry_after_s))

    def _end_sequence(self, sequence: Sequence) -> None:
        """Take one sequence out of a request that goes on."""
        request = sequence.request
        if request.state is RequestState.WAITING:
            request.sequences.remove(sequence)
            sequence.ended = True
        else:
            self.groups[request.group_id].end_sequence(sequence)
        self._dispatcher.is_due = True

    def _end(self, request: Request, why: str) -> None:
        """Take a request out of wherever it is; every block and row that it held is free again."""
        if self._note:
            self._note(request.handle, why)
        del self._by_key[request.key]
        del self._by_handle[request.handle]
        if request.state is RequestState.WAITING:
            self.queue.remove(request)
            for sequence in request.sequences:
                sequence.ended = True
        else:
            group = self.groups[request.group_id]
            group.release(request)
            self._report_if_drained(group)
        request.state = RequestState.ENDED
        self.queue.close_account(request.submit.tenant)
        self._dispatcher.is_due = True

    # -- groups -------------------------------------------------------------------------------------------------------

    def _serving(self, model: str) -> list[Group]:
        return [group for group in self.groups.values() if group.model == model and group.is_ready and not group.draining]

    def _lose(self, group: Group, reason: str, now_s: float) -> None:
        """The group cannot go on: tell the controller, which ends its ranks. Clients are not told the reason: it is ours."""
        self._outbox.to_controller.append(GroupLost(group.group_id, group.term, reason))
        self._lost[group.group_id] = group.term, reason
        self._drop(group, now_s)

    def _report_ready(self, group: Group) -> None:
        self._outbox.to_controller.append(
            GroupReady(
                group_id=group.group_id,
                term=group.term,
                num_gpu_blocks=group.pool.num_blocks,
                num_cpu_blocks=group.cpu_pool.num_blocks,
                block_bytes=max(h.block_bytes for h in group.hellos.values()),
                max_request_tokens=group.max_request_tokens,
                ranks=tuple((rank, h.device, h.host, h.pid) for rank, h in sorted(group.hellos.items())),
            )
        )

    def _drop(self, group: Group, now_s: float) -> None:
        del self.groups[group.group_id]
        self._dispatcher.may_have_shrunk = True
        self._requeue_all(group, now_s)
        self._tell_limits()
        if not self._serving(group.model):
            self._unserved_since_s.setdefault(group.model, now_s)

    def _requeue_all(self, group: Group, now_s: float) -> None:
        """A group's death is a preemption of all that it held: the tokens are here, and others compute the rest."""
        for request in [*group.running.values(), *group.swapped.values()]:
            request.num_group_deaths += request.state is RequestState.RUNNING
            if request.state in (RequestState.RUNNING, RequestState.SWAPPING_IN):
                request.preempted_at_s = now_s
            for sequence in request.sequences:
                sequence.forget_blocks()
            request.spare_rows = []
            request.transfer = None
            request.state = RequestState.WAITING
            self._enqueue(request, now_s)
            if self._note:
                self._note(request.handle, f"{group.group_id} is gone: it will be computed anew elsewhere")
            if request.num_group_deaths >= MAX_GROUP_DEATHS:
                text = f"{request.num_group_deaths} worker groups died while they ran this request; it is not tried again"
                self._fail(request, StatusCode.INTERNAL, "GROUP_DIED", text, retryable=False)
        for request in self.queue.all():  # what these, and those that were preempted before, had on its way from this group
            if request.group_id == group.group_id and request.awaits_result:
                for sequence in request.sequences:
                    sequence.num_in_flight = 0
                if request.beam is not None:
                    request.beam.reported = {}

    def _fail_waiting(self, model: str, message: str) -> None:
        for request in self.queue.all():
            if request.submit.model == model:
                self._fail(request, StatusCode.UNAVAILABLE, "NO_READY_GROUP", message, retryable=True)

    def _fail_new(self, model: str) -> None:
        """Requests that no group has begun would wait for ever: the last one takes nothing new."""
        for request in self.queue.all():
            if request.submit.model == model and not request.is_preempted:
                message = f"no worker group of model {model} takes new requests"
                self._fail(request, StatusCode.UNAVAILABLE, "NO_READY_GROUP", message, retryable=True)

    def _report_if_drained(self, group: Group) -> None:
        has_left = not group.running and not group.swapped
        if group.draining and has_left and not group.drain_reported and not self._owes(group):
            group.drain_reported = True
            self._outbox.to_controller.append(GroupDrained(group.group_id, group.term))

    def _owes(self, group: Group) -> bool:
        """Whether a preempted request of the group still waits to go on there."""
        return any(request.is_preempted and request.group_id == group.group_id for request in self.queue.all())

    # -- messages -----------------------------------------------------------------------------------------------------

    def _open_session(self, gateway: bytes) -> None:
        self._num_sessions += 1
        self._gateways[gateway] = self._num_sessions
        self._to_gateway(gateway, self._welcome(gateway))

    def _welcome(self, gateway: bytes) -> Welcome:
        models = sorted({group.model for group in self.groups.values()})
        limits = []
        for model in models:
            serving = self._serving(model)
            block_size = next(group.config.block_size for group in self.groups.values() if group.model == model)
            limits.append(ModelLimits(model, block_size, max((group.max_request_tokens for group in serving), default=0)))
        return Welcome(PROTOCOL_VERSION, self.config.scheduler_id, tuple(limits), self._gateways[gateway])

    def _tell_limits(self) -> None:
        for gateway in sorted(self._gateways):
            self._to_gateway(gateway, self._welcome(gateway))

    def _reject(
        self, gateway: bytes, message: Submit, code: StatusCode, reason: str, text: str, retry_after_s: float | None = None
    ) -> None:
        self._to_gateway(gateway, Rejected(message.request_id, message.attempt, code, reason, text, retry_after_s=retry_after_s))

    def _to_gateway(self, gateway: bytes, message: SessionUp) -> None:
        if gateway in self._gateways:
            self._outbox.to_gateways.append((gateway, message))


def _objection(group: Group, message: RankHello) -> str:
    """Why a rank cannot be planned for, "" if it can."""
    if message.version != PROTOCOL_VERSION or message.layout_version != LAYOUT_VERSION:
        return (
            f"rank {message.rank} speaks version {message.version} with layout {message.layout_version}, "
            f"this scheduler {PROTOCOL_VERSION} with layout {LAYOUT_VERSION}; run one version of Quire on all hosts"
        )
    if any(other.model_fingerprint != message.model_fingerprint for other in group.hellos.values()):
        return f"rank {message.rank} holds another model than the ranks before it; give all hosts the same folder"
    return ""
