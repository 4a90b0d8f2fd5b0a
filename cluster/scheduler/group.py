"""One worker group as the scheduler sees it: who runs there, who is swapped out, and the step plans that it is sent.

A step is planned in this order, so that what runs is served before what comes:

    begin_step       victims are swapped out whose blocks will be missed soon; rows that have their last token on the way leave;
                     decoding rows get the blocks that they need, at the price of preemptions if there are none
    resume_swapped   swapped sequence groups come back while there is room
    admit            the dispatcher adds waiting requests while there is room
    finish_step      chunks of prompts take what is left of max_batched_tokens; the plan
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final

from quire.cluster.scheduler.applied import Applied
from quire.cluster.scheduler.batch import Batch
from quire.cluster.scheduler.block_pool import BlockPool
from quire.cluster.scheduler.copies import Copy, CopyLedger
from quire.cluster.scheduler.group_counters import GroupCounters
from quire.cluster.scheduler.ledger import Ledger
from quire.cluster.scheduler.rank_checks import RankChecks
from quire.cluster.scheduler.request import LOOK_FIRST, Request, RequestState, Sequence, SequenceEnd, most_blocks, num_sequences
from quire.cluster.scheduler.step_draft import SentPlan, StepDraft
from quire.cluster.scheduler.step_meter import StepMeter
from quire.cluster.scheduler.waiting_queue import risen_level
from quire.common.messages import (
    AttachGroup,
    EndReason,
    GroupStatus,
    PoolStatus,
    RankHello,
    RowErrorCode,
    Sample,
    StepAck,
    StepPlan,
    StepResult,
    Submit,
)

# Plans that may be sent and not yet answered: one computes, the next waits at the ranks, so that they never wait for us.
MAX_PLANS_OUTSTANDING: Final = 2
# Share of the pool that admission leaves free, so that those who run can grow before anybody must be preempted.
WATERMARK_SHARE: Final = 0.01
# From the plan that starts a swap-out to the first that can give its blocks away, if the copies take less than a step: they run beside
# the next step, whose acknowledgement names them and comes just behind its result, with which one more plan has left.
SWAP_OUT_STEPS: Final = 4
# Prompt tokens waiting to be computed, in steps' worth, from which on a group is overloaded: a cached prefix draws no more there.
OVERLOADED_STEPS: Final = 4

Note = Callable[[int, str], None]  # (handle, what happened to the request and why)
Charge = Callable[[Request, int], None]  # (who was served, tokens)


class Group:
    """Plans the steps of one worker group under one term."""

    def __init__(self, attach: AttachGroup, *, ageing_s: float = math.inf, checks_ranks: bool = False) -> None:
        self.group_id = attach.group_id
        self.term = attach.term
        self.oldest_term = attach.oldest_term or attach.term  # of the ranks that may be its own
        self.model = attach.model
        self.config = attach
        self.note: Note | None = None
        self.charge: Charge | None = None
        self.hellos: dict[int, RankHello] = {}
        self.draining = False
        self.drain_reported = False
        self.running: dict[int, Request] = {}  # by handle; also those that are swapping in
        self.swapped: dict[int, Request] = {}  # by handle
        self.outstanding: deque[SentPlan] = deque()
        self.last_sent_s = 0.0
        self.num_steps_done = 0
        self.counters = GroupCounters()  # its own until the scheduler gives it those of its former terms
        self._rank_samples: dict[int, tuple[Sample, ...]] = {}
        self._all_block_bytes = 0  # one block on all ranks together
        self._ageing_s = ageing_s
        self._last_answer_s = 0.0
        self._next_step_id = 0
        self._num_acknowledged: dict[int, int] = {}  # steps, by rank
        self._checks = RankChecks(num_ranks=attach.tensor_parallel_size) if checks_ranks else None
        self._draft = StepDraft()
        self._num_promised = 0  # blocks that held rows wait for: those that copies will leave, and available ones if these are too few
        self._build(num_gpu_blocks=0, num_cpu_blocks=0, num_rows=0)
        self.meter = StepMeter(prefill_tokens_per_s=(), copy_bytes_per_s=0.0, block_bytes=0)

    def _build(self, *, num_gpu_blocks: int, num_cpu_blocks: int, num_rows: int) -> None:
        self.ledger = Ledger(
            block_size=self.config.block_size,
            num_gpu_blocks=num_gpu_blocks,
            num_cpu_blocks=num_cpu_blocks,
            num_ranks=self.config.tensor_parallel_size,
        )
        self.batch = Batch(self.ledger, num_rows=num_rows, max_batched_tokens=self.config.max_batched_tokens)

    @property
    def pool(self) -> BlockPool:
        return self.ledger.pool

    @property
    def cpu_pool(self) -> BlockPool:
        return self.ledger.cpu_pool

    @property
    def copies(self) -> CopyLedger:
        return self.ledger.copies

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
        self._build(
            num_gpu_blocks=min(h.num_gpu_blocks for h in hellos),
            num_cpu_blocks=min(h.num_cpu_blocks for h in hellos),
            # Every row takes at least one token of a step.
            num_rows=min(self.config.max_sequences, self.config.max_batched_tokens, *(h.max_rows for h in hellos)),
        )
        self._all_block_bytes = sum(h.block_bytes for h in hellos)
        self.meter = StepMeter(
            prefill_tokens_per_s=self.hellos[0].prefill_tokens_per_s,
            copy_bytes_per_s=min(min(h.h2d_bytes_per_s, h.d2h_bytes_per_s) for h in hellos),
            block_bytes=max(h.block_bytes for h in hellos),
        )

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of prompt and completion that a request of one sequence may have here."""
        return min(self.config.max_model_len, self.pool.num_blocks * self.config.block_size)

    def most_blocks(self, submit: Submit) -> int:
        """Most blocks that a request holds here at once, whatever happens to it."""
        return most_blocks(
            num_prompt_tokens=len(submit.prompt_ids),
            max_tokens=submit.max_tokens,
            num_sequences=num_sequences(submit),
            block_size=self.config.block_size,
        )

    def can_ever_hold(self, submit: Submit) -> bool:
        """Whether the group, with nothing else in it, can take a request to its end."""
        return (
            len(submit.prompt_ids) + submit.max_tokens <= self.max_request_tokens
            and num_sequences(submit) <= self.batch.num_rows
            and self.most_blocks(submit) <= self.pool.num_blocks
        )

    # -- admission ----------------------------------------------------------------------------------------------------

    @property
    def is_overloaded(self) -> bool:
        backlog = self.batch.num_tokens_to_prefill
        return not self.batch.free_rows or backlog > OVERLOADED_STEPS * self.config.max_batched_tokens

    def prefix_hits(self, request: Request) -> int:
        """About how many leading blocks of its first sequence the group holds or remembers."""
        return self.ledger.num_cached(request.sequences[0])

    def has_room(self, request: Request) -> bool:
        """Whether a waiting request can join the next step."""
        if request.num_rows > len(self.batch.free_rows):
            return False
        num_blocks, headroom = self._blocks_to_join(request)
        available = self.pool.num_available
        if num_blocks + headroom <= available:
            return True
        found = self.ledger.find(request.sequences[0])
        return num_blocks - len(found) + headroom <= available - self.pool.num_unheld(found)

    def lack_of_room(self, request: Request) -> str:
        """Why a waiting request cannot join, for its story."""
        num_blocks, headroom = self._blocks_to_join(request)
        hits = len(self.ledger.find(request.sequences[0]))
        return (
            f"needs {request.num_rows} rows and {num_blocks} blocks ({hits} of them cached) with {headroom} to spare; "
            f"{self.group_id} has {len(self.batch.free_rows)} rows free and {self.pool.num_available} blocks available"
        )

    def is_closed_to(self, request: Request, now_s: float) -> bool:
        """Whether swapped requests of the same or a higher class go before it here."""
        return any(request.level <= self._swapped_level(other, now_s) for other in self.swapped.values())

    def admit(self, request: Request, now_s: float) -> int:
        """Give a waiting request, for which there is room, its rows and the blocks of what is known of it.

        The number of tokens that have to be computed.
        """
        assert request.state is RequestState.WAITING, request.state
        assert not request.awaits_result, request.handle
        ledger, batch = self.ledger, self.batch
        leader, *others = request.sequences
        found = ledger.find(leader)
        ledger.open_table(leader, shared=found, num_cached=len(found))
        batch.start(leader)
        if not request.is_unforked:
            # Each has tokens of its own. They share the blocks before the prompt's last token, which the first one computes.
            num_shared = (leader.num_prompt_tokens - 1) // ledger.block_size
            for sequence in others:
                own = ledger.find(sequence)
                if len(own) > num_shared:
                    ledger.open_table(sequence, shared=own, num_cached=len(own))
                else:
                    ledger.open_table(sequence, shared=leader.block_table[:num_shared], num_cached=0)
                    sequence.leader, sequence.shared_tokens = leader, num_shared * ledger.block_size
                batch.start(sequence)
        batch.take_rows(request)
        if request.admitted_s is None:
            request.admitted_s = now_s
            request.num_cached_tokens = min(leader.num_planned, leader.num_prompt_tokens)
            self.counters.queried_tokens += leader.num_prompt_tokens
            self.counters.hit_tokens += request.num_cached_tokens
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
        self._let_go(request)
        for sequence in request.sequences:
            sequence.ended = True

    def end_sequence(self, sequence: Sequence) -> None:
        """Give back what one sequence holds; its siblings go on."""
        request = sequence.request
        request.sequences.remove(sequence)
        sequence.ended = True
        if request.state is RequestState.RUNNING:
            self._bequeath(sequence, request.sequences)
        self.batch.leave(sequence)
        self.ledger.close_table(sequence)

    # -- steps --------------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a plan made now might compute or change anything."""
        return not self.batch.is_empty or bool(self.swapped) or len(self.copies) > 0

    def may_plan(self) -> bool:
        return self.is_ready and len(self.outstanding) < MAX_PLANS_OUTSTANDING

    def begin_step(self, now_s: float) -> list[Request]:
        """See to the rows that decode; the requests that lost their blocks for recompute, which must be queued again."""
        self._draft = StepDraft()
        self._num_promised = 0
        self._swap_out_ahead(now_s)  # while those that end are still in the batch
        self.batch.retire()
        self.batch.keep_prefill_share(self._next_step_id, self._draft)
        needy = self.batch.needy(self._draft)
        requeued = self._give_blocks(needy, now_s) if needy else []
        self._draft.held.intersection_update(self.batch.decoding)  # a row may have been preempted since it was to wait
        return requeued

    def resume_swapped(self, now_s: float) -> None:
        """Bring swapped sequence groups back, in order, while there is room."""
        waiting = sorted(self.swapped.values(), key=lambda r: (-self._swapped_level(r, now_s), r.arrival_s, r.handle))
        for request in waiting:
            if request.transfer is not None:
                continue  # its copies are on their way, and perhaps a token, which comes before their acknowledgement
            assert not request.awaits_result
            if not self._swap_in(request, now_s):
                return

    def finish_step(self, now_s: float) -> StepPlan | None:
        """The next plan; None when there is nothing in it to do."""
        draft = self._draft
        self.batch.plan(draft)
        wait_copies: tuple[int, ...] = ()
        if not draft.computes and not self.outstanding and len(self.copies):
            # Nobody can go on before copies end, so the ranks wait for them: all but those that this very step starts afterwards.
            starting = {copy_id for copy_id, _, _ in draft.swap_out}
            wait_copies = tuple(copy_id for copy_id in self.copies.ids() if copy_id not in starting)
        if not (draft.computes or self.batch.removals or draft.swap_out or draft.swap_in or wait_copies):
            return None
        return self._send(draft, wait_copies, now_s)

    def heartbeat(self, now_s: float) -> StepPlan:
        """A plan that only says that the scheduler is there. Rows that decode, if any, are held."""
        return self._send(StepDraft(held=set(self.batch.decoding)), (), now_s)

    def set_time_out(self, *, least_s: float, first_s: float, factor: float) -> None:
        """Bound the answer to the plan just sent: `factor` times what such a step takes, `first_s` while that is not known."""
        sent = self.outstanding[-1]
        known_s = self.meter.time_out_s(num_prefill_tokens=sent.num_prefill_tokens, num_decoding=sent.num_decoding, factor=factor)
        sent.time_out_s = first_s if known_s is None or sent.num_copies else max(least_s, known_s)

    def due_s(self) -> float | None:
        """When the oldest plan must be answered."""
        if not self.outstanding:
            return None
        oldest = self.outstanding[0]
        return max(oldest.sent_s, self._last_answer_s) + oldest.time_out_s

    # -- results ------------------------------------------------------------------------------------------------------

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
        failed = {index for index, _ in result.row_errors}
        beams = {index for index, candidates in result.beam_candidates if candidates}
        if not failed and not beams:
            if len(result.token_ids) == len(sampled) and (not self.batch.beam_rows or not any(s.request.beam for s in sampled)):
                return ""
            return f"the result of step {result.step_id} has counts {result.counts} without errors or beams to explain them"
        unknown = [code for index, code in result.row_errors if code not in set(RowErrorCode) or not 0 <= index < len(sampled)]
        if unknown:
            return f"the result of step {result.step_id} has unknown row errors {unknown}"
        if any(count != (0 if index in failed or index in beams else 1) for index, count in enumerate(result.counts)):
            return (
                f"the result of step {result.step_id} has counts {result.counts} with errors at {sorted(failed)}, beams at {sorted(beams)}"
            )
        wrong = [i for i, sequence in enumerate(sampled) if i not in failed and (sequence.request.beam is not None) != (i in beams)]
        return f"the result of step {result.step_id} has beam candidates where none belong, or none, at {wrong}" if wrong else ""

    def apply(self, result: StepResult, now_s: float) -> Applied:
        """Take in the result of the oldest outstanding plan, to which there is no `objection`.

        What it brings for sequences that have ended meanwhile is dropped. Sequences that end by it still hold what they hold:
        the caller ends them.
        """
        sent = self.outstanding.popleft()
        self._last_answer_s = now_s
        self.num_steps_done += 1
        self.meter.observe(
            device_s=result.device_s,
            num_prefill_tokens=sent.num_prefill_tokens,
            num_decoding=sent.num_decoding,
            num_copies=sent.num_copies,
        )
        self.counters.step(
            device_s=result.device_s,
            host_s=result.host_s,
            num_prefill_tokens=sent.num_prefill_tokens,
            num_decoding=sent.num_decoding,
            num_chunks=len(sent.chunks),
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

    def ack_objection(self, ack: StepAck) -> str:
        """Why an acknowledgement cannot be taken in, "" if it can: each rank acknowledges each step, in order; else what it said
        of copies is lost, and their blocks with it."""
        due = self._num_acknowledged.get(ack.rank, 0)
        if ack.rank not in self.hellos or ack.step_id != due or due >= self._next_step_id:
            return f"rank {ack.rank} acknowledged step {ack.step_id} out of turn; expected: {due if due < self._next_step_id else 'none'}"
        objection = self.copies.objection(ack.rank, (*ack.copies_done, *ack.copies_failed))
        return objection or (self._checks.objection(ack) if self._checks is not None else "")

    def acknowledged(self, ack: StepAck, now_s: float) -> list[Request]:
        """Take in that a rank has done a step, to which there is no objection; the requests whose swap failed, which must be
        queued again."""
        self._num_acknowledged[ack.rank] = ack.step_id + 1
        if ack.gauges:
            self._rank_samples[ack.rank] = ack.gauges
        failed = []
        copies = self.copies.ended(ack.rank, done=ack.copies_done, failed=ack.copies_failed)
        if copies:
            self._count(copies, now_s)
        for copy in copies:
            request = copy.request
            if request.transfer is not copy.transfer or copy.transfer.num_left:
                continue  # it ended, or lost its blocks, meanwhile; or more copies are under way
            request.transfer = None
            if copy.transfer.failed:
                if self.note:
                    self.note(request.handle, "a copy failed: it will be computed anew")
                if not copy.is_out:
                    request.preempted_at_s = now_s
                self._let_go(request)
                request.state = RequestState.WAITING
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
                self.batch.leave_to_siblings(parent)
                self.ledger.close_table(parent)
        request.sequences = children
        for place, (child, beam) in enumerate(zip(children, going_on, strict=True)):
            child.index = place
            child.token_ids.append(beam.token_id)
            child.cumulative_logprob = beam.cumulative_logprob
            child.write_limit = LOOK_FIRST
            self.ledger.publish_decoded(child)
            if request.state is RequestState.RUNNING:
                self.batch.step_as_beam(child)
        return True

    # -- what others see ------------------------------------------------------------------------------------------------

    def status(self, *, has_blocks: bool = True) -> GroupStatus:
        return GroupStatus(
            group_id=self.group_id,
            term=self.term,
            num_running_sequences=sum(len(request.sequences) for request in self.running.values()),
            num_preempted_requests=len(self.swapped),
            num_steps=self.num_steps_done,
            gpu=_pool_status(self.pool),
            cpu=_pool_status(self.cpu_pool),
            gpu_ref_counts=self.pool.ref_counts() if has_blocks else b"",
            gpu_states=self.pool.states() if has_blocks else b"",
            cpu_states=self.cpu_pool.states() if has_blocks else b"",
            waste_ratio=self._waste_ratio(),
            samples=self.counters.samples(),
            distributions=self.counters.distributions(),
            ranks=tuple(sorted(self._rank_samples.items())),
        )

    def check(self) -> None:
        """Assert every invariant."""
        running, swapped = list(self.running.values()), list(self.swapped.values())
        self.ledger.check(running + swapped)
        self.batch.check(running)
        for request in running:
            assert request.state in (RequestState.RUNNING, RequestState.SWAPPING_IN)
        for request in swapped:
            assert request.state is RequestState.SWAPPED
            assert not request.spare_rows
            assert all(s.row < 0 and not s.block_table for s in request.sequences), "a part of a sequence group was left behind"
        for request in running + swapped:
            for sequence in request.sequences:
                assert not sequence.ended
                assert sequence.request is request
                assert sequence.num_planned <= len(sequence.token_ids) + sequence.num_in_flight, sequence.handle
        assert len(self.outstanding) <= MAX_PLANS_OUTSTANDING

    # -- helpers: counting ----------------------------------------------------------------------------------------------

    def _waste_ratio(self) -> float:
        """Of the slots of held GPU blocks, the share without a token: the ends of last blocks, and what prefill will fill."""
        if not self.pool.num_held:
            return 0.0
        size = self.config.block_size
        filled: dict[int, int] = {}  # slots with a token, by block that some holder has not filled
        for request in self.running.values():
            for sequence in request.sequences:
                num_full = sequence.num_planned // size
                for place, block_id in enumerate(sequence.block_table[num_full:]):
                    num_here = sequence.num_planned % size if place == 0 else 0
                    filled[block_id] = max(num_here, filled.get(block_id, 0))
        return sum(size - num_slots for num_slots in filled.values()) / (self.pool.num_held * size)

    def _count(self, copies: list[Copy], now_s: float) -> None:
        """Copies have ended on all ranks, and with some of them whole transfers."""
        counters = self.counters
        num_out = sum(copy.is_out for copy in copies)
        counters.bytes_out += num_out * self._all_block_bytes
        counters.bytes_in += (len(copies) - num_out) * self._all_block_bytes
        for copy in {id(copy.transfer): copy for copy in copies if not copy.transfer.num_left}.values():
            (counters.out_s if copy.is_out else counters.in_s).observe(now_s - copy.transfer.start_s)
            counters.num_failed_swaps += copy.transfer.failed

    # -- helpers: room --------------------------------------------------------------------------------------------------

    def _blocks_to_join(self, request: Request) -> tuple[int, int]:
        """Blocks of what is known of a request; and those that must be available beside them, none when nothing else runs."""
        ledger = self.ledger
        leader = request.sequences[0]
        num_blocks = ledger.num_blocks(len(leader.token_ids))
        if not request.is_unforked:
            num_shared = (leader.num_prompt_tokens - 1) // ledger.block_size
            num_blocks += sum(ledger.num_blocks(len(sequence.token_ids)) - num_shared for sequence in request.sequences[1:])
        if not self.running:
            return num_blocks, 0
        num_forks = request.num_rows if request.is_unforked or request.num_rows > len(request.sequences) else 0
        # Who was preempted comes back only when those that run can grow for a while, lest it be preempted again at once.
        return num_blocks, num_forks + self._watermark() + (len(self.running) if request.is_preempted else 0)

    def _watermark(self) -> int:
        """Blocks that must be left when somebody joins those that run."""
        kept = max(0, self._num_promised - self.copies.num_leaving()) if self._num_promised else 0
        return max(1, int(self.pool.num_blocks * WATERMARK_SHARE)) + kept

    def _swapped_level(self, request: Request, now_s: float) -> int:
        """The class of a swapped request, which rises by waiting like that of one in the queue."""
        return risen_level(request.level, now_s - request.preempted_at_s, ageing_s=self._ageing_s)

    def _bequeath(self, sequence: Sequence, siblings: list[Sequence]) -> None:
        """Siblings may count on what an ending sequence computes: then one of them computes it instead."""
        unforked = [sibling for sibling in siblings if not sibling.block_table]
        if unforked and sequence.block_table:  # all of them are to be forked from it
            heir = unforked[0]
            heir.block_table, sequence.block_table = sequence.block_table, []
            heir.block_hashes, heir.num_published, heir.num_planned = sequence.block_hashes, sequence.num_published, sequence.num_planned
            if heir.sampling.num_prompt_logprobs is not None:
                heir.num_planned = 0  # a row reports the log probabilities of what it computes itself
            self.batch.start(heir)
        followers = [sibling for sibling in siblings if sibling.leader is sequence]
        if followers and sequence.num_planned < followers[0].shared_tokens:
            heir = followers[0]
            heir.leader, heir.shared_tokens, heir.num_planned = None, 0, sequence.num_planned
            for follower in followers[1:]:
                follower.leader = heir
        else:
            for follower in followers:
                follower.follow()

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
        )
        self.ledger.fork_table(parent, child)
        return child

    # -- helpers: preemption --------------------------------------------------------------------------------------------

    def _give_blocks(self, needy: list[Sequence], now_s: float) -> list[Request]:
        """A block for each sequence that is about to write where it has none of its own, all of a request or none.

        When there is none, the latest arrival of the lowest class is preempted. Blocks of a swapped victim come free only when
        they have been copied; who waits for those is held.
        """
        requeued: list[Request] = []
        pool, copies = self.pool, self.copies
        by_request: dict[int, list[Sequence]] = {}
        for sequence in needy:
            by_request.setdefault(sequence.handle, []).append(sequence)
        num_coming = copies.num_leaving()
        num_promised = 0  # blocks that those before wait for: of the coming ones, and of the available ones if these are too few
        waiting: list[list[Sequence]] = []
        for sequences in sorted(by_request.values(), key=lambda sequences: _seniority(sequences[0].request)):
            request = sequences[0].request
            if request.state is not RequestState.RUNNING:
                continue  # preempted for one before it
            num_blocks = self.ledger.num_blocks_wanted(sequences)
            while pool.num_available - max(0, num_promised - num_coming) < num_blocks:
                if pool.num_available + num_coming - num_promised >= num_blocks or (victim := self._victim()) is None:
                    num_promised += num_blocks
                    waiting.append(sequences)
                    break
                if self._preempt(victim, request, now_s):
                    requeued.append(victim)
                num_coming = copies.num_leaving()
                if victim is request:
                    break
            else:
                self._give(request, sequences)
        for sequences in waiting:
            request = sequences[0].request
            if request.state is not RequestState.RUNNING:
                continue
            num_blocks = self.ledger.num_blocks_wanted(sequences)
            if num_blocks <= pool.num_available:  # a later victim left them at once
                self._give(request, sequences)
                continue
            self._num_promised += num_blocks
            if request.beam:
                self._draft.waiting_beams.add(request.handle)
            else:
                self._draft.held.update(sequence.row for sequence in sequences)
        return requeued

    def _swap_out_ahead(self, now_s: float) -> None:
        """Swap victims out before others would have to wait for their blocks, which come free only when they have been copied.

        A victim that would be recomputed leaves its blocks at once, and so stays for as long as nobody needs them.
        """
        if self.config.preemption == "recompute" or not self.cpu_pool.num_available:
            return
        if self.pool.num_available >= len(self.batch.decoding):  # within a block's tokens nobody needs more than one
            return
        num_steps, num_ending = 0, 0
        needs: dict[int, list[int]] = {}
        while (victim := self._victim()) is not None:
            holders = self._holders(victim)
            if not num_steps:
                num_steps = min(1 + SWAP_OUT_STEPS + self.meter.copy_steps(len(holders)), self.config.block_size)
                needs, num_ending = self.batch.look_ahead(num_steps, num_steps_to_free=MAX_PLANS_OUTSTANDING)
            # What a victim alone would lack is no reason: it can leave then. But before others it would take what they will lack.
            its_needs = needs.pop(victim.handle, [])
            last_need = max(map(max, needs.values()), default=-1)
            num_wanted = sum(map(len, needs.values())) + sum(need <= last_need for need in its_needs)
            if num_wanted <= self.pool.num_available + self.copies.num_leaving() + num_ending:
                return
            # One that ends by then leaves its blocks as soon by itself.
            if all(s.num_steps_left + MAX_PLANS_OUTSTANDING <= num_steps for s in victim.sequences):
                return
            if not self._prefers_swap(victim, holders)[0]:
                return
            is_requeued = self._preempt(victim, None, now_s)
            assert not is_requeued, victim.handle

    def _give(self, request: Request, sequences: list[Sequence]) -> None:
        num_blocks = self.ledger.give(sequences, self._draft)
        if self.charge and num_blocks:
            self.charge(request, num_blocks * self.config.block_size)

    def _victim(self) -> Request | None:
        """Who is preempted next: the latest arrival of the lowest class, of those that still need steps."""
        candidates = (r for r in self.running.values() if r.state is RequestState.RUNNING and r.needs_steps)
        return max(candidates, key=_seniority, default=None)

    def _holders(self, request: Request) -> Counter[int]:
        """How often a request holds each of its computed blocks, by id."""
        return Counter(block_id for sequence in request.sequences for block_id in self.ledger.computed_blocks(sequence))

    def _preempt(self, request: Request, beneficiary: Request | None, now_s: float) -> bool:
        """Take a running request's rows and blocks away. True if it was not swapped out and must be queued again.

        beneficiary: None if nobody is waiting for them yet
        """
        holders = self._holders(request)
        swaps, why = self._prefers_swap(request, holders)
        request.num_preemptions += 1
        request.preempted_at_s = now_s
        self.counters.num_swaps += swaps
        self.counters.num_recomputes += not swaps
        for sequence in request.sequences:
            sequence.look_at = 0  # a token on its way may be what it waits for
        if self.note:
            kind = "swapped out" if swaps else "preempted for recompute"
            who = "a block of its own" if beneficiary is request else f"request {beneficiary.handle}" if beneficiary else "those that grow"
            self.note(request.handle, f"{kind} to make room for {who} ({why})")
        if not swaps:
            self._let_go(request)
            request.state = RequestState.WAITING
            return True
        for sequence in request.sequences:
            self.batch.leave(sequence)
        self.batch.give_back_spare_rows(request)
        self.ledger.swap_out(request, list(holders), self._draft)
        assert request.transfer is not None, request.handle
        request.transfer.start_s = now_s
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
        sequences = request.sequences
        if not saved or any(s.leader is not None or not s.block_table for s in sequences):
            return False, "its prompt was not all computed"
        if any(s.sampling.num_prompt_logprobs is not None and s.num_planned < s.num_prompt_tokens for s in sequences):
            return False, "the log probabilities of its prompt come from one go"
        if len(saved) > self.cpu_pool.num_available:
            return False, f"its {len(saved)} blocks do not fit into the {self.cpu_pool.num_available} free ones of the swap pool"
        if self.config.preemption == "swap":
            return True, "as told"
        num_lost = sum(self.pool.ref_count(block_id) == count for block_id, count in saved.items()) * self.config.block_size
        recompute_s = self.meter.recompute_s(num_lost)
        swap_s = self.meter.swap_s(len(saved), backlog=len(self.copies))
        if recompute_s is None:
            return True, "the speed of prefill is not known yet"
        return swap_s <= recompute_s, f"swap would take {swap_s * 1e3:.2f} ms of the others' time, recompute {recompute_s * 1e3:.2f} ms"

    def _let_go(self, request: Request) -> None:
        """A request loses all that it holds here."""
        for sequence in request.sequences:
            self.batch.leave(sequence)
            self.ledger.close_table(sequence)
        self.batch.give_back_spare_rows(request)
        request.transfer = None
        self.running.pop(request.handle, None)
        self.swapped.pop(request.handle, None)

    def _swap_in(self, request: Request, now_s: float) -> bool:
        """Bring one swapped request back, if there is room for it."""
        if request.num_rows > len(self.batch.free_rows):
            return False
        # With the watermark a block for each row there will then be, so that it is not swapped out again at once.
        num_rows = sum(r.num_rows for r in self.running.values()) + request.num_rows - 1
        headroom = self._watermark() + num_rows if self.running else 0
        moved = self.ledger.swap_in(request, headroom=headroom, draft=self._draft)
        if moved is None:
            return False
        assert request.transfer is not None, request.handle
        request.transfer.start_s = now_s
        self.batch.take_rows(request)
        del self.swapped[request.handle]
        self.running[request.handle] = request
        request.state = RequestState.SWAPPING_IN
        request.preempted_s += now_s - request.preempted_at_s
        num_found, num_copied = moved
        if self.note:
            self.note(request.handle, f"swaps in: {num_found} blocks found, {num_copied} copied")
        if not num_copied:
            request.transfer = None
            self._swapped_in(request)
        return True

    def _swapped_in(self, request: Request) -> None:
        """All blocks are there: the request goes on with the next plan."""
        request.state = RequestState.RUNNING
        for sequence in request.sequences:
            self.ledger.swapped_in(sequence)
            self.batch.start(sequence)

    # -- helpers: plans and results ---------------------------------------------------------------------------------------

    def _send(self, draft: StepDraft, wait_copies: tuple[int, ...], now_s: float) -> StepPlan:
        remove_rows, hold_rows = self.batch.take_changes(draft)
        plan = draft.plan(
            term=self.term,
            step_id=self._next_step_id,
            remove_rows=remove_rows,
            hold_rows=hold_rows,
            wait_copies=wait_copies,
            debug_checksum=self._checks is not None,
        )
        self.outstanding.append(
            SentPlan(
                step_id=plan.step_id,
                sent_s=now_s,
                time_out_s=math.inf,
                sampled=draft.sampled + draft.decoded,
                chunks=draft.chunked,
                num_prefill_tokens=draft.num_prefill_tokens,
                num_decoding=len(draft.decoded),
                num_copies=len(self.copies),
            )
        )
        self._next_step_id += 1
        self.last_sent_s = now_s
        return plan

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
        self.ledger.publish_decoded(sequence)
        block_size = self.config.block_size
        next_full = ((length - 1) // block_size + 1) * block_size + 1
        sequence.look_at = min(next_full, sequence.max_total)

    def _apply_rare(self, sent: SentPlan, result: StepResult, applied: Applied) -> None:
        """`apply` for results with more than plain tokens."""
        errors, beams, logprobs = dict(result.row_errors), dict(result.beam_candidates), dict(result.logprobs)
        for index, chunk_logprobs in result.prompt_logprobs:
            sequence, start = sent.chunks[index]
            if sequence.reports_prompt and sequence.request.state is not RequestState.ENDED:
                applied.prompt_logprobs.append((sequence, start, chunk_logprobs))
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
                if request.first_token_s is None:
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
