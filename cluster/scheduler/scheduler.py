"""The central scheduler: requests in, step plans and tokens out. Pure: no clock, no socket; time is an argument.

The process around it (process.py) feeds it messages, sends what it asks for, and for each group repeats

    send(scheduler.next_plan(group_id, now_s)); scheduler.apply(receive())        one plan ahead
"""

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from quire.cluster.scheduler.group import Group, NewToken
from quire.cluster.scheduler.request import Request, RequestState, Sequence
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
    ModelLimits,
    QueueStatus,
    RankHello,
    Rejected,
    RowErrorCode,
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

# Deadlines of requests that have ended may stay in the heap up to so many beyond twice the live ones.
MAX_ENDED_DEADLINES: Final = 1000


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of the scheduler."""

    scheduler_id: str  # a new one per process, so that gateways notice a restart
    max_waiting_requests: int = 4096
    max_waiting_tokens: int = 8_000_000
    step_timeout_s: float = 60.0  # a group whose oldest plan is older than this is lost
    heartbeat_s: float = 5.0  # an idle group gets an empty plan this often; a third of the ranks' lease
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
        self.queue = WaitingQueue(max_requests=config.max_waiting_requests, max_tokens=config.max_waiting_tokens)
        self._gateways: dict[bytes, int] = {}  # with the number of its session
        self._num_sessions = 0
        self._by_key: dict[tuple[bytes, str], Request] = {}  # not ended; one attempt of each
        self._by_handle: dict[int, Request] = {}  # the same ones
        self._deadlines: list[
            tuple[float, int]
        ] = []  # heap of (deadline_s, handle); ended ones go when they surface, or when they are many
        self._next_handle = 0
        self._outbox = Outbox()

    def take_outbox(self) -> Outbox:
        """What is to be sent since the last call."""
        outbox, self._outbox = self._outbox, Outbox()
        return outbox

    # -- gateways -----------------------------------------------------------------------------------------------------

    def hello(self, gateway: bytes, message: Hello) -> None:
        """A gateway came, or came again: what it had submitted before on this link is cancelled."""
        self.gateway_lost(gateway)
        self._open_session(gateway)

    def gateway_lost(self, gateway: bytes) -> None:
        """Nobody reads this gateway's answers any more: its requests end."""
        self._gateways.pop(gateway, None)
        for request in [request for request in self._by_key.values() if request.gateway == gateway]:
            self._end(request)

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
            self._end(former)
        refusal = self._refusal(message)
        if refusal is not None:
            self._to_gateway(gateway, refusal)
            return
        start = message.sequences[0]
        token_ids = [*message.prompt_ids, *start.resumed_ids]
        handle = self._next_handle
        self._next_handle += 1
        sequence = Sequence(
            handle=handle,
            index=start.index,
            prompt_len=len(token_ids),
            token_ids=token_ids,
            max_tokens=message.max_tokens,
            num_prompt_tokens=len(message.prompt_ids),
            sampling=message.sampling,
            cache_root=message.cache_root,
        )
        request = Request(
            handle=handle,
            gateway=gateway,
            submit=message,
            arrival_s=now_s - message.age_s,
            deadline_s=now_s + message.time_left_s,
            sequence=sequence,
        )
        self._by_key[request.key] = request
        self._by_handle[handle] = request
        heapq.heappush(self._deadlines, (request.deadline_s, handle))
        if len(self._deadlines) > 2 * len(self._by_handle) + MAX_ENDED_DEADLINES:
            self._deadlines = [(live.deadline_s, live.handle) for live in self._by_handle.values()]
            heapq.heapify(self._deadlines)
        self.queue.push(request)
        self._to_gateway(gateway, Accepted(message.request_id, message.attempt, handle))

    def finish(self, gateway: bytes, message: Finish, now_s: float) -> None:
        """The gateway saw the end of a sequence (a stop string) that token ids alone do not show."""
        request = self._by_key.get((gateway, message.request_id))
        if request is not None and request.submit.attempt == message.attempt:
            self._finish(request, EndReason.STOP, stop_id=None, num_completion_tokens=message.kept_tokens, now_s=now_s)

    def cancel(self, gateway: bytes, message: Cancel) -> None:
        """End a request without an answer. Unknown ones are ignored: the end may have crossed this on the wire."""
        request = self._by_key.get((gateway, message.request_id))
        if request is not None and request.submit.attempt == message.attempt:
            self._end(request)

    # -- controller ---------------------------------------------------------------------------------------------------

    def attach(self, message: AttachGroup) -> None:
        """Plan for this group from now on, once its ranks have said hello. A higher term replaces a lower one."""
        former = self.groups.get(message.group_id)
        if former is not None:
            if former.term >= message.term:
                return
            self._fail_requests(former)
        self.groups[message.group_id] = Group(message)

    def detach(self, message: DetachGroup) -> None:
        """The group's term is over."""
        group = self.groups.get(message.group_id)
        if group is not None and group.term == message.term:
            self._drop(group)

    def drain(self, message: DrainGroup) -> None:
        """Give the group nothing new; say GroupDrained when nothing is left."""
        group = self.groups.get(message.group_id)
        if group is not None and group.term == message.term:
            group.draining = True
            self._tell_limits()
            self._fail_if_unserved(group.model)
            self._report_if_drained(group)

    def status(self, query_id: int, now_s: float) -> None:
        """Queue a Status for the controller."""
        first = self.queue.first()
        queue = QueueStatus(
            num_waiting=len(self.queue),
            num_waiting_tokens=self.queue.num_tokens,
            max_waiting=self.queue.max_requests,
            max_waiting_tokens=self.queue.max_tokens,
            oldest_wait_s=now_s - first.arrival_s if first else 0.0,
            num_running_requests=sum(len(group.requests) for group in self.groups.values()),
            num_waiting_by_priority=tuple(sorted(Counter(request.submit.priority for request in self.queue.all()).items())),
        )
        groups = tuple(self.groups[group_id].status() for group_id in sorted(self.groups))
        self._outbox.to_controller.append(Status(query_id, groups, queue))

    # -- ranks --------------------------------------------------------------------------------------------------------

    def rank_hello(self, message: RankHello) -> None:
        """A rank is there. The group is ready when all are, and they agree on model, layout and version."""
        group = self.groups.get(message.group_id)
        if group is None or message.term != group.term or group.is_ready:
            return  # of a term that is over, or one that the controller has not told us of: its lease will end it
        if (message.version, message.layout_version) != (PROTOCOL_VERSION, LAYOUT_VERSION):
            self._lose(
                group,
                f"rank {message.rank} speaks version {message.version} with layout {message.layout_version}, "
                f"this scheduler {PROTOCOL_VERSION} with {LAYOUT_VERSION}; run one version of Quire on all hosts",
            )
            return
        if any(other.model_fingerprint != message.model_fingerprint for other in group.hellos.values()):
            self._lose(group, f"rank {message.rank} holds another model than the ranks before it; give all hosts the same folder")
            return
        group.hello(message)
        if group.is_ready:
            hellos = [group.hellos[rank] for rank in sorted(group.hellos)]
            self._outbox.to_controller.append(
                GroupReady(
                    group_id=group.group_id,
                    term=group.term,
                    num_gpu_blocks=group.pool.num_blocks,
                    num_cpu_blocks=group.num_cpu_blocks,
                    block_bytes=message.block_bytes,
                    max_request_tokens=group.max_request_tokens,
                    ranks=tuple((hello.rank, hello.device, hello.host, hello.pid) for hello in hellos),
                )
            )
            self._tell_limits()

    def next_plan(self, group_id: str, now_s: float) -> StepPlan | None:
        """The plan to send to the group's ranks now; None while there is nothing to do or two plans are on their way."""
        group = self.groups[group_id]
        if not group.may_plan():
            return None
        group.retire_rows()
        self._admit_waiting(group, now_s)
        is_heartbeat_due = not group.outstanding and now_s - group.last_sent_s >= self.config.heartbeat_s
        return group.plan(now_s) if group.has_work() or is_heartbeat_due else None

    def apply(self, group_id: str, result: StepResult, now_s: float) -> None:
        """Take in a step's result: tokens go to their gateways, sequences that reached their end finish."""
        group = self.groups.get(group_id)
        if group is None or result.term != group.term:
            return  # late, from a term that is over
        objection = group.objection(result)
        if objection:
            self._lose(group, objection)
            return
        applied = group.apply(result)
        self._send_tokens(applied.tokens)
        for sequence, code in applied.failed:
            self._fail_row(self._by_handle[sequence.handle], RowErrorCode(code))
        for token in applied.tokens:
            request = self._by_handle[token.sequence.handle]
            if request.first_token_s is None:
                request.first_token_s = now_s
            self._finish_if_ended(request, token, now_s)
        self._report_if_drained(group)

    def ack(self, group_id: str, ack: StepAck) -> None:
        """A rank has done a step, or says that it cannot go on."""
        group = self.groups.get(group_id)
        if group is not None and ack.term == group.term and ack.error:
            self._lose(group, f"rank {ack.rank} failed at step {ack.step_id}: {ack.error}")

    # -- time ---------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """What time alone does: requests expire, groups that do not answer are lost."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, handle = heapq.heappop(self._deadlines)
            request = self._by_handle.get(handle)
            if request is not None:
                waited = now_s - request.arrival_s
                self._fail(
                    request,
                    StatusCode.DEADLINE_EXCEEDED,
                    "DEADLINE_EXCEEDED",
                    f"the deadline passed after {waited:.1f} s with {request.sequence.num_completion_tokens} tokens generated",
                    retryable=False,
                )
        for group in list(self.groups.values()):
            if group.outstanding and now_s - group.outstanding[0].sent_s > self.config.step_timeout_s:
                self._lose(group, f"step {group.outstanding[0].step_id} took longer than {self.config.step_timeout_s:g} s")

    def next_wake_s(self, now_s: float) -> float:
        """How long nothing will happen by time alone, in seconds from now."""
        times = [self._deadlines[0][0]] if self._deadlines else []
        for group in self.groups.values():
            if group.outstanding:
                times.append(group.outstanding[0].sent_s + self.config.step_timeout_s)
            elif group.is_ready:
                times.append(group.last_sent_s + self.config.heartbeat_s)
        return max(0.0, min(times, default=now_s + self.config.heartbeat_s) - now_s)

    def check(self) -> None:
        """Assert every invariant."""
        self.queue.check()
        for group in self.groups.values():
            group.check()
        running = [request for group in self.groups.values() for request in group.requests.values()]
        waiting = self.queue.all()
        assert all(request.state is RequestState.RUNNING for request in running)
        assert all(request.state is RequestState.WAITING for request in waiting)
        assert {request.handle for request in running + waiting} == self._by_handle.keys()
        assert len(running) + len(waiting) == len(self._by_handle) == len(self._by_key)
        assert all(request.gateway in self._gateways for request in running + waiting)

    # -- admission ----------------------------------------------------------------------------------------------------

    def _refusal(self, message: Submit) -> Rejected | None:
        """Why a request can not be queued; None when it can."""

        def rejected(code: StatusCode, reason: str, text: str, numbers: Mapping[str, int], retry_after_s: float | None = None) -> Rejected:
            named = {name: str(number) for name, number in numbers.items()}
            return Rejected(message.request_id, message.attempt, code, reason, text, named, retry_after_s)

        if message.n != 1 or len(message.sequences) != 1 or message.beam is not None:
            return rejected(StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED", f"n is {message.n}; only 1 is supported", {"n": message.n})
        groups = self._serving(message.model)
        if not groups:
            text = f"no worker group of model {message.model} is ready; try again in {self.config.retry_after_s:g} s"
            return rejected(StatusCode.UNAVAILABLE, "NO_READY_GROUP", text, {}, self.config.retry_after_s)
        num_tokens = len(message.prompt_ids) + message.max_tokens
        limit = max(group.max_request_tokens for group in groups)
        if not message.prompt_ids or len(message.sequences[0].resumed_ids) >= message.max_tokens:
            return rejected(StatusCode.INVALID_ARGUMENT, "NOTHING_TO_GENERATE", "the prompt is empty or nothing is left to generate", {})
        if num_tokens > limit:
            text = (
                f"prompt has {len(message.prompt_ids)} tokens and max_tokens is {message.max_tokens}, {num_tokens} together; "
                f"the largest group holds {limit}; shorten the prompt or lower max_tokens"
            )
            numbers = {"prompt_tokens": len(message.prompt_ids), "max_tokens": message.max_tokens, "limit": limit}
            return rejected(StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LONG", text, numbers)
        if not self.queue.has_room(len(message.prompt_ids)):
            text = (
                f"the queue holds {len(self.queue)} requests of {self.queue.max_requests} and {self.queue.num_tokens} prompt tokens "
                f"of {self.queue.max_tokens}; try again in {self.config.retry_after_s:g} s"
            )
            numbers = {"waiting_requests": len(self.queue), "waiting_tokens": self.queue.num_tokens}
            return rejected(StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", text, numbers, self.config.retry_after_s)
        return None

    def _admit_waiting(self, group: Group, now_s: float) -> None:
        """Late binding: requests meet a group only when it has a row and blocks for them. Strictly in order of arrival."""
        while (request := self.queue.first()) is not None and request.submit.model == group.model:
            if not group.admit(request):
                return
            self.queue.remove(request)
            request.state = RequestState.RUNNING
            request.group_id = group.group_id
            request.admitted_s = now_s

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish_if_ended(self, request: Request, token: NewToken, now_s: float) -> None:
        sequence = request.sequence
        num_completion_tokens = token.offset + 1
        if token.token_id in sequence.sampling.stop_ids and num_completion_tokens > sequence.sampling.min_tokens:
            self._finish(request, EndReason.STOP, stop_id=token.token_id, num_completion_tokens=num_completion_tokens, now_s=now_s)
        elif num_completion_tokens >= sequence.max_tokens:
            self._finish(request, EndReason.LENGTH, stop_id=None, num_completion_tokens=num_completion_tokens, now_s=now_s)

    def _finish(self, request: Request, reason: EndReason, *, stop_id: int | None, num_completion_tokens: int, now_s: float) -> None:
        """Say how a request ended well, and end it."""
        sequence = request.sequence
        admitted_s = now_s if request.admitted_s is None else request.admitted_s
        first_token_s = now_s if request.first_token_s is None else request.first_token_s
        message = Finished(
            handle=request.handle,
            sequence=sequence.index,
            reason=reason,
            stop_id=stop_id,
            is_last=True,
            usage=UsageCounts(
                sequence.num_prompt_tokens, min(sequence.num_cached_tokens, sequence.num_prompt_tokens), num_completion_tokens
            ),
            spans=Spans(
                queue_s=admitted_s - request.arrival_s,
                prefill_s=first_token_s - admitted_s,
                decode_s=now_s - first_token_s,
                preempted_s=0.0,
            ),
        )
        self._end(request)
        self._to_gateway(request.gateway, message)

    def _fail_row(self, request: Request, code: RowErrorCode) -> None:
        causes = {
            RowErrorCode.NOT_FINITE: "the model gave no finite probabilities; the weights or the number format may be at fault",
            RowErrorCode.NO_ALLOWED_TOKEN: "every token is forbidden by the request's own limits",
            RowErrorCode.GRAMMAR: "the grammar cannot go on",
        }
        self._fail(request, StatusCode.INTERNAL, code.name, causes[code], retryable=False)

    def _fail(self, request: Request, code: StatusCode, reason: str, message: str, *, retryable: bool) -> None:
        """Say why a request ended without success, and end it."""
        retry_after_s = self.config.retry_after_s if retryable else None
        self._end(request)
        self._to_gateway(request.gateway, Failed(request.handle, code, reason, message, retryable, retry_after_s=retry_after_s))

    def _end(self, request: Request) -> None:
        """Take a request out of wherever it is; every block and row that it held is free again."""
        del self._by_key[request.key]
        del self._by_handle[request.handle]
        if request.state is RequestState.WAITING:
            self.queue.remove(request)
        else:
            group = self.groups[request.group_id]
            group.release(request)
            self._report_if_drained(group)
        request.state = RequestState.ENDED

    # -- groups -------------------------------------------------------------------------------------------------------

    def _serving(self, model: str) -> list[Group]:
        return [group for group in self.groups.values() if group.model == model and group.is_ready and not group.draining]

    def _lose(self, group: Group, reason: str) -> None:
        """The group cannot go on: tell the controller, which ends its ranks. Clients are not told the reason: it is ours."""
        self._outbox.to_controller.append(GroupLost(group.group_id, group.term, reason))
        self._drop(group)

    def _drop(self, group: Group) -> None:
        self._fail_requests(group)
        del self.groups[group.group_id]
        self._tell_limits()
        self._fail_if_unserved(group.model)

    def _fail_requests(self, group: Group) -> None:
        message = f"the worker group that ran the request is gone; try again in {self.config.retry_after_s:g} s"
        for request in list(group.requests.values()):
            self._fail(request, StatusCode.UNAVAILABLE, "GROUP_LOST", message, retryable=True)

    def _fail_if_unserved(self, model: str) -> None:
        """Requests that wait for a model which no group serves any more would wait for ever."""
        if not self._serving(model):
            for request in self.queue.all():
                if request.submit.model == model:
                    message = f"no worker group of model {model} is left"
                    self._fail(request, StatusCode.UNAVAILABLE, "NO_READY_GROUP", message, retryable=True)

    def _report_if_drained(self, group: Group) -> None:
        if group.draining and not group.requests and not group.drain_reported:
            group.drain_reported = True
            self._outbox.to_controller.append(GroupDrained(group.group_id, group.term))

    # -- messages -----------------------------------------------------------------------------------------------------

    def _send_tokens(self, tokens: list[NewToken]) -> None:
        """One Tokens message per gateway for the whole step."""
        by_gateway: dict[bytes, list[NewToken]] = {}
        for token in tokens:
            by_gateway.setdefault(self._by_handle[token.sequence.handle].gateway, []).append(token)
        for gateway, news in by_gateway.items():
            self._to_gateway(
                gateway,
                Tokens(
                    handles=tuple(token.sequence.handle for token in news),
                    sequences=tuple(token.sequence.index for token in news),
                    first_offsets=tuple(token.offset for token in news),
                    counts=(1,) * len(news),
                    token_ids=tuple(token.token_id for token in news),
                ),
            )

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
