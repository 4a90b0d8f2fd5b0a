"""One worker group as the scheduler sees it: its rows, its block pools, and the step plans it is sent."""

from collections import deque
from dataclasses import dataclass, field

from quire.cluster.scheduler.block_pool import BlockPool
from quire.cluster.scheduler.request import Request, RequestState, Sequence
from quire.common.hashing import hash_block, hash_full_blocks
from quire.common.messages import AttachGroup, Chunk, GroupStatus, PoolStatus, RankHello, RowAdd, RowErrorCode, StepPlan, StepResult

# Plans that may be sent and not yet answered: one computes, the next waits at the ranks, so that they never wait for us.
MAX_PLANS_OUTSTANDING = 2


@dataclass(slots=True)
class SentPlan:
    """A plan that is not answered yet, with the sequences that its result will name by order alone."""

    step_id: int
    sent_s: float
    sampled: list[Sequence]


@dataclass(slots=True)
class NewToken:
    """One sampled token of a live sequence, applied."""

    sequence: Sequence
    offset: int  # from the start of the completion
    token_id: int


@dataclass(slots=True)
class Applied:
    """What a step's result brought."""

    tokens: list[NewToken] = field(default_factory=list)
    failed: list[tuple[Sequence, int]] = field(default_factory=list)  # (sequence, RowErrorCode)


class Group:
    """Plans the steps of one worker group under one term.

    Blocks are given out as sequences grow, but a request is admitted only when all that it may ever need can be reserved;
    so no running sequence is ever without a block.
    """

    def __init__(self, attach: AttachGroup) -> None:
        self.group_id = attach.group_id
        self.term = attach.term
        self.model = attach.model
        self.config = attach
        self.hellos: dict[int, RankHello] = {}
        self.draining = False
        self.drain_reported = False
        self.pool = BlockPool(0, block_size=attach.block_size)
        self.num_cpu_blocks = 0
        self.num_rows = 0
        self.requests: dict[int, Request] = {}  # running, by handle
        self.outstanding: deque[SentPlan] = deque()
        self.last_sent_s = 0.0
        self.num_steps_done = 0
        self._next_step_id = 0
        self._free_rows: list[int] = []
        self._prefilling: deque[Sequence] = deque()
        self._decoding: dict[int, Sequence] = {}  # by row: the ranks' sticky rows
        self._rows_to_remove: list[int] = []
        self._rows_removed: list[int] = []  # by the next plan, and free for it
        self._num_blocks_reserved = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return len(self.hellos) == self.config.tensor_parallel_size

    def hello(self, hello: RankHello) -> None:
        """A rank is there. With the last one the group is ready, its pool as large as the smallest rank's."""
        self.hellos[hello.rank] = hello
        if self.is_ready:
            self.pool = BlockPool(min(h.num_gpu_blocks for h in self.hellos.values()), block_size=self.config.block_size)
            self.num_cpu_blocks = min(h.num_cpu_blocks for h in self.hellos.values())
            self.num_rows = min(self.config.max_sequences, min(h.max_rows for h in self.hellos.values()))
            self._free_rows = list(range(self.num_rows - 1, -1, -1))

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of prompt and completion that one request may have here."""
        return min(self.config.max_model_len, self.pool.num_blocks * self.pool.block_size)

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> bool:
        """Take a waiting request into the batch if a row and all its blocks are there. Does not change it otherwise."""
        sequence = request.sequence
        if self.draining or not self._free_rows:
            return False
        block_size = self.pool.block_size
        num_tokens = sequence.num_prompt_tokens + sequence.max_tokens
        num_blocks = -(-num_tokens // block_size)
        block_hashes = list(request.submit.block_hashes)
        if len(sequence.token_ids) > sequence.num_prompt_tokens:  # resumed: its own tokens fill further blocks
            block_hashes = hash_full_blocks(request.submit.cache_root, sequence.token_ids, block_size=block_size)
        # The last token is always computed: its logits are what the next one is drawn from.
        found = self.pool.find(block_hashes[: (sequence.prompt_len - 1) // block_size])
        num_available = self.pool.num_available - self.pool.num_unheld(found) - self._num_blocks_reserved
        if num_blocks - len(found) > num_available:
            return False
        self.pool.fork(found)
        num_prompt_blocks = -(-sequence.prompt_len // block_size)
        sequence.block_table = found + self.pool.allocate(num_prompt_blocks - len(found))
        self._reserve(sequence, num_blocks - num_prompt_blocks)
        sequence.block_hashes = block_hashes
        sequence.num_published = len(found)
        sequence.num_planned = sequence.num_cached_tokens = len(found) * block_size
        sequence.row = self._free_rows.pop()
        self.requests[request.handle] = request
        self._prefilling.append(sequence)
        return True

    def release(self, request: Request) -> None:
        """Give back everything that a running request holds; its row leaves the batch with the next plan."""
        assert request.state is RequestState.RUNNING, request.state
        sequence = request.sequence
        sequence.ended = True
        del self.requests[request.handle]
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        self._reserve(sequence, 0)
        if sequence.row >= 0:
            self._leave_row(sequence)

    # -- steps --------------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a plan made now would compute or change anything."""
        return bool(self._decoding or self._prefilling or self._rows_removed or self._rows_to_remove)

    def may_plan(self) -> bool:
        return self.is_ready and len(self.outstanding) < MAX_PLANS_OUTSTANDING

    def retire_rows(self) -> None:
        """Free the rows that the next plan removes, for that same plan to give away: a rank removes before it adds."""
        for sequence in list(self._decoding.values()):
            if sequence.num_completion_planned >= sequence.max_tokens:  # its last token is on its way
                self._leave_row(sequence)
        self._free_rows.extend(reversed(self._rows_to_remove))
        self._rows_removed += self._rows_to_remove
        self._rows_to_remove = []

    def plan(self, now_s: float) -> StepPlan:
        """The next step: one token for every decoding row, then chunks of prompts with what is left of max_batched_tokens.

        `retire_rows` comes first, then `admit` for whatever is to join. May be empty: a heartbeat.
        """
        remove_rows, self._rows_removed = self._rows_removed, []
        decoded = [self._decoding[row] for row in sorted(self._decoding)]
        grow_rows: list[int] = []
        grow_block_ids: list[int] = []
        for sequence in decoded:
            sequence.num_planned += 1
            if sequence.num_planned > len(sequence.block_table) * self.pool.block_size:
                block_id = self.pool.allocate(1)[0]
                sequence.block_table.append(block_id)
                self._reserve(sequence, sequence.num_blocks_reserved - 1)
                grow_rows.append(sequence.row)
                grow_block_ids.append(block_id)
        add_rows, chunks, samples = self._plan_prefill(self.config.max_batched_tokens - len(decoded))
        sampled = samples + decoded
        for sequence in sampled:
            sequence.num_in_flight += 1
        plan = StepPlan(
            term=self.term,
            step_id=self._next_step_id,
            add_rows=tuple(add_rows),
            remove_rows=tuple(remove_rows),
            grow_rows=tuple(grow_rows),
            grow_block_ids=tuple(grow_block_ids),
            chunks=tuple(chunks),
            samples=tuple((sequence.row, sequence.row) for sequence in samples),
        )
        self._next_step_id += 1
        self.outstanding.append(SentPlan(plan.step_id, now_s, sampled))
        self.last_sent_s = now_s
        return plan

    def objection(self, result: StepResult) -> str:
        """Why a result cannot be applied, "" if it can: it must answer the oldest outstanding plan, sample by sample."""
        if not self.outstanding or result.step_id != self.outstanding[0].step_id:
            expected = self.outstanding[0].step_id if self.outstanding else "none"
            return f"the result of step {result.step_id} came out of turn; expected: {expected}"
        num_samples = len(self.outstanding[0].sampled)
        failed = {index for index, _ in result.row_errors}
        if len(result.counts) != num_samples or sum(result.counts) != len(result.token_ids):
            return (
                f"the result of step {result.step_id} has {len(result.counts)} samples of {sum(result.counts)} tokens and "
                f"{len(result.token_ids)} token ids; the plan has {num_samples} samples"
            )
        if any(count != (0 if index in failed else 1) for index, count in enumerate(result.counts)):
            return f"the result of step {result.step_id} has counts {result.counts} with errors at {sorted(failed)}"
        unknown = [code for index, code in result.row_errors if code not in set(RowErrorCode) or not 0 <= index < num_samples]
        return f"the result of step {result.step_id} has unknown row errors {unknown}" if unknown else ""

    def apply(self, result: StepResult) -> Applied:
        """Take in the result of the oldest outstanding plan, to which there is no `objection`.

        Tokens of sequences that ended meanwhile are dropped.
        """
        sent = self.outstanding.popleft()
        self.num_steps_done += 1
        errors = dict(result.row_errors)
        applied = Applied()
        position = 0
        for index, (sequence, count) in enumerate(zip(sent.sampled, result.counts, strict=True)):
            token_ids = result.token_ids[position : position + count]
            position += count
            sequence.num_in_flight -= 1
            if sequence.ended:
                continue
            if index in errors:
                self.pool.unpublish(sequence.block_table)  # what gave no finite logits must not be found by others
                applied.failed.append((sequence, errors[index]))
                continue
            for token_id in token_ids:
                applied.tokens.append(NewToken(sequence, sequence.num_completion_tokens, token_id))
                sequence.token_ids.append(token_id)
            self._publish_decoded(sequence)
        return applied

    def status(self) -> GroupStatus:
        pool = self.pool
        return GroupStatus(
            group_id=self.group_id,
            term=self.term,
            num_running_sequences=sum(request.sequence.row >= 0 for request in self.requests.values()),
            num_preempted_requests=0,
            num_steps=self.num_steps_done,
            gpu=PoolStatus(pool.num_blocks, pool.num_free, pool.num_cached, pool.num_held, pool.num_shared),
            cpu=PoolStatus(self.num_cpu_blocks, self.num_cpu_blocks, 0, 0, 0),
            gpu_ref_counts=pool.ref_counts(),
        )

    def check(self) -> None:
        """Assert every invariant."""
        self.pool.check()
        sequences = [request.sequence for request in self.requests.values()]
        holders = [0] * self.pool.num_blocks
        for sequence in sequences:
            assert sequence.num_planned <= len(sequence.token_ids) + sequence.num_in_flight
            assert sequence.num_planned <= len(sequence.block_table) * self.pool.block_size
            for block_id in sequence.block_table:
                holders[block_id] += 1
        assert bytes(min(count, 255) for count in holders) == self.pool.ref_counts(), "a block is held by nobody that runs"
        assert self._num_blocks_reserved == sum(sequence.num_blocks_reserved for sequence in sequences)
        assert self._num_blocks_reserved <= self.pool.num_available
        rows = [sequence.row for sequence in sequences if sequence.row >= 0] + self._rows_to_remove
        rows += self._free_rows
        assert sorted(rows) == list(range(self.num_rows)), "a row is lost or used twice"
        assert len(self.outstanding) <= MAX_PLANS_OUTSTANDING

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _plan_prefill(self, budget: int) -> tuple[list[RowAdd], list[Chunk], list[Sequence]]:
        """Chunks for the sequences in prefill, oldest first, at most `budget` tokens; and who is sampled behind its last one."""
        add_rows: list[RowAdd] = []
        chunks: list[Chunk] = []
        samples: list[Sequence] = []
        while self._prefilling and budget > 0:
            sequence = self._prefilling[0]
            start = sequence.num_planned
            count = min(budget, sequence.prompt_len - start)
            is_last = start + count == sequence.prompt_len
            sequence.num_planned += count
            if start == sequence.num_cached_tokens:  # its first chunk
                add_rows.append(
                    RowAdd(
                        row=sequence.row,
                        token_ids=tuple(sequence.token_ids),
                        prompt_len=sequence.num_prompt_tokens,
                        num_computed=start,
                        block_ids=tuple(sequence.block_table),
                        adapter_id=0,
                        sampling=sequence.sampling,
                    )
                )
            chunks.append(Chunk(sequence.row, start, count, is_last))
            self._publish_planned_prompt(sequence)
            budget -= count
            if is_last:
                self._prefilling.popleft()
                self._decoding[sequence.row] = sequence
                samples.append(sequence)
        return add_rows, chunks, samples

    def _reserve(self, sequence: Sequence, num_blocks: int) -> None:
        assert num_blocks >= 0, num_blocks
        self._num_blocks_reserved += num_blocks - sequence.num_blocks_reserved
        sequence.num_blocks_reserved = num_blocks

    def _leave_row(self, sequence: Sequence) -> None:
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
            if sequence.num_planned == sequence.num_cached_tokens:  # no plan has named its row yet
                self._free_rows.append(sequence.row)
                sequence.row = -1
                return
        self._decoding.pop(sequence.row, None)
        self._rows_to_remove.append(sequence.row)
        sequence.row = -1

    def _publish_planned_prompt(self, sequence: Sequence) -> None:
        """Prompt blocks can be found as soon as they are planned: a later plan that reads them is computed later."""
        num_full = min(sequence.num_planned // self.pool.block_size, len(sequence.block_hashes))
        self._publish(sequence, num_full)

    def _publish_decoded(self, sequence: Sequence) -> None:
        """Blocks that decoding filled can be found once their tokens are known; the last token's keys are not written yet."""
        block_size = self.pool.block_size
        num_full = (len(sequence.token_ids) - 1) // block_size
        while len(sequence.block_hashes) < num_full:
            start = len(sequence.block_hashes) * block_size
            parent = sequence.block_hashes[-1] if sequence.block_hashes else sequence.cache_root
            sequence.block_hashes.append(hash_block(parent, sequence.token_ids[start : start + block_size]))
        self._publish(sequence, num_full)

    def _publish(self, sequence: Sequence, num_full: int) -> None:
        while sequence.num_published < num_full:
            self.pool.publish(sequence.block_table[sequence.num_published], sequence.block_hashes[sequence.num_published])
            sequence.num_published += 1
