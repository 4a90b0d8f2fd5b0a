"""The real scheduler in a simulated world: gateways, ranks, network, controller and faults, all from one seed.

Each turn of the world a little time passes, and anything may happen: requests arrive, are cancelled, expire; plans travel,
are executed, answered, late, lost; copies take their time or fail; groups die and come back. After every event the
scheduler's own `check` runs. A client of each request compares every token with what the pretended model says without any
scheduler, and the rules of docs/DESIGN.md §5 are watched from outside (scheduler_rules.py).
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from beam_reference import reference_beam_search
from fake_ranks import BEAM_VOCAB_SIZE, VOCAB_SIZE, FakeRank, expected_completion, hello, logprob_of
from fake_ranks import encode_tokens as encode
from scheduler_rules import MAX_SKIPS, WatchedScheduler

from quire.cluster.scheduler.scheduler import SchedulerConfig
from quire.common.errors import StatusCode
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    BeamSearch,
    Cancel,
    DetachGroup,
    DrainGroup,
    EndReason,
    Failed,
    Finish,
    Finished,
    GroupDrained,
    GroupLost,
    Hello,
    PromptLogprobs,
    Rejected,
    SamplingState,
    SequenceStart,
    SessionUp,
    StepAck,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
    Welcome,
)

ROOT = cache_root(model="m", adapter="", tenant_scope="t", cache_salt="")
TURN_S = 0.01
# After the last turn nothing new comes; what is left must end within so many further turns.
MAX_TURNS_TO_END = 4000
# And what is left in the groups behind the last of them, in so many.
MAX_TURNS_TO_LEAVE = 100


@dataclass
class Client:
    """What somebody asked for, and what came."""

    name: str
    submit: Submit
    gateway: bytes
    expected: list[list[int]] = field(default_factory=list)  # by sequence
    handle: int = -1
    received: list[list[int]] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)  # sequences
    cancelled: set[int] = field(default_factory=set)  # sequences
    kept: dict[int, int] = field(default_factory=dict)  # tokens kept by a Finish, by sequence
    end: str = ""
    has_deadline: bool = False
    decoded_from: int = 0  # its prompt's tokens from here on are what another request produced
    num_prompt_logprobs: int = 0


@dataclass
class World:
    """What the seed decides once."""

    num_groups: int
    num_ranks: int
    block_size: int
    num_blocks: int
    num_cpu_blocks: int
    max_rows: int
    max_batched_tokens: int
    max_model_len: int
    preemption: str
    max_waiting: int
    arrival_rate: float
    burst: int
    max_prompt: int
    max_tokens: int
    num_tenants: int
    classes: tuple[int, ...]
    faults: bool
    slow_ranks: float  # chance that a rank does nothing in a turn
    slow_copies: float  # chance that a copy is not done at a step's end
    failing_copies: float
    measured_speed: bool

    @property
    def most_plans_waited(self) -> int:
        """Plans with work in them that may pass while a request waits, at any of its turns: as if all that can be before it, those
        that run, those that wait, and those that may be let past, went one by one, each a token at a time, in every group."""
        num_before = self.max_waiting + self.max_rows + MAX_SKIPS
        return self.num_groups * num_before * (self.max_prompt + self.max_tokens)

    @staticmethod
    def draw(rng: random.Random) -> "World":
        block_size = rng.choice((1, 2, 4, 4))
        max_prompt = rng.choice((3, 8, 20))
        max_tokens = rng.choice((3, 8, 14))
        most = -(-(max_prompt + max_tokens) // block_size) + 1
        is_crowd = rng.random() < 0.1  # as many rows as a step has tokens, and blocks for all of them
        max_batched_tokens = rng.choice((16, 24)) if is_crowd else rng.choice((4, 9, 16, 40))
        return World(
            num_groups=rng.choice((1, 1, 2, 3)),
            num_ranks=rng.choice((1, 1, 1, 2)),
            block_size=block_size,
            num_blocks=rng.randint(most, 2 * most) * (6 if is_crowd else 1),
            num_cpu_blocks=rng.choice((0, most // 2, 2 * most, 4 * most)),
            max_rows=max_batched_tokens if is_crowd else rng.randint(2, 8),
            max_batched_tokens=max_batched_tokens,
            max_model_len=max_prompt + max_tokens,
            preemption=rng.choice(("auto", "auto", "swap", "recompute")),
            max_waiting=rng.choice((4, 12, 12)),
            arrival_rate=0.8 if is_crowd else rng.choice((0.1, 0.2, 0.4)),
            burst=rng.choice((1, 1, 5)),
            max_prompt=max_prompt,
            max_tokens=max_tokens,
            num_tenants=rng.choice((1, 3)),
            classes=rng.choice(((2,), (1, 2, 3), (1, 2, 2, 2, 3))),
            faults=rng.random() < 0.4,
            slow_ranks=rng.choice((0.0, 0.1, 0.5)),
            slow_copies=rng.choice((0.0, 0.5, 0.8)),
            failing_copies=rng.choice((0.0, 0.0, 0.05)),
            measured_speed=rng.random() < 0.5,
        )


class Group:
    """The ranks of one term, and the messages between them and the scheduler."""

    def __init__(self, group_id: str, term: int, world: World, rng: random.Random) -> None:
        self.group_id = group_id
        self.term = term
        self.is_dead = False
        self.plans: list[deque[StepPlan]] = [deque() for _ in range(world.num_ranks)]
        self.answers: list[deque[StepResult | StepAck]] = [deque() for _ in range(world.num_ranks)]
        self.ranks = [
            FakeRank(
                block_size=world.block_size,
                num_blocks=world.num_blocks,
                num_cpu_blocks=world.num_cpu_blocks,
                rank=rank,
                term=term,
                waits_for=lambda _: world.slow_copies > 0 and rng.random() < world.slow_copies,
                fails=lambda _: world.failing_copies > 0 and rng.random() < world.failing_copies,
            )
            for rank in range(world.num_ranks)
        ]


class Simulation:
    """One seed's world."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.world = world = World.draw(rng)
        self.now_s = 0.0
        self.turn = 0
        self.config = SchedulerConfig(
            "s",
            max_waiting_requests=world.max_waiting,
            max_waiting_tokens=100_000,
            ageing_s=0.6,
            patience_s=1.0,
            min_step_timeout_s=0.5,
            first_step_timeout_s=0.5,
            heartbeat_s=0.2,
            unserved_timeout_s=3.0,
        )
        self.scheduler = WatchedScheduler(self.config, lambda: self.now_s, most_plans_waited=world.most_plans_waited)
        self.clients: dict[str, Client] = {}
        self.by_handle: dict[int, Client] = {}
        self.groups: dict[str, Group] = {}
        self.retired: list[Group] = []  # of terms that are over; their messages may still come
        self.restarts: list[tuple[float, str, int]] = []  # (when, group, term)
        self.base = [rng.randrange(VOCAB_SIZE) for _ in range(world.max_prompt)]
        self.num_requests = 0
        self.num_plans = 0
        self.num_draining = 0
        self.decoded_from = 0
        self.lost_by_stale = False
        self.is_over = False
        for index in range(world.num_groups):
            self._start_group(f"g{index}", 1)
        self.gateways = [b"gw0", b"gw1"]
        for gateway in self.gateways:
            self.scheduler.hello(gateway, Hello(PROTOCOL_VERSION, gateway.decode()))
        self._deliver()

    @property
    def seen(self) -> Counter[str]:
        """What happened, for coverage."""
        ends = Counter(client.end for client in self.clients.values())
        return self.scheduler.seen + ends

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, num_turns: int) -> None:
        """So many turns with arrivals and faults, then as many without as all requests take to end."""
        for _ in range(num_turns):
            self._turn()
        self.is_over = True
        for _ in range(MAX_TURNS_TO_END):
            if all(client.end for client in self.clients.values()):
                break
            self._turn()
        else:
            waiting = [client.name for client in self.clients.values() if not client.end]
            raise AssertionError(f"requests {waiting} never ended")
        for _ in range(MAX_TURNS_TO_LEAVE):  # the last rows leave, the last copies end
            if not any(group.has_work() or group.outstanding for group in self.scheduler.groups.values()):
                break
            self._turn()
        for group in self.scheduler.groups.values():
            assert group.pool.num_held == 0, "blocks are left when nobody is there"
            assert group.cpu_pool.num_held == 0, "CPU blocks are left when nobody is there"
            assert not len(group.copies)

    def _turn(self) -> None:
        rng, world = self.rng, self.world
        self.turn += 1
        self.now_s += TURN_S
        if not self.is_over:
            if rng.random() < world.arrival_rate:
                for _ in range(rng.randint(1, world.burst)):
                    self._submit()
            if self.by_handle and rng.random() < 0.03:
                self._interfere()
            if world.faults and rng.random() < 0.004:
                self._fault()
        self.scheduler.tick(self.now_s)
        if self.scheduler.has_messages:
            self._deliver()
        while self.restarts and self.restarts[0][0] <= self.now_s:
            _, group_id, term = self.restarts.pop(0)
            self._start_group(group_id, term)
        for group in list(self.groups.values()):
            self._send(group)
            if not group.is_dead:
                self._work(group)
        for group in self.retired:
            if rng.random() < 0.3:
                self._answer(group)
                assert not self.lost_by_stale, "a message of a term that is over loses the group"

    # -- clients ------------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        rng, world = self.rng, self.world
        self.num_requests += 1
        prompt = self._prompt()
        kind = rng.random()
        num_sequences = 1 if kind < 0.8 else rng.randint(2, 3)
        beam = BeamSearch(num_sequences, rng.choice((0.0, 1.0, 2.0)), rng.choice((1, 2, 3))) if kind > 0.92 else None
        stop_ids: tuple[int, ...] = ()
        if rng.random() < 0.5:
            first = rng.randrange(VOCAB_SIZE - 60) if beam is None else rng.randrange(BEAM_VOCAB_SIZE - 4)
            stop_ids = tuple(range(first, first + (60 if beam is None else 4)))
        sampling = SamplingState(
            seed=rng.randrange(5),
            stop_ids=stop_ids,
            min_tokens=rng.choice((0, 0, 2)),
            num_logprobs=0 if rng.random() < 0.1 and beam is None else None,
            num_prompt_logprobs=0 if rng.random() < 0.05 and beam is None else None,
        )
        max_tokens = rng.randint(1, world.max_tokens)
        has_deadline = rng.random() < 0.05
        submit = Submit(
            request_id=f"r{self.num_requests}",
            attempt=0,
            tenant=f"t{rng.randrange(world.num_tenants) ** 2 % world.num_tenants}",
            priority=rng.choice(world.classes),
            model="m",
            adapter="",
            prompt_ids=tuple(prompt),
            block_hashes=tuple(hash_full_blocks(ROOT, prompt, block_size=world.block_size)),
            cache_root=ROOT,
            sequences=tuple(SequenceStart(index) for index in range(num_sequences)),
            n=num_sequences,
            sampling=sampling,
            max_tokens=max_tokens,
            time_left_s=rng.uniform(0.05, 2.0) if has_deadline else 1000.0,
            age_s=0.0,
            beam=beam,
        )
        client = Client(submit.request_id, submit, rng.choice(self.gateways), has_deadline=has_deadline)
        client.decoded_from = self.decoded_from
        self.clients[client.name] = client
        self.scheduler.submit(client.gateway, submit, self.now_s)
        self._deliver()

    def _prompt(self) -> list[int]:
        """Tokens of its own, often behind the beginning that many have in common, or behind what another request produced."""
        rng, most = self.rng, self.world.max_prompt
        kind = rng.random()
        begin: list[int] = []
        self.decoded_from = most
        if kind < 0.4:
            begin = self.base[: rng.randint(0, most)]
        elif kind < 0.6 and self.by_handle:
            other = rng.choice(list(self.by_handle.values()))
            begin = [*other.submit.prompt_ids, *other.received[0]][: rng.randint(0, most)]
            self.decoded_from = len(other.submit.prompt_ids)
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0 if begin else 1, max(1, most - len(begin))))]
        return (begin + own)[:most]

    def _interfere(self) -> None:
        """A client goes away, ends a sequence early, or its gateway submits it again."""
        rng = self.rng
        clients = list(self.by_handle.values())
        young = [client for client in clients if client.submit.n > 1 and client.submit.beam is None and not any(client.received)]
        is_young = bool(young) and rng.random() < 0.5
        client = rng.choice(young if is_young else clients)
        submit = client.submit
        action = 0.6 if is_young else rng.random()  # one sequence less, before any has a token
        open_sequences = [i for i in range(len(client.expected)) if i not in client.ended and i not in client.cancelled]
        if action < 0.5 or client.submit.beam:
            client.end = "cancelled"
            del self.by_handle[client.handle]
            self.scheduler.cancel(client.gateway, Cancel(client.name, submit.attempt, None, "client"))
        elif action < 0.65:
            index = rng.choice(open_sequences)
            client.cancelled.add(index)
            if len(open_sequences) == 1:
                client.end = "cancelled"
                del self.by_handle[client.handle]
            self.scheduler.cancel(client.gateway, Cancel(client.name, submit.attempt, index, "client"))
        elif action < 0.8:
            index = rng.choice(open_sequences)
            if client.received[index]:
                client.kept[index] = rng.randint(1, len(client.received[index]))
                self.scheduler.finish(client.gateway, Finish(client.name, submit.attempt, index, client.kept[index]), self.now_s)
        elif not client.cancelled and not client.ended:
            starts = tuple(SequenceStart(i, tuple(client.received[i])) for i in range(len(client.expected)))
            if all(len(start.resumed_ids) < submit.max_tokens for start in starts):
                del self.by_handle[client.handle]
                client.submit = Submit(
                    **{f: getattr(submit, f) for f in submit.__struct_fields__} | {"attempt": submit.attempt + 1, "sequences": starts}
                )
                client.num_prompt_logprobs = 0
                self.scheduler.submit(client.gateway, client.submit, self.now_s)
        self._deliver()

    # -- the network --------------------------------------------------------------------------------------------------

    def _send(self, group: Group) -> None:
        while (plan := self.scheduler.next_plan(group.group_id, self.now_s)) is not None:
            self.num_plans += 1
            for plans in group.plans:
                plans.append(plan)
            self.scheduler.check()

    def _work(self, group: Group) -> None:
        """Ranks execute plans, and answers arrive."""
        rng, world = self.rng, self.world
        for rank, plans in enumerate(group.plans):
            if plans and not (world.slow_ranks and rng.random() < world.slow_ranks):
                result, ack = group.ranks[rank].execute(plans.popleft())
                if rank == 0:
                    group.answers[rank].append(self._timed(result))
                group.answers[rank].append(ack)
        if not (world.slow_ranks and rng.random() < world.slow_ranks):
            self._answer(group)

    def _timed(self, result: StepResult) -> StepResult:
        """A result with times, as a device would report them; `measured_speed` worlds only, since auto needs them."""
        if not self.world.measured_speed:
            return result
        return StepResult(**{f: getattr(result, f) for f in result.__struct_fields__} | {"device_s": self.rng.choice((0.004, 0.006, 0.02))})

    def _answer(self, group: Group) -> None:
        for answers in group.answers:
            while answers:
                answer = answers.popleft()
                if isinstance(answer, StepResult):
                    self.scheduler.apply(group.group_id, answer, self.now_s)
                    self._deliver(is_stale=group in self.retired)
                else:
                    self.scheduler.ack(group.group_id, answer, self.now_s)
                    if answer.copies_done or answer.copies_failed or answer.error:
                        self._deliver(is_stale=group in self.retired)
                if self.rng.random() < 0.2:
                    break

    def _deliver(self, *, is_stale: bool = False) -> None:
        """The scheduler's messages reach gateways and controller."""
        self.scheduler.check()
        outbox = self.scheduler.take_outbox()
        for gateway, message in outbox.to_gateways:
            self._receive(gateway, message)
        for control in outbox.to_controller:
            if isinstance(control, GroupLost):
                self.lost_by_stale = is_stale
                self._lost(control.group_id, control.term)
            elif isinstance(control, GroupDrained):
                self.num_draining -= 1
                self.scheduler.detach(DetachGroup(control.group_id, control.term, "drained"), self.now_s)
                self._lost(control.group_id, control.term)

    def _receive(self, gateway: bytes, message: SessionUp) -> None:
        match message:
            case Tokens():
                assert len(message.token_ids) == sum(message.counts)
                position = 0
                logprobs = dict(message.logprobs)
                for entry, handle in enumerate(message.handles):
                    client = self.by_handle[handle]
                    assert client.gateway == gateway
                    ids = message.token_ids[position : position + message.counts[entry]]
                    position += len(ids)
                    index = message.sequences[entry]
                    received, expected = client.received[index], client.expected[index]
                    assert index not in client.ended
                    assert index not in client.cancelled
                    assert message.first_offsets[entry] == len(received), f"{client.name}: a gap or a duplicate"
                    assert tuple(expected[len(received) : len(received) + len(ids)]) == ids, f"{client.name}: wrong tokens"
                    wants = client.submit.sampling.num_logprobs is not None
                    assert wants == (entry in logprobs)
                    if wants:
                        before = encode([*client.submit.prompt_ids, *received])
                        assert logprobs[entry].logprobs == (logprob_of(before, ids[0]),)
                    received.extend(ids)
            case PromptLogprobs():
                client = self.by_handle[message.handle]
                assert message.first_position == client.num_prompt_logprobs + 1
                for place, value in enumerate(message.logprobs.logprobs):
                    position = message.first_position + place
                    assert value == logprob_of(encode(client.submit.prompt_ids[:position]), position)
                client.num_prompt_logprobs += len(message.logprobs.logprobs)
            case Accepted():
                client = self.clients[message.request_id]
                if not client.expected:
                    client.expected = expected_of(client.submit)
                    client.received = [[] for _ in client.expected]
                client.handle = message.handle
                self.by_handle[message.handle] = client
            case Rejected():
                client = self.clients[message.request_id]
                assert message.reason in ("QUEUE_FULL", "NO_READY_GROUP", "TOO_MANY_SEQUENCES", "REQUEST_TOO_LARGE", "REQUEST_TOO_LONG"), (
                    message
                )
                self.by_handle.pop(client.handle, None)
                self._end(client, "rejected")
            case Finished():
                self._finished(message)
            case Failed():
                client = self.by_handle.pop(message.handle)
                allowed = [StatusCode.UNAVAILABLE, StatusCode.INTERNAL] if self.world.faults else []
                if client.has_deadline:
                    allowed.append(StatusCode.DEADLINE_EXCEEDED)
                assert message.code in allowed, message
                self._end(client, "expired" if message.code == StatusCode.DEADLINE_EXCEEDED else "failed")
            case Welcome():
                pass

    def _finished(self, message: Finished) -> None:
        client = self.by_handle[message.handle]
        index = message.sequence
        assert index not in client.ended, f"{client.name}: sequence {index} ends twice"
        client.ended.add(index)
        received, expected = client.received[index], client.expected[index]
        if index in client.kept:
            assert message.reason == EndReason.STOP
        else:
            assert received == expected, f"{client.name}: it ends after {len(received)} of {len(expected)} tokens"
            stops = expected[-1] in client.submit.sampling.stop_ids and len(expected) > client.submit.sampling.min_tokens
            assert message.reason == (EndReason.STOP if stops else EndReason.LENGTH)
            assert message.stop_id == (expected[-1] if stops else None)
        open_sequences = [i for i in range(client.submit.n) if i not in client.ended and i not in client.cancelled]
        assert message.is_last == (not open_sequences)
        spans = message.spans
        assert min(spans.queue_s, spans.prefill_s, spans.decode_s, spans.preempted_s) >= -1e-9, spans
        if client.submit.attempt == 0:
            assert message.usage.num_prompt_tokens == len(client.submit.prompt_ids)
            assert message.usage.num_cached_tokens < len(client.submit.prompt_ids)
        if message.is_last:
            self.scheduler.seen["hits behind decoded tokens"] += message.usage.num_cached_tokens > client.decoded_from
            if client.submit.sampling.num_prompt_logprobs is not None and not client.kept:
                assert client.num_prompt_logprobs == len(client.submit.prompt_ids) - 1
            del self.by_handle[message.handle]
            self._end(client, "finished")

    @staticmethod
    def _end(client: Client, end: str) -> None:
        assert not client.end, f"{client.name} ends twice: {client.end}, {end}"
        client.end = end

    # -- faults -------------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        rng = self.rng
        living = [group for group in self.groups.values() if not group.is_dead]
        if not living:
            return
        group = rng.choice(living)
        kind = rng.random()
        if kind < 0.3:  # a rank hangs: only time tells
            group.is_dead = True
        elif kind < 0.6:  # a rank dies, and Ray tells the controller
            self.scheduler.detach(DetachGroup(group.group_id, group.term, "a rank died"), self.now_s)
            self._lost(group.group_id, group.term)
        elif kind < 0.7 and self.retired:  # a rank of a term that is over says that it fails, or has done a step
            late = self.retired[-1]
            self.scheduler.ack(late.group_id, StepAck(late.term, 0, 0, error="late"), self.now_s)
            self.scheduler.apply(late.group_id, StepResult(late.term, 10**6), self.now_s)
            self._deliver(is_stale=True)
            assert not self.lost_by_stale, "a message of a term that is over loses the group"
        elif kind < 0.8:  # a rank says that it fails
            self.scheduler.ack(group.group_id, StepAck(group.term, 0, 0, error="out of memory"), self.now_s)
        elif kind < 0.9:  # a result, or an acknowledgement, is lost on the way
            if group.answers[0]:
                group.answers[0].popleft()
        elif self.num_draining == 0:
            self.num_draining += 1
            self.scheduler.drain(DrainGroup(group.group_id, group.term))
        self._deliver()

    def _lost(self, group_id: str, term: int) -> None:
        """The controller ends the ranks and starts them again some time later; messages of theirs may still be on their way."""
        group = self.groups.get(group_id)
        if group is None or group.term != term:
            return
        if group_id in self.scheduler.groups and self.scheduler.groups[group_id].draining:
            self.num_draining -= 1
        self.scheduler.seen["groups lost"] += 1
        del self.groups[group_id]
        self.retired = [*self.retired[-2:], group]
        self.restarts.append((self.now_s + self.rng.uniform(0.05, 0.5), group_id, term + 1))
        self.restarts.sort()

    def _start_group(self, group_id: str, term: int) -> None:
        world = self.world
        self.groups[group_id] = Group(group_id, term, world, self.rng)
        self.scheduler.attach(
            AttachGroup(
                PROTOCOL_VERSION,
                group_id,
                term,
                "m",
                world.num_ranks,
                world.block_size,
                world.max_model_len,
                world.max_rows,
                world.max_batched_tokens,
                world.preemption,
            ),
            self.now_s,
        )
        for rank in range(world.num_ranks):
            message = hello(
                group_id,
                term=term,
                rank=rank,
                num_gpu_blocks=world.num_blocks + rank,
                num_cpu_blocks=world.num_cpu_blocks,
                max_rows=world.max_rows,
                copy_bytes_per_s=1e6,
                prefill_tokens_per_s=((1, 300.0), (16, 2000.0)) if world.measured_speed else (),
            )
            self.scheduler.rank_hello(message, self.now_s)
        self._deliver()


def expected_of(submit: Submit) -> list[list[int]]:
    """The completions of a request, by sequence, without any scheduler."""
    if submit.beam is not None:
        best = reference_beam_search(submit.prompt_ids, submit.sampling, submit.beam, max_tokens=submit.max_tokens)
        return [hypothesis.tokens for hypothesis in best[: submit.n]]
    return [
        expected_completion(submit.prompt_ids, submit.sampling, max_tokens=submit.max_tokens, index=start.index)
        for start in submit.sequences
    ]
