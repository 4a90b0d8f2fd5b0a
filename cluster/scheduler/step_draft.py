"""A step plan while it is made, and what is remembered of it until its result comes."""

from dataclasses import dataclass, field

from quire.cluster.scheduler.request import Sequence
from quire.common.messages import Chunk, RowAdd, StepPlan


@dataclass(slots=True)
class SentPlan:
    """A plan that is not answered yet, with the sequences that its result will name by order alone."""

    step_id: int
    sent_s: float
    time_out_s: float
    sampled: list[Sequence]
    chunks: list[tuple[Sequence, int]]  # (sequence, first token), as in the plan
    num_prefill_tokens: int
    num_decoding: int
    num_copies: int


@dataclass(slots=True)
class StepDraft:
    """The parts of a StepPlan, in lists that still grow."""

    add_rows: list[RowAdd] = field(default_factory=list)
    forks: list[tuple[int, int, int]] = field(default_factory=list)
    appends: list[tuple[int, int]] = field(default_factory=list)  # (row, token id)
    grows: list[tuple[int, int]] = field(default_factory=list)  # (row, block id)
    cow: list[tuple[int, int, int]] = field(default_factory=list)
    swap_out: list[tuple[int, int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    chunked: list[tuple[Sequence, int]] = field(default_factory=list)  # (sequence, first token) of each chunk
    samples: list[tuple[int, int]] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)  # of each sample
    decoded: list[Sequence] = field(default_factory=list)  # sticky rows that decode, ascending
    num_prefill_tokens: int = 0
    held: set[int] = field(default_factory=set)  # sticky rows that must not decode in this step
    waiting_beams: set[int] = field(default_factory=set)  # handles of beam searches without the blocks for their next step

    def sample(self, sequence: Sequence, *, source_row: int) -> None:
        """Have the sequence's next token drawn from the logits of a row's last token."""
        self.samples.append((source_row, sequence.row))
        self.sampled.append(sequence)
        sequence.num_in_flight += 1

    @property
    def computes(self) -> bool:
        return bool(self.decoded or self.chunks)

    def plan(
        self,
        *,
        term: int,
        step_id: int,
        remove_rows: tuple[int, ...],
        hold_rows: tuple[int, ...],
        wait_copies: tuple[int, ...],
        debug_checksum: bool,
    ) -> StepPlan:
        return StepPlan(
            term=term,
            step_id=step_id,
            add_rows=tuple(self.add_rows),
            remove_rows=remove_rows,
            forks=tuple(self.forks),
            append_rows=tuple(row for row, _ in self.appends),
            append_ids=tuple(token_id for _, token_id in self.appends),
            grow_rows=tuple(row for row, _ in self.grows),
            grow_block_ids=tuple(block_id for _, block_id in self.grows),
            cow=tuple(self.cow),
            swap_out=tuple(self.swap_out),
            swap_in=tuple(self.swap_in),
            wait_copies=wait_copies,
            chunks=tuple(self.chunks),
            samples=tuple(self.samples),
            hold_rows=hold_rows,
            debug_checksum=debug_checksum,
        )
