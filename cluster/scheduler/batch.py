"""The rows of a group's batch: which sequence sits where, and what each of them computes in a step."""

import math
from typing import Final

from quire.cluster.scheduler.ledger import Ledger
from quire.cluster.scheduler.request import LOOK_FIRST, Request, Sequence
from quire.cluster.scheduler.step_draft import StepDraft
from quire.common.messages import Chunk, RowAdd

# Share of a step's tokens that is kept for prompts while any are there.
PREFILL_SHARE: Final = 1 / 8
# A prompt with more than this share of a step's tokens to go is long.
LONG_PREFILL_SHARE: Final = 1 / 2
# Long prompts that are computed at once: a second one would slow the first and help nobody.
MAX_LONG_PREFILLS: Final = 1


class Batch:
    """Rows of one group, as the ranks will have them after the plans that were sent.

    A sequence with a row is in one of three places: in prefill, until its known tokens are computed; decoding, one token in
    every step (the ranks' sticky rows); or, in a beam search, stepping: one token when the scheduler has chosen it.
    """

    def __init__(self, ledger: Ledger, *, num_rows: int, max_batched_tokens: int) -> None:
        self.num_rows = num_rows
        self.prefilling: list[Sequence] = []  # in order of admission
        self.stepping: list[Sequence] = []  # beams whose next token is known and must be computed
        self.decoding: dict[int, Sequence] = {}  # by row
        self.free_rows = list(range(num_rows - 1, -1, -1))
        self.removals: list[int] = []  # rows that the next plan takes from the ranks' batch
        self.held: set[int] = set()  # rows that the ranks hold
        self.beam_rows: set[int] = set()  # rows that only step when a plan says so
        self._ledger = ledger
        self._max_batched_tokens = max_batched_tokens
        self._decode_order: list[Sequence] | None = None  # `decoding` by ascending row; None when it must be sorted anew
        self._retiring: list[Sequence] = []  # decoding ones whose last token is on its way

    @property
    def is_empty(self) -> bool:
        return not (self.decoding or self.prefilling or self.stepping or self.removals)

    @property
    def num_tokens_to_prefill(self) -> int:
        return sum(sequence.num_to_prefill for sequence in self.prefilling)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def take_rows(self, request: Request) -> None:
        """Give each sequence of a request a row, and the request those that further beams will need."""
        for sequence in request.sequences:
            sequence.row = self.free_rows.pop()
        request.spare_rows = [self.free_rows.pop() for _ in range(request.num_rows - len(request.sequences))]

    def give_back_spare_rows(self, request: Request) -> None:
        self.free_rows += request.spare_rows
        request.spare_rows = []

    def start(self, sequence: Sequence) -> None:
        """Let a sequence with a block table compute the rest of its known tokens."""
        sequence.prefill_end = len(sequence.token_ids)
        sequence.write_limit = len(sequence.block_table) * self._ledger.block_size
        sequence.look_at = 0
        self.prefilling.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch, if it is in it; its row is free for the next plan, which removes it before it adds."""
        row = sequence.row
        if row < 0:
            return
        if self.decoding.pop(row, None) is not None:
            self._decode_order = None
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif sequence in self.stepping:
            self.stepping.remove(sequence)
        if sequence.in_batch:
            self.removals.append(row)
            self.held.discard(row)
            self.beam_rows.discard(row)
        self.free_rows.append(row)
        sequence.row, sequence.in_batch, sequence.fork_of = -1, False, None

    def leave_to_siblings(self, sequence: Sequence) -> None:
        """The same, but the row stays with the request, for its further beams."""
        if sequence.row >= 0:
            self.leave(sequence)
            sequence.request.spare_rows.append(self.free_rows.pop())

    def step_as_beam(self, sequence: Sequence) -> None:
        """The sequence's newest token was chosen by the scheduler: compute it with the next plan."""
        if sequence.row < 0:
            sequence.row = sequence.request.spare_rows.pop()
        sequence.prefill_end = len(sequence.token_ids)
        self.stepping.append(sequence)

    # -- a step -------------------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Rows whose last token is on its way leave."""
        for sequence in self._retiring:
            self.leave(sequence)
        self._retiring = []

    def decoders(self) -> list[Sequence]:
        """The ranks' sticky rows, ascending."""
        if self._decode_order is None:
            self._decode_order = [self.decoding[row] for row in sorted(self.decoding)]
        return self._decode_order

    def keep_prefill_share(self, step_id: int, draft: StepDraft) -> None:
        """Hold decoding rows beyond their share of a step while prompts are there. Whose turn it is to wait moves on with the step."""
        decoders = self.decoders()
        most = max(1, math.floor(self._max_batched_tokens * (1 - PREFILL_SHARE))) - len(self.stepping)
        if self.prefilling and len(decoders) > most:
            first = step_id * most % len(decoders)
            turn = {(first + place) % len(decoders) for place in range(max(0, most))}
            draft.held = {sequence.row for place, sequence in enumerate(decoders) if place not in turn}

    def needy(self, draft: StepDraft) -> list[Sequence]:
        """Sequences that must be seen to before they write their next token: they need a block, or share the one that they have."""
        decoders = self.decoders()
        if draft.held:
            decoders = [sequence for sequence in decoders if sequence.row not in draft.held]
        needy = [sequence for sequence in decoders if sequence.num_planned >= sequence.write_limit]
        needy += [sequence for sequence in self.stepping if sequence.num_planned >= sequence.write_limit]
        return needy

    def look_ahead(self, num_steps: int, *, num_steps_to_free: int) -> tuple[dict[int, list[int]], int]:
        """(after how many steps decoding sequences will need a block, by handle; blocks that the ends of others leave in time).

        num_steps: at most a block's tokens, so that each needs one at most
        num_steps_to_free: from the step that samples a sequence's last token to the one that can have its blocks
        """
        size, pool = self._ledger.block_size, self._ledger.pool
        needs: dict[int, list[int]] = {}
        num_ending = 0
        for sequence in self.decoding.values():
            num_left = sequence.num_steps_left
            num_fitting = len(sequence.block_table) * size - sequence.num_planned  # tokens
            if num_fitting < num_steps and num_fitting < num_left:
                needs.setdefault(sequence.handle, []).append(num_fitting)
            if num_left + num_steps_to_free <= num_steps:
                num_ending += sum(pool.ref_count(block_id) == 1 for block_id in sequence.block_table)
        return needs, num_ending

    def plan(self, draft: StepDraft) -> None:
        """Fill in what the step computes: the decoding rows, the beams, and chunks of prompts with what is left."""
        decoded = self.decoders()
        if draft.held:
            decoded = [sequence for sequence in decoded if sequence.row not in draft.held]
        for sequence in decoded:
            sequence.num_planned += 1
            sequence.num_in_flight += 1
            if sequence.num_planned >= sequence.max_total - 1:
                self._retiring.append(sequence)
        draft.decoded = decoded
        budget = self._max_batched_tokens - len(decoded)
        budget -= self._plan_beams(draft, budget)
        draft.num_prefill_tokens = self._plan_prefill(draft, budget)

    def take_changes(self, draft: StepDraft) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(remove_rows, hold_rows) of the plan that is sent now."""
        held = draft.held | self.beam_rows
        hold_rows = (*sorted(held - self.held), *(~row for row in sorted(self.held - held)))
        self.held = held
        remove_rows, self.removals = tuple(self.removals), []
        return remove_rows, hold_rows

    def check(self, requests: list[Request]) -> None:
        """Assert every invariant; `requests` are those with rows."""
        rows = list(self.free_rows)
        for request in requests:
            rows += request.spare_rows
            for sequence in request.sequences:
                if sequence.row >= 0:
                    rows.append(sequence.row)
                else:
                    assert sequence.is_planned_to_its_end, "a part of a sequence group has lost its row"
        rows.sort()
        assert rows == list(range(self.num_rows)), "a row is lost or used twice"
        for row, sequence in self.decoding.items():
            assert sequence.row == row
            assert sequence.in_batch
            assert not sequence.ended

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _plan_beams(self, draft: StepDraft, budget: int) -> int:
        """One token for each beam whose step is due; how many tokens. All beams of a request step together, or none: a fork is
        made of its parent as it was before the parent's own next token."""
        num_tokens = 0
        for sequence in self.stepping:
            if sequence.handle in draft.waiting_beams:
                continue
            num_tokens += 1
            self._chunk(draft, sequence, 1, is_chosen=True)
        assert num_tokens <= budget, "there are more rows than a step has tokens"
        self.stepping = [sequence for sequence in self.stepping if not sequence.num_in_flight]
        return num_tokens

    def _plan_prefill(self, draft: StepDraft, budget: int) -> int:
        """Chunks of at most `budget` tokens for the sequences in prefill, oldest first; how many tokens.

        A long prompt leaves half of the budget to short ones, if there are any, and takes what they leave.
        """
        if not self.prefilling or budget <= 0:
            return 0
        long_tokens = self._max_batched_tokens * LONG_PREFILL_SHARE
        due = [s for s in self.prefilling if s.leader is None or s.leader.num_planned >= s.shared_tokens]
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
            self._chunk(draft, due[place], count)
        return sum(counts.values())

    def _chunk(self, draft: StepDraft, sequence: Sequence, count: int, *, is_chosen: bool = False) -> None:
        """Plan the next `count` tokens of a sequence; behind its last one it is sampled. is_chosen: the token is one that the
        scheduler chose and the ranks do not know."""
        if sequence.leader is not None:
            sequence.follow()
        start = sequence.num_planned
        if not sequence.in_batch:
            if sequence.fork_of is not None:
                draft.forks.append((sequence.fork_of.row, sequence.row, sequence.index))
                sequence.fork_of = None
            else:
                draft.add_rows.append(_row_add(sequence))
                sequence.reports_prompt = start == 0
            sequence.in_batch = True
            if sequence.request.beam:
                self.beam_rows.add(sequence.row)
        if is_chosen:
            draft.appends.append((sequence.row, sequence.token_ids[-1]))
        sequence.num_planned += count
        is_last = sequence.num_planned == sequence.prefill_end
        draft.chunks.append(Chunk(sequence.row, start, count, is_last))
        draft.chunked.append((sequence, start))
        self._ledger.publish_planned(sequence)
        if is_last:
            self._sample_behind(draft, sequence)

    def _sample_behind(self, draft: StepDraft, sequence: Sequence) -> None:
        """Sample a sequence whose last known token the step computes; siblings that share all its tokens are forked from it."""
        request = sequence.request
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        if request.beam:
            draft.sample(sequence, source_row=sequence.row)
            return
        forked = [s for s in request.sequences if s is not sequence and not s.block_table] if request.is_unforked else []
        for sibling in forked:
            self._ledger.fork_table(sequence, sibling)
            sibling.look_at = 0
            sibling.in_batch = True
            draft.forks.append((sequence.row, sibling.row, sibling.index))
        for sampled in (sequence, *forked):
            draft.sample(sampled, source_row=sequence.row)
            sampled.write_limit = LOOK_FIRST if forked else sampled.write_limit
            self.decoding[sampled.row] = sampled
            if sampled.is_planned_to_its_end:
                self._retiring.append(sampled)
        self._decode_order = None


def _row_add(sequence: Sequence) -> RowAdd:
    return RowAdd(
        row=sequence.row,
        token_ids=tuple(sequence.token_ids),
        prompt_len=sequence.num_prompt_tokens,
        num_computed=sequence.num_planned,
        block_ids=tuple(sequence.block_table),
        adapter_id=0,
        sampling=sequence.sampling,
    )
