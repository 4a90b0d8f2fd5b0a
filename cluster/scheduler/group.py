"""One worker group as the scheduler sees it: its rows, its block pools, and the step plans it is sent.

A step is planned in this order, so that what runs is served before what comes:

    begin_step       rows that have their last token on the way leave; decoding rows get the blocks that they need, at the
                     price of preemptions if there are none
    resume_swapped   swapped sequence groups come back while there is room
    admit            the dispatcher adds waiting requests while there is room
    finish_step      chunks of prompts take what is left of max_batched_tokens; the plan
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from quire.cluster.scheduler.applied import Applied
from quire.cluster.scheduler.block_pool import BlockPool
from quire.cluster.scheduler.copies import CopyLedger
from quire.cluster.scheduler.request import LOOK_FIRST, Request, RequestState, Sequence, SequenceEnd, Transfer, most_blocks, num_sequences
from quire.cluster.scheduler.step_draft import SentPlan, StepDraft
from quire.cluster.scheduler.step_meter import StepMeter
from quire.cluster.scheduler.waiting_queue import HIGHEST_LEVEL
from quire.common.hashing import hash_block
from quire.common.messages import (
    AttachGroup,
    Chunk,
    EndReason,
    GroupStatus,
    PoolStatus,
    RankHello,
    RowAdd,
    RowErrorCode,
    StepAck,
    StepPlan,
    StepResult,
    Submit,
)

# Plans that may be sent and not yet answered: one computes, the next waits at the ranks, so that they never wait for us.
MAX_PLANS_OUTSTANDING: Final = 2
# Share of a step's tokens that is kept for prompts while any are there.
PREFILL_SHARE: Final = 1 / 8
# A prompt with more than this share of a step's tokens to go is long.
LONG_PREFILL_SHARE: Final = 1 / 2
# Long prompts that are computed at once: a second one would slow the first and help nobody.
MAX_LONG_PREFILLS: Final = 1
# Share of the pool that admission leaves free, so that those who run can grow before anybody must be preempted.
WATERMARK_SHARE: Final = 0.01
# Prompt tokens waiting to be computed, in steps' worth, from which on a group is overloaded: a cached prefix draws no more there.
OVERLOADED_STEPS: Final = 4

Note = Callable[[int, str], None]  # (handle, what happened to the request and why)
Charge = Callable[[Request, int], None]  # (who was served, tokens)


class Group:
    """Plans the steps of one worker group under one term."""

    def __init__(self, attach: AttachGroup, *, ageing_s: float = math.inf) -> None:
        self.group_id = attach.group_id
        self.term = attach.term
        self.model = attach.model
        self.config = attach
        self.note: Note | None = None
        self.charge: Charge | None = None
        self.hellos: dict[int, RankHello] = {}
        self.draining = False
        self.drain_reported = False
        self.pool = BlockPool(0, block_size=attach.block_size)
        self.cpu_pool = BlockPool(0, block_size=attach.block_size)
        self.copies = CopyLedger(self.pool, self.cpu_pool, num_ranks=attach.tensor_parallel_size)
        self.meter = StepMeter(prefill_tokens_per_s=(), copy_bytes_per_s=0.0, block_bytes=0)
        self.num_rows = 0
        self.running: dict[int, Request] = {}  # by handle; also those that are swapping in
        self.swapped: dict[int, Request] = {}  # by handle
        self.outstanding: deque[SentPlan] = deque()
        self.last_sent_s = 0.0
        self.last_answer_s = 0.0
        self.num_steps_done = 0
        self.num_swapped_out = 0
        self.num_recomputed = 0
        self._ageing_s = ageing_s
        self._block_size = attach.block_size
        self._next_step_id = 0
        self._draft = StepDraft()
        self._free_rows: list[int] = []
        self._removals: list[int] = []  # rows that the next plan takes from the ranks' batch
        self._held: set[int] = set()  # rows that the ranks hold
        self._beam_rows: set[int] = set()  # rows that only step when a plan says so
        self._prefilling: list[Sequence] = []  # in order of admission
        self._stepping: list[Sequence] = []  # beams whose next token is known and must be computed
        self._decoding: dict[int, Sequence] = {}  # by row: the ranks' sticky rows
        self._decode_order: list[Sequence] | None = None  # the same by ascending row; None when it must be sorted anew
        self._retiring: list[Sequence] = []  # sticky rows whose last token is on its way

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return len(self.hellos) == self.config.tensor_parallel_size

    def hello(self, hello: RankHello) -> None:
        """A rank is there. With the last one the group is ready, its pools as large as the smallest rank's."""
        self.hellos[hello.rank] = hello
        if not self.is_ready:
            return
        hellos = self.hellos.values()
        self.pool = BlockPool(min(h.num_gpu_blocks for h in hellos), block_size=self._block_size)
        self.cpu_pool = BlockPool(min(h.num_cpu_blocks for h in hellos), block_size=self._block_size)
        self.copies = CopyLedger(self.pool, self.cpu_pool, num_ranks=self.config.tensor_parallel_size)
        self.meter = StepMeter(
            prefill_tokens_per_s=self.hellos[0].prefill_tokens_per_s,
            copy_bytes_per_s=min(min(h.h2d_bytes_per_s, h.d2h_bytes_per_s) for h in hellos),
            block_bytes=max(h.block_bytes for h in hellos),
        )
        # Every row takes at least one token of a step.
        self.num_rows = min(self.config.max_sequences, self.config.max_batched_tokens, *(h.max_rows for h in hellos))
        self._free_rows = list(range(self.num_rows - 1, -1, -1))

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of prompt and completion that a request of one sequence may have here."""
        return min(self.config.max_model_len, self.pool.num_blocks * self._block_size)

    def most_blocks(self, submit: Submit) -> int:
        """Most blocks that a request holds here at once, whatever happens to it."""
        return most_blocks(
            num_prompt_tokens=len(submit.prompt_ids),
            max_tokens=submit.max_tokens,
            num_sequences=num_sequences(submit),
            block_size=self._block_size,
        )

    def can_ever_hold(self, submit: Submit) -> bool:
        """Whether the group, with nothing else in it, can take a request to its end."""
        return (
            len(submit.prompt_ids) + submit.max_tokens <= self.max_request_tokens
            and num_sequences(submit) <= self.num_rows
            and self.most_blocks(submit) <= self.pool.num_blocks
        )

    # -- admission ----------------------------------------------------------------------------------------------------

    @property
    def is_overloaded(self) -> bool:
        backlog = sum(sequence.num_to_prefill for sequence in self._prefilling)
        return not self._free_rows or backlog > OVERLOADED_STEPS * self.config.max_batched_tokens

    def prefix_hits(self, request: Request) -> int:
        """Leading blocks of its first sequence that the group holds or remembers."""
        hashes = request.submit.block_hashes
        return len(self._find(request.sequences[0])) if hashes and self.pool.knows(hashes[0]) else 0

    def has_room(self, request: Request) -> bool:
        """Whether a waiting request can join the next step."""
        if request.num_rows > len(self._free_rows):
            return False
        num_blocks, headroom = self._blocks_to_join(request)
        available = self.pool.num_available
        if num_blocks + headroom <= available:
            return True
        found = self._find(request.sequences[0])
        return num_blocks - len(found) + headroom <= available - self.pool.num_unheld(found)

    def lack_of_room(self, request: Request) -> str:
        """Why a waiting request cannot join, for its story."""
        num_blocks, headroom = self._blocks_to_join(request)
        hits = len(self._find(request.sequences[0]))
        return (
            f"needs {request.num_rows} rows and {num_blocks} blocks ({hits} of them cached) with {headroom} to spare; "
            f"{self.group_id} has {len(self._free_rows)} rows free and {self.pool.num_available} blocks available"
        )

    def is_closed_to(self, request: Request, now_s: float) -> bool:
        """Whether swapped requests of the same or a higher class go before it here."""
        return any(request.level <= self.swapped_level(other, now_s) for other in self.swapped.values())

    def swapped_level(self, request: Request, now_s: float) -> int:
        """The class of a swapped request, which rises by waiting like that of one in the queue."""
        return min(HIGHEST_LEVEL, request.level + int((now_s - request.preempted_at_s) / self._ageing_s))

    def admit(self, request: Request, now_s: float) -> int:
        """Give a waiting request, for which there is room, its rows and the blocks of what is known of it.

        The number of tokens that have to be computed.
        """
        assert request.state is RequestState.WAITING and not request.awaits_result, request
        block_size = self._block_size
        leader, *others = request.sequences
        found = self._find(leader)
        self.pool.fork(found)
        leader.block_table = found + self.pool.allocate(math.ceil(len(leader.token_ids) / block_size) - len(found))
        self._start(leader, num_blocks_found=len(found))
        if not request.is_unforked:
            # Each has tokens of its own. They share the blocks before the prompt's last token, which the first one computes.
            num_shared = (leader.num_prompt_tokens - 1) // block_size
            for sequence in others:
                own = self._find(sequence)
                shared = own if len(own) > num_shared else leader.block_table[:num_shared]
                self.pool.fork(shared)
                sequence.block_table = shared + self.pool.allocate(math.ceil(len(sequence.token_ids) / block_size) - len(shared))
                self._start(sequence, num_blocks_found=len(own) if shared is own else 0)
                if shared is not own:
                    sequence.leader, sequence.shared_tokens = leader, num_shared * block_size
        self._take_rows(request)
        if request.admitted_s is None:
            request.admitted_s = now_s
            request.num_cached_tokens = min(leader.num_planned, leader.num_prompt_tokens)
        elif request.is_preempted:
            request.preempted_s += now_s - request.preempted_at_s
        request.state = RequestState.RUNNING
        request.group_id = self.group_id
        self.running[request.handle] = request
        num_tokens = sum(sequence.num_to_prefill for sequence in request.sequences)
        if self.note:
            blocks = [sequence.block_table for sequence in request.sequences if sequence.block_table]
            self.note(
                request.handle, f"joins {self.group_id}: {leader.num_planned} tokens cached, {num_tokens} to compute, blocks {blocks}"
            )
        return num_tokens

    def release(self, request: Request) -> None:
        """Give back everything that a request holds here; its rows leave the batch with the next plan."""
        for sequence in request.sequences:
            self._let_go(sequence)
            sequence.ended = True
        self._free_rows += request.spare_rows
        request.spare_rows = []
        request.transfer = None
        self.running.pop(request.handle, None)
        self.swapped.pop(request.handle, None)

    def end_sequence(self, sequence: Sequence) -> None:
        """Give back what one sequence holds; its siblings go on."""
        request = sequence.request
        request.sequences.remove(sequence)
        sequence.ended = True
        if request.state is RequestState.RUNNING and request.sequences:
            self._bequeath(sequence, request.sequences)
        self._let_go(sequence)

    def _bequeath(self, sequence: Sequence, siblings: list[Sequence]) -> None:
        """Siblings may count on what an ending sequence computes: then one of them computes it instead."""
        unforked = [sibling for sibling in siblings if not sibling.block_table]
        if unforked:  # all of them are to be forked from it
            heir = unforked[0]
            heir.block_table, sequence.block_table = sequence.block_table, []
            heir.block_hashes, heir.num_published, heir.num_planned = sequence.block_hashes, sequence.num_published, sequence.num_planned
            self._queue_prefill(heir)
        followers = [sibling for sibling in siblings if sibling.leader is sequence]
        if followers and sequence.num_planned < followers[0].shared_tokens:
            heir = followers[0]
            heir.leader, heir.shared_tokens, heir.num_planned = None, 0, sequence.num_planned
            for follower in followers[1:]:
                follower.leader = heir
        else:
            for follower in followers:
                follower.follow()

    # -- steps --------------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a plan made now might compute or change anything."""
        return bool(self._decoding or self._prefilling or self._stepping or self._removals or self.swapped or len(self.copies))

    def may_plan(self) -> bool:
        return self.is_ready and len(self.outstanding) < MAX_PLANS_OUTSTANDING

    def begin_step(self, now_s: float) -> list[Request]:
        """See to the rows that decode; the requests that lost their blocks for recompute, which must be queued again."""
        for sequence in self._retiring:
            if sequence.row >= 0:
                self._leave_row(sequence)
        self._retiring = []
        self._draft = StepDraft()
        decoding = self._decoders()
        if self._prefilling and len(decoding) > (most := max(1, math.floor(self.config.max_batched_tokens * (1 - PREFILL_SHARE)))):
            # Prompts keep their share of the step. Whose turn it is to wait moves on with the step.
            first = self._next_step_id * most % len(decoding)
            turn = {(first + place) % len(decoding) for place in range(most)}
            self._draft.held = {sequence.row for place, sequence in enumerate(decoding) if place not in turn}
            decoding = [sequence for sequence in decoding if sequence.row not in self._draft.held]
        needy = [sequence for sequence in decoding if sequence.num_planned >= sequence.write_limit]
        needy += [sequence for sequence in self._stepping if sequence.num_planned >= sequence.write_limit]
        return self._give_blocks(needy, now_s) if needy else []

    def resume_swapped(self, now_s: float) -> None:
        """Bring swapped sequence groups back, in order, while there is room."""
        waiting = sorted(self.swapped.values(), key=lambda r: (-self.swapped_level(r, now_s), r.arrival_s, r.handle))
        for request in waiting:
            if request.transfer is not None or request.awaits_result:
                continue  # what it is made of is not all there yet
            if not self._swap_in(request, now_s):
                return

    def finish_step(self, now_s: float) -> StepPlan | None:
        """The next plan; None when there is nothing in it to do."""
        draft = self._draft
        decoded = self._decoders()
        if draft.held:
            decoded = [sequence for sequence in decoded if sequence.row not in draft.held]
        for sequence in decoded:
            sequence.num_planned += 1
            sequence.num_in_flight += 1
            if sequence.num_planned >= sequence.max_total - 1:
                self._retiring.append(sequence)
        budget = self.config.max_batched_tokens - len(decoded)
        budget -= self._plan_beams(budget)
        num_prefill_tokens = self._plan_prefill(budget)
        computes = bool(decoded or draft.chunks)
        wait_copies: tuple[int, ...] = ()
        if not computes and not self.outstanding and len(self.copies):
            # Nobody can go on before copies end, so the ranks wait for them: all but those that this very step starts afterwards.
            starting = {copy_id for copy_id, _, _ in draft.swap_out}
            wait_copies = tuple(copy_id for copy_id in self.copies.ids() if copy_id not in starting)
        if not (computes or self._removals or draft.swap_out or draft.swap_in or wait_copies):
            return None
        return self._send(draft, decoded, wait_copies, num_prefill_tokens, now_s)

    def heartbeat(self, now_s: float) -> StepPlan:
        """A plan that only says that the scheduler is there. Rows that decode, if any, are held."""
        return self._send(StepDraft(held={row for row in self._decoding}), [], (), 0, now_s)

    def objection(self, result: StepResult) -> str:
        """Why a result cannot be applied, "" if it can: it must answer the oldest outstanding plan, sample by sample."""
        if not self.outstanding or result.step_id != self.outstanding[0].step_id:
            expected = self.outstanding[0].step_id if self.outstanding else "none"
            return f"the result of step {result.step_id} came out of turn; expected: {expected}"
        sampled = self.outstanding[0].sampled
        if len(result.counts) != len(sampled) or sum(result.counts) != len(result.token_ids):
            return (
                f"the result of step {result.step_id} has {len(result.counts)} samples of {sum(result.counts)} tokens and "
                f"{len(result.token_ids)} token ids; the plan has {len(sampled)} samples"
            )
        without = {index for index, _ in result.row_errors}.union(index for index, _ in result.beam_candidates)
        if any(count != (0 if index in without else 1) for index, count in enumerate(result.counts)):
            return f"the result of step {result.step_id} has counts {result.counts} with errors or beams at {sorted(without)}"
        unknown = [code for index, code in result.row_errors if code not in set(RowErrorCode) or not 0 <= index < len(sampled)]
        if unknown:
            return f"the result of step {result.step_id} has unknown row errors {unknown}"
        beams = {index for index, _ in result.beam_candidates}
        failed = {index for index, _ in result.row_errors}
        wrong = [i for i, sequence in enumerate(sampled) if i not in failed and (sequence.request.beam is not None) != (i in beams)]
        return f"the result of step {result.step_id} has beam candidates where none belong, or none at {wrong}" if wrong else ""

    def apply(self, result: StepResult, now_s: float) -> Applied:
        """Take in the result of the oldest outstanding plan, to which there is no `objection`.

        What it brings for sequences that have ended meanwhile is dropped. Sequences that end by it still hold what they hold:
        the caller ends them.
        """
        sent = self.outstanding.popleft()
        self.last_answer_s = now_s
        self.num_steps_done += 1
        self.meter.observe(
            device_s=result.device_s,
            num_prefill_tokens=sent.num_prefill_tokens,
            num_decoding=sent.num_decoding,
            num_copies=sent.num_copies,
        )
        applied = Applied()
        if result.row_errors or result.beam_candidates or result.logprobs or result.prompt_logprobs:
            self._apply_rare(sent, result, applied)
            return applied
        tokens_of = applied.tokens_of
        for sequence, token_id in zip(sent.sampled, result.token_ids, strict=True):
            sequence.num_in_flight -= 1
            if sequence.ended:
                continue
            token_ids = sequence.token_ids
            token_ids.append(token_id)
            length = len(token_ids)
            columns = tokens_of[sequence.gateway]
            columns.handles.append(sequence.handle)
            columns.sequences.append(sequence.index)
            columns.first_offsets.append(length - sequence.num_prompt_tokens - 1)
            columns.token_ids.append(token_id)
            if length >= sequence.look_at or token_id in sequence.sampling.stop_ids:
                self._look(sequence, token_id, applied)
        return applied

    def acknowledged(self, ack: StepAck) -> list[Request]:
        """Take in the copies that a rank has ended, to which there is no objection; requests whose swap failed, which must be queued again."""
        failed = []
        for copy in self.copies.ended(ack.rank, done=ack.copies_done, failed=ack.copies_failed):
            request = copy.request
            if request.transfer is not copy.transfer or copy.transfer.num_left:
                continue  # it ended, or lost its blocks, meanwhile; or more copies are under way
            request.transfer = None
            if copy.transfer.failed:
                if self.note:
                    self.note(request.handle, "a copy failed: it will be computed anew")
                self._drop_blocks(request)
                self.num_recomputed += 1
                failed.append(request)
            elif not copy.is_out:
                self._swapped_in(request)
        return failed

    def advance_beams(self, request: Request) -> bool:
        """All beams of a step are there: choose those that go on. False when the search has ended.

        Dead beams give back their blocks; a parent's first child takes its place, further ones are forked from it.
        """
        assert request.beam is not None
        parents = request.sequences
        going_on = request.beam.advance(
            [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in parents],
            [sequence.cumulative_logprob for sequence in parents],
            stop_ids=frozenset(parents[0].sampling.stop_ids),
            min_tokens=parents[0].sampling.min_tokens,
        )
        if not going_on:
            return False
        taken: set[int] = set()
        children: list[Sequence] = []
        for beam in going_on:
            parent = parents[beam.parent]
            children.append(self._fork(parent) if beam.parent in taken else parent)
            taken.add(beam.parent)
        for place, parent in enumerate(parents):
            if place not in taken:
                parent.ended = True
                if parent.row >= 0:
                    request.spare_rows.append(parent.row)
                    self._leave_row(parent, keeps_row=True)
                self._let_go(parent)
        request.sequences = children
        for place, (child, beam) in enumerate(zip(children, going_on, strict=True)):
            child.index = place
            child.token_ids.append(beam.token_id)
            child.cumulative_logprob = beam.cumulative_logprob
            child.prefill_end = len(child.token_ids)
            child.write_limit = LOOK_FIRST
            self._publish_decoded(child)
            if request.state is RequestState.RUNNING:
                if child.row < 0:
                    child.row = request.spare_rows.pop()
                self._stepping.append(child)
        return True

    # -- what others see ------------------------------------------------------------------------------------------------

    def status(self) -> GroupStatus:
        return GroupStatus(
            group_id=self.group_id,
            term=self.term,
            num_running_sequences=sum(len(request.sequences) for request in self.running.values()),
            num_preempted_requests=len(self.swapped),
            num_steps=self.num_steps_done,
            gpu=_pool_status(self.pool),
            cpu=_pool_status(self.cpu_pool),
            gpu_ref_counts=self.pool.ref_counts(),
        )

    def due_s(self) -> float | None:
        """When the oldest plan must be answered."""
        if not self.outstanding:
            return None
        oldest = self.outstanding[0]
        return max(oldest.sent_s, self.last_answer_s) + oldest.time_out_s

    def set_time_out(self, *, least_s: float, first_s: float, factor: float) -> None:
        """Bound the answer to the plan just sent: `factor` times what such a step takes, `first_s` while that is not known."""
        sent = self.outstanding[-1]
        known_s = self.meter.time_out_s(num_prefill_tokens=sent.num_prefill_tokens, num_decoding=sent.num_decoding, factor=factor)
        sent.time_out_s = first_s if known_s is None or sent.num_copies else max(least_s, known_s)

    def check(self) -> None:
        """Assert every invariant."""
        block_size = self._block_size
        gpu_holders = [0] * self.pool.num_blocks
        cpu_holders = [0] * self.cpu_pool.num_blocks
        rows = list(self._free_rows)
        for request in self.running.values():
            is_running = request.state is RequestState.RUNNING
            assert is_running or request.state is RequestState.SWAPPING_IN
            rows += request.spare_rows
            for sequence in request.sequences:
                assert not sequence.ended and sequence.request is request
                assert sequence.num_planned <= len(sequence.token_ids) + sequence.num_in_flight, sequence.handle
                if sequence.row >= 0:
                    rows.append(sequence.row)
                else:
                    assert sequence.is_planned_to_its_end, "a part of a sequence group has lost its row"
                assert sequence.num_planned <= len(sequence.block_table if is_running else sequence.cpu_table) * block_size
                for block_id in sequence.block_table:
                    gpu_holders[block_id] += 1
                for block_id in sequence.cpu_table:
                    cpu_holders[block_id] += 1
        for request in self.swapped.values():
            assert request.state is RequestState.SWAPPED and not request.spare_rows
            for sequence in request.sequences:
                assert not sequence.ended and sequence.request is request
                assert sequence.row < 0 and not sequence.block_table, "a part of a sequence group was left behind"
                assert sequence.num_planned <= len(sequence.cpu_table) * block_size
                for block_id in sequence.cpu_table:
                    cpu_holders[block_id] += 1
        for copy in self.copies.under_way():
            gpu_holders[copy.gpu_block] += 1
            cpu_holders[copy.cpu_block] += 1
        self.pool.check(gpu_holders)
        if cpu_holders:
            self.cpu_pool.check(cpu_holders)
        rows.sort()
        assert rows == list(range(self.num_rows)), "a row is lost or used twice"
        assert len(self.outstanding) <= MAX_PLANS_OUTSTANDING
        for row, sequence in self._decoding.items():
            assert sequence.row == row and sequence.in_batch and not sequence.ended

    # -- helpers: blocks ------------------------------------------------------------------------------------------------

    def _find(self, sequence: Sequence) -> list[int]:
        """Blocks with the sequence's first tokens. The last token is always computed: the next one is drawn from its logits.
        A request for log probabilities of its prompt computes all of it."""
        if sequence.sampling.num_prompt_logprobs is not None:
            return []
        self._extend_hashes(sequence, len(sequence.token_ids) // self._block_size)
        return self.pool.find(sequence.block_hashes[: (len(sequence.token_ids) - 1) // self._block_size])

    def _blocks_to_join(self, request: Request) -> tuple[int, int]:
        """Blocks of what is known of a request; and those that must be available beside them, none when nothing else runs."""
        block_size = self._block_size
        leader = request.sequences[0]
        num_blocks = math.ceil(len(leader.token_ids) / block_size)
        num_forks = request.num_rows if request.is_unforked or request.num_rows > len(request.sequences) else 0
        if not request.is_unforked:
            num_shared = (leader.num_prompt_tokens - 1) // block_size
            num_blocks += sum(math.ceil(len(s.token_ids) / block_size) - num_shared for s in request.sequences[1:])
        if not self.running:
            return num_blocks, 0
        # Who was preempted comes back only when those that run can grow for a while, lest it be preempted again at once.
        return num_blocks, num_forks + self._watermark() + (len(self.running) if request.is_preempted else 0)

    def _watermark(self) -> int:
        return max(1, int(self.pool.num_blocks * WATERMARK_SHARE))

    def _give_blocks(self, needy: list[Sequence], now_s: float) -> list[Request]:
        """A block for each sequence that is about to write where it has none of its own, all of a request or none.

        When there is none, the latest arrival of the lowest class is preempted. Blocks of a swapped victim come free only when
        they have been copied; who waits for those is held.
        """
        requeued: list[Request] = []
        by_request: dict[int, list[Sequence]] = {}
        for sequence in needy:
            by_request.setdefault(sequence.handle, []).append(sequence)
        num_coming = self.copies.num_leaving()
        waiting: list[list[Sequence]] = []
        for sequences in sorted(by_request.values(), key=lambda sequences: _seniority(sequences[0].request)):
            request = sequences[0].request
            if request.state is not RequestState.RUNNING:
                continue  # preempted for one before it
            num_blocks = self._num_blocks_wanted(sequences)
            while self.pool.num_available < num_blocks:
                if self.pool.num_available + num_coming >= num_blocks or (victim := self._victim()) is None:
                    num_coming -= num_blocks
                    waiting.append(sequences)
                    break
                if self._preempt(victim, request, now_s):
                    requeued.append(victim)
                num_coming = self.copies.num_leaving()
                if victim is request:
                    break
            else:
                self._give(sequences)
        for sequences in waiting:
            request = sequences[0].request
            if request.state is not RequestState.RUNNING:
                continue
            if self._num_blocks_wanted(sequences) <= self.pool.num_available:  # a later victim left them at once
                self._give(sequences)
            elif request.beam:
                self._draft.waiting_beams.add(request.handle)
            else:
                self._draft.held.update(sequence.row for sequence in sequences)
        return requeued

    def _num_blocks_wanted(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that a request's sequences need now: new ones, and copies of shared ones; the last holder writes in place."""
        num_blocks = 0
        writers: dict[int, int] = {}  # by the block that they are about to write into
        for sequence in sequences:
            place = sequence.num_planned // self._block_size
            if place == len(sequence.block_table):
                num_blocks += 1
            else:
                writers[sequence.block_table[place]] = writers.get(sequence.block_table[place], 0) + 1
        return num_blocks + sum(min(count, self.pool.ref_count(block_id) - 1) for block_id, count in writers.items())

    def _give(self, sequences: Iterable[Sequence]) -> None:
        """Append a block to each table, or take a copy of the shared one that is about to be written into."""
        for sequence in sequences:
            table = sequence.block_table
            place = sequence.num_planned // self._block_size
            if place == len(table):
                table += self.pool.allocate(1)
                if self.charge:
                    self.charge(sequence.request, self._block_size)
                self._draft.grows.append((sequence.row, table[-1]))
            elif self.pool.ref_count(table[place]) > 1:
                source, table[place] = table[place], self.pool.allocate(1)[0]
                self.pool.free([source])
                self._draft.cow.append((sequence.row, source, table[place]))
            sequence.write_limit = len(table) * self._block_size

    def _publish_planned(self, sequence: Sequence) -> None:
        """Blocks of known tokens can be found as soon as they are planned: a later plan that reads them is computed later."""
        self._publish(sequence, min(sequence.num_planned // self._block_size, len(sequence.block_hashes)))

    def _publish_decoded(self, sequence: Sequence) -> None:
        """Blocks that decoding filled can be found once their tokens are known; the last token's keys are not written yet."""
        num_full = (len(sequence.token_ids) - 1) // self._block_size
        self._extend_hashes(sequence, num_full)
        if sequence.block_table and sequence.request.state is RequestState.RUNNING:
            self._publish(sequence, num_full)

    def _extend_hashes(self, sequence: Sequence, num_full: int) -> None:
        """Name the sequence's first full blocks."""
        hashes, block_size = sequence.block_hashes, self._block_size
        while len(hashes) < num_full:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else sequence.request.submit.cache_root
            hashes.append(hash_block(parent, sequence.token_ids[start : start + block_size]))

    def _publish(self, sequence: Sequence, num_full: int) -> None:
        while sequence.num_published < num_full:
            self.pool.publish(sequence.block_table[sequence.num_published], sequence.block_hashes[sequence.num_published])
            sequence.num_published += 1

    # -- helpers: rows --------------------------------------------------------------------------------------------------

    def _start(self, sequence: Sequence, *, num_blocks_found: int) -> None:
        """Let a sequence with a block table compute its known tokens."""
        sequence.num_planned = num_blocks_found * self._block_size
        sequence.num_published = num_blocks_found
        self._queue_prefill(sequence)

    def _queue_prefill(self, sequence: Sequence) -> None:
        sequence.prefill_end = len(sequence.token_ids)
        sequence.write_limit = len(sequence.block_table) * self._block_size
        sequence.look_at = 0
        self._prefilling.append(sequence)

    def _take_rows(self, request: Request) -> None:
        for sequence in request.sequences:
            sequence.row = self._free_rows.pop()
        request.spare_rows = [self._free_rows.pop() for _ in range(request.num_rows - len(request.sequences))]

    def _leave_row(self, sequence: Sequence, *, keeps_row: bool = False) -> None:
        """Take a sequence out of the batch; its request keeps the row, or it is free."""
        row = sequence.row
        if self._decoding.pop(row, None) is not None:
            self._decode_order = None
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
        elif sequence in self._stepping:
            self._stepping.remove(sequence)
        if sequence.in_batch:
            self._removals.append(row)
            self._held.discard(row)
            self._beam_rows.discard(row)
        if not keeps_row:
            self._free_rows.append(row)
        sequence.row, sequence.in_batch, sequence.fork_of = -1, False, None

    def _let_go(self, sequence: Sequence) -> None:
        """Give back a sequence's row and blocks."""
        if sequence.row >= 0:
            self._leave_row(sequence)
        self.pool.free(sequence.block_table)
        self.cpu_pool.free(sequence.cpu_table)
        sequence.forget_blocks()

    def _fork(self, parent: Sequence) -> Sequence:
        """A sequence with all that its parent has; its row is still to be given."""
        child = Sequence(
            request=parent.request,
            handle=parent.handle,
            gateway=parent.gateway,
            index=parent.index,
            token_ids=list(parent.token_ids),
            num_prompt_tokens=parent.num_prompt_tokens,
            max_total=parent.max_total,
            sampling=parent.sampling,
            fork_of=parent if parent.in_batch else None,
            block_table=list(parent.block_table),
            cpu_table=list(parent.cpu_table),
            block_hashes=list(parent.block_hashes),
            num_published=parent.num_published,
            num_planned=parent.num_planned,
        )
        self.pool.fork(child.block_table)
        self.cpu_pool.fork(child.cpu_table)
        return child

    def _decoders(self) -> list[Sequence]:
        """The ranks' sticky rows, ascending."""
        if self._decode_order is None:
            self._decode_order = [self._decoding[row] for row in sorted(self._decoding)]
        return self._decode_order

    # -- helpers: preemption --------------------------------------------------------------------------------------------

    def _victim(self) -> Request | None:
        """Who is preempted next: the latest arrival of the lowest class, of those that still need steps."""
        candidates = (r for r in self.running.values() if r.state is RequestState.RUNNING and r.needs_steps)
        return max(candidates, key=_seniority, default=None)

    def _preempt(self, request: Request, beneficiary: Request, now_s: float) -> bool:
        """Take a running request's rows and blocks away. True if it was not swapped out and must be queued again."""
        holders = Counter(block_id for sequence in request.sequences for block_id in self._computed_blocks(sequence))
        saved = list(holders)
        swaps, why = self._prefers_swap(request, holders)
        request.num_preemptions += 1
        request.preempted_at_s = now_s
        for sequence in request.sequences:
            sequence.look_at = 0  # a token on its way may be what it waits for
        if self.note:
            kind = "swapped out" if swaps else "preempted for recompute"
            who = "a block of its own" if beneficiary is request else f"request {beneficiary.handle}"
            self.note(request.handle, f"{kind} to make room for {who} ({why})")
        if not swaps:
            self.num_recomputed += 1
            self._drop_blocks(request)
            return True
        self.num_swapped_out += 1
        cpu_blocks = dict(zip(saved, self.cpu_pool.allocate(len(saved)), strict=True))
        request.transfer = Transfer()
        self._draft.swap_out += self.copies.start(cpu_blocks.items(), request=request, transfer=request.transfer, is_out=True)
        for sequence in request.sequences:
            sequence.cpu_table = [cpu_blocks[block_id] for block_id in self._computed_blocks(sequence)]
            self.cpu_pool.fork(sequence.cpu_table)
            num_planned, cpu_table = sequence.num_planned, sequence.cpu_table
            if sequence.row >= 0:
                self._leave_row(sequence)
            self.pool.free(sequence.block_table)
            sequence.forget_blocks()
            sequence.num_planned, sequence.cpu_table = num_planned, cpu_table
        self.cpu_pool.free(list(cpu_blocks.values()))  # the tables and the copies hold them now
        self._free_rows += request.spare_rows
        request.spare_rows = []
        del self.running[request.handle]
        self.swapped[request.handle] = request
        request.state = RequestState.SWAPPED
        return False

    def _prefers_swap(self, request: Request, saved: Mapping[int, int]) -> tuple[bool, str]:
        """Whether a victim is swapped, by GPU time stolen from the others (docs/DESIGN.md S6); and why.

        saved: how often the request holds each of its computed blocks
        """
        if self.config.preemption == "recompute":
            return False, "as told"
        if not saved or any(s.leader is not None or not s.block_table for s in request.sequences):
            return False, "its prompt was not all computed"
        if len(saved) > self.cpu_pool.num_available:
            return False, f"its {len(saved)} blocks do not fit into the {self.cpu_pool.num_available} free ones of the swap pool"
        if self.config.preemption == "swap":
            return True, "as told"
        num_lost = sum(self.pool.ref_count(block_id) == count for block_id, count in saved.items()) * self._block_size
        recompute_s = self.meter.recompute_s(num_lost)
        swap_s = self.meter.swap_s(len(saved), backlog=len(self.copies))
        if recompute_s is None:
            return True, "the speed of prefill is not known yet"
        return swap_s <= recompute_s, f"swap would take {swap_s * 1e3:.2f} ms of the others' time, recompute {recompute_s * 1e3:.2f} ms"

    def _computed_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks of a running sequence with keys and values in them."""
        return sequence.block_table[: math.ceil(sequence.num_planned / self._block_size)]

    def _drop_blocks(self, request: Request) -> None:
        """A request loses all that it holds here and waits to be computed anew."""
        for sequence in request.sequences:
            self._let_go(sequence)
        self._free_rows += request.spare_rows
        request.spare_rows = []
        request.transfer = None
        self.running.pop(request.handle, None)
        self.swapped.pop(request.handle, None)
        request.state = RequestState.WAITING

    def _swap_in(self, request: Request, now_s: float) -> bool:
        """Bring one swapped request back, if there is room for it.

        Full blocks that the pool still knows are taken from there, the others copied. A block shared by siblings stays shared,
        but for one that they are about to write into: there each gets a copy of its own.
        """
        block_size = self._block_size
        found: dict[int, int] = {}  # GPU block by CPU block
        copied: dict[int, int | None] = {}  # CPU blocks that need a GPU block
        num_own = 0
        for sequence in request.sequences:
            for place, cpu_block in enumerate(sequence.cpu_table):
                if (place + 1) * block_size > sequence.num_planned:
                    num_own += 1
                elif cpu_block not in found and cpu_block not in copied:
                    known = self.pool.find([sequence.block_hashes[place]]) if place < len(sequence.block_hashes) else []
                    if known:
                        found[cpu_block] = known[0]
                    else:
                        copied[cpu_block] = None
            num_own += math.ceil(len(sequence.token_ids) / block_size) - len(sequence.cpu_table)
        headroom = self._watermark() + len(self.running) if self.running else 0
        num_available = self.pool.num_available - self.pool.num_unheld(set(found.values()))
        if request.num_rows > len(self._free_rows) or len(copied) + num_own + headroom > num_available:
            return False
        for gpu_block in found.values():
            self.pool.fork([gpu_block])  # lest `allocate` takes it; given back below, when the tables hold it
        homes = {**found, **dict(zip(copied, self.pool.allocate(len(copied)), strict=True))}
        pairs = [(homes[cpu_block], cpu_block) for cpu_block in copied]
        for sequence in request.sequences:
            for place, cpu_block in enumerate(sequence.cpu_table):
                if (place + 1) * block_size > sequence.num_planned:
                    sequence.block_table += self.pool.allocate(1)
                    pairs.append((sequence.block_table[-1], cpu_block))
                else:
                    self.pool.fork([homes[cpu_block]])
                    sequence.block_table.append(homes[cpu_block])
            sequence.block_table += self.pool.allocate(math.ceil(len(sequence.token_ids) / block_size) - len(sequence.block_table))
        self.pool.free(list(homes.values()))
        self._take_rows(request)
        request.transfer = Transfer()
        self._draft.swap_in += self.copies.start(pairs, request=request, transfer=request.transfer, is_out=False)
        del self.swapped[request.handle]
        self.running[request.handle] = request
        request.state = RequestState.SWAPPING_IN
        request.preempted_s += now_s - request.preempted_at_s
        if self.note:
            self.note(request.handle, f"swaps in: {len(found)} blocks found, {len(pairs)} copied")
        if not pairs:
            request.transfer = None
            self._swapped_in(request)
        return True

    def _swapped_in(self, request: Request) -> None:
        """All blocks are there: the request goes on with the next plan."""
        request.state = RequestState.RUNNING
        for sequence in request.sequences:
            self.cpu_pool.free(sequence.cpu_table)
            sequence.cpu_table = []
            self._publish_planned(sequence)
            self._queue_prefill(sequence)

    # -- helpers: planning ----------------------------------------------------------------------------------------------

    def _plan_beams(self, budget: int) -> int:
        """One token for each beam whose step is due, how many tokens. All beams of a request step together, or none: a fork is
        made of its parent as it was before the parent's own next token."""
        num_tokens = 0
        for sequence in self._stepping:
            if sequence.handle in self._draft.waiting_beams:
                continue
            num_tokens += 1
            self._chunk(sequence, 1, is_chosen=True)
        assert num_tokens <= budget, "there are more rows than a step has tokens"
        self._stepping = [sequence for sequence in self._stepping if not sequence.num_in_flight]
        return num_tokens

    def _plan_prefill(self, budget: int) -> int:
        """Chunks of at most `budget` tokens for the sequences in prefill, oldest first; how many tokens.

        A long prompt leaves half of the budget to short ones, if there are any, and takes what they leave.
        """
        if not self._prefilling or budget <= 0:
            return 0
        long_tokens = self.config.max_batched_tokens * LONG_PREFILL_SHARE
        due = [s for s in self._prefilling if s.leader is None or s.leader.num_planned >= s.shared_tokens]
        counts: dict[int, int] = {}
        longs: list[int] = []
        for place, sequence in enumerate(due):
            left = sequence.num_to_prefill
            if left > long_tokens:
                if len(longs) == MAX_LONG_PREFILLS:
                    continue
                longs.append(place)
                has_others = any(s.num_to_prefill <= long_tokens for s in due)
                left = min(left, max(1, budget // 2) if has_others else budget)
            counts[place] = min(left, budget)
            budget -= counts[place]
            if budget == 0:
                break
        for place in longs:
            more = min(budget, due[place].num_to_prefill - counts[place])
            counts[place] += more
            budget -= more
        for place, count in counts.items():
            self._chunk(due[place], count)
        return sum(counts.values())

    def _chunk(self, sequence: Sequence, count: int, *, is_chosen: bool = False) -> None:
        """Plan the next `count` tokens of a sequence; behind its last one it is sampled. is_chosen: the token is one that the
        scheduler chose and the ranks do not know."""
        draft, request = self._draft, sequence.request
        if sequence.leader is not None:
            sequence.follow()
        start = sequence.num_planned
        if not sequence.in_batch:
            if sequence.fork_of is not None:
                draft.forks.append((sequence.fork_of.row, sequence.row, sequence.index))
                sequence.fork_of = None
            else:
                draft.add_rows.append(self._row_add(sequence))
            sequence.in_batch = True
            if request.beam:
                self._beam_rows.add(sequence.row)
        if is_chosen:
            draft.appends.append((sequence.row, sequence.token_ids[-1]))
        sequence.num_planned += count
        is_last = sequence.num_planned == sequence.prefill_end
        draft.chunks.append(Chunk(sequence.row, start, count, is_last))
        draft.chunked.append((sequence, start))
        self._publish_planned(sequence)
        if is_last:
            self._sample_after_prefill(sequence)

    def _row_add(self, sequence: Sequence) -> RowAdd:
        return RowAdd(
            row=sequence.row,
            token_ids=tuple(sequence.token_ids),
            prompt_len=sequence.num_prompt_tokens,
            num_computed=sequence.num_planned,
            block_ids=tuple(sequence.block_table),
            adapter_id=0,
            sampling=sequence.sampling,
        )

    def _sample_after_prefill(self, sequence: Sequence) -> None:
        draft, request = self._draft, sequence.request
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        if request.beam:
            self._sample(sequence, source_row=sequence.row)
            return
        forked = [s for s in request.sequences if s is not sequence and not s.block_table] if request.is_unforked else []
        for sibling in forked:
            sibling.block_table = list(sequence.block_table)
            self.pool.fork(sibling.block_table)
            sibling.block_hashes = list(sequence.block_hashes)
            sibling.num_published = sequence.num_published
            sibling.num_planned = sequence.num_planned
            sibling.look_at = 0
            sibling.in_batch = True
            draft.forks.append((sequence.row, sibling.row, sibling.index))
        for sampled in (sequence, *forked):
            self._sample(sampled, source_row=sequence.row)
            sampled.write_limit = LOOK_FIRST if forked else sampled.write_limit
            self._decoding[sampled.row] = sampled
            if sampled.is_planned_to_its_end:
                self._retiring.append(sampled)
        self._decode_order = None

    def _sample(self, sequence: Sequence, *, source_row: int) -> None:
        self._draft.samples.append((source_row, sequence.row))
        self._draft.sampled.append(sequence)
        sequence.num_in_flight += 1

    def _send(
        self, draft: StepDraft, decoded: list[Sequence], wait_copies: tuple[int, ...], num_prefill_tokens: int, now_s: float
    ) -> StepPlan:
        held = draft.held | self._beam_rows
        hold_rows = (*sorted(held - self._held), *(~row for row in sorted(self._held - held)))
        self._held = held
        remove_rows, self._removals = tuple(self._removals), []
        plan = draft.plan(term=self.term, step_id=self._next_step_id, remove_rows=remove_rows, hold_rows=hold_rows, wait_copies=wait_copies)
        self.outstanding.append(
            SentPlan(
                step_id=plan.step_id,
                sent_s=now_s,
                time_out_s=math.inf,
                sampled=draft.sampled + decoded,
                chunks=draft.chunked,
                num_prefill_tokens=num_prefill_tokens,
                num_decoding=len(decoded),
                num_copies=len(self.copies),
            )
        )
        self._next_step_id += 1
        self.last_sent_s = now_s
        return plan

    # -- helpers: results -----------------------------------------------------------------------------------------------

    def _look(self, sequence: Sequence, token_id: int, applied: Applied) -> None:
        """What a new token means beside being one more: an end, a full block, the first of all."""
        request = sequence.request
        applied.has_resumable |= request.state is not RequestState.RUNNING
        length = len(sequence.token_ids)
        num_tokens = length - sequence.num_prompt_tokens
        if request.first_token_s is None:
            applied.first.append(request)
        if token_id in sequence.sampling.stop_ids and num_tokens > sequence.sampling.min_tokens:
            applied.ends.append(SequenceEnd(sequence, EndReason.STOP, token_id, num_tokens))
        elif length >= sequence.max_total:
            applied.ends.append(SequenceEnd(sequence, EndReason.LENGTH, None, num_tokens))
        self._publish_decoded(sequence)
        next_full = ((length - 1) // self._block_size + 1) * self._block_size + 1
        sequence.look_at = min(next_full, sequence.max_total)

    def _apply_rare(self, sent: SentPlan, result: StepResult, applied: Applied) -> None:
        """`apply` for results with more than plain tokens."""
        errors, beams, logprobs = dict(result.row_errors), dict(result.beam_candidates), dict(result.logprobs)
        for index, entry in result.prompt_logprobs:
            if index < len(sent.chunks) and not sent.chunks[index][0].ended:
                applied.prompt_logprobs.append((*sent.chunks[index], entry))
        token_ids = iter(result.token_ids)
        for index, sequence in enumerate(sent.sampled):
            token_id = next(token_ids) if result.counts[index] else None
            sequence.num_in_flight -= 1
            request = sequence.request
            if sequence.ended:
                continue
            if index in errors:
                self.pool.unpublish(sequence.block_table)  # what gave no finite logits must not be found by others
                applied.failed.append((request, RowErrorCode(errors[index])))
            elif token_id is None:
                assert request.beam is not None
                if request.first_token_s is None and request not in applied.first:
                    applied.first.append(request)
                request.beam.reported[request.sequences.index(sequence)] = beams[index]
                if len(request.beam.reported) == len(request.sequences):
                    applied.beam_steps.append(request)
            else:
                sequence.token_ids.append(token_id)
                entry = logprobs.get(index)
                if entry is not None:
                    sequence.cumulative_logprob += sum(entry.logprobs)
                applied.add(sequence, token_id, entry)
                if len(sequence.token_ids) >= sequence.look_at or token_id in sequence.sampling.stop_ids:
                    self._look(sequence, token_id, applied)


def _seniority(request: Request) -> tuple[int, float, int]:
    """Smallest first: the highest class, then the earliest arrival."""
    return (-request.level, request.arrival_s, request.handle)


def _pool_status(pool: BlockPool) -> PoolStatus:
    return PoolStatus(pool.num_blocks, pool.num_free, pool.num_cached, pool.num_held, pool.num_shared)
