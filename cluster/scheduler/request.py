"""A request on its way through the scheduler, and the sequences that it generates: plain data."""

import enum
import math
from dataclasses import dataclass, field
from typing import Final

from quire.cluster.scheduler.beam_search import BeamSearchState
from quire.common.messages import EndReason, SamplingState, Submit

# `write_limit` of a sequence whose next write may meet a block that others hold: it is looked at before every step.
LOOK_FIRST: Final = 0


class RequestState(enum.Enum):
    WAITING = "waiting"  # in the central queue, holds no block; it is new, or was preempted for recompute
    RUNNING = "running"  # holds rows and GPU blocks of a group
    SWAPPED = "swapped"  # holds CPU blocks of its group; their copies may still be on their way out
    SWAPPING_IN = "swapping in"  # holds rows, GPU blocks and CPU blocks; copies are on their way in
    ENDED = "ended"  # its last message is sent, it holds nothing


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation in flight.

    Tokens [0, num_planned) have their keys and values in `block_table` (`cpu_table` while swapped), computed or on their way
    by plans that were sent.
    """

    request: "Request"
    handle: int  # of its request
    gateway: bytes  # of its request
    index: int
    token_ids: list[int]  # prompt and completion
    num_prompt_tokens: int  # of the client's prompt
    max_total: int  # most tokens of prompt and completion
    sampling: SamplingState  # its sequence_index is `index`
    row: int = -1  # in the group's batch; -1 outside it
    in_batch: bool = False  # a plan gave the ranks this row
    reports_prompt: bool = False  # the ranks compute its prompt from the first token on, with log probabilities if asked to
    fork_of: "Sequence | None" = None  # with a row, not in_batch: the ranks make the row by forking this one's
    block_table: list[int] = field(default_factory=list)
    cpu_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks known so far
    num_published: int = 0  # blocks of this table that the pool can find by them
    # Invariant: num_planned <= len(token_ids) + num_in_flight and num_planned <= len(block_table) * block_size.
    num_planned: int = 0
    num_in_flight: int = 0  # samples that plans asked for and no result brought yet
    prefill_end: int = 0  # tokens known when it entered the batch: its chunks end here
    leader: "Sequence | None" = None  # a sibling that computes its first `shared_tokens` tokens, in blocks that they share
    shared_tokens: int = 0
    write_limit: int = 0  # the step that plans this position must first see to the block it is written to
    look_at: int = 0  # len(token_ids) at which `apply` has more to do than append
    cumulative_logprob: float = 0.0
    ended: bool = False

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_planned_to_its_end(self) -> bool:
        """Its last token, by length, is known or on its way: it needs no further step."""
        return self.num_planned >= self.max_total - 1

    @property
    def num_steps_left(self) -> int:
        """Steps to plan until its last token, by length, is on its way; below 1 when it is."""
        return self.max_total - 1 - self.num_planned

    @property
    def num_to_prefill(self) -> int:
        return self.prefill_end - max(self.num_planned, self.shared_tokens)

    def follow(self) -> None:
        """The leader's plans cover what they share: go on from there."""
        self.num_planned, self.leader, self.shared_tokens = self.shared_tokens, None, 0

    def forget_blocks(self) -> None:
        """It holds nothing any more, and must be computed anew."""
        self.row, self.in_batch, self.fork_of, self.leader = -1, False, None, None
        self.block_table, self.cpu_table = [], []
        self.num_published = self.num_planned = self.shared_tokens = 0


@dataclass(slots=True)
class Transfer:
    """All copies of one swap-out or swap-in."""

    num_left: int = 0
    failed: bool = False
    start_s: float = 0.0  # when it was planned


@dataclass(slots=True, eq=False)
class Request:
    """One request: its sequences are admitted, preempted and resumed together. Times are the scheduler's clock, in seconds."""

    handle: int
    gateway: bytes
    submit: Submit
    arrival_s: float
    deadline_s: float
    state: RequestState = RequestState.WAITING
    sequences: list[Sequence] = field(default_factory=list)  # those that have not ended
    beam: BeamSearchState | None = None
    level: int = 0  # its class: what the client asked for, raised by waiting
    group_id: str = ""  # where it runs or is swapped out; where it last ran while it waits
    spare_rows: list[int] = field(default_factory=list)  # rows kept for its further beams
    num_skips: int = 0  # requests behind it that were admitted before it
    kept_by: str = ""  # the group that keeps its blocks for it
    transfer: Transfer | None = None  # copies that must end before it goes on
    num_group_deaths: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0  # of the sequences that have ended
    num_prompt_logprobs: int = 0  # positions reported
    rises_s: float = 0.0  # while it waits: when its class rises
    admitted_s: float | None = None
    first_token_s: float | None = None
    preempted_at_s: float = 0.0
    preempted_s: float = 0.0  # spent so in all

    @property
    def key(self) -> tuple[bytes, str]:
        """What names a request across attempts."""
        return self.gateway, self.submit.request_id

    @property
    def is_preempted(self) -> bool:
        """It ran before and waits again."""
        return self.num_preemptions > 0 or self.num_group_deaths > 0

    @property
    def num_rows(self) -> int:
        """Rows that it needs at once."""
        return self.submit.beam.num_beams if self.submit.beam else len(self.sequences)

    @property
    def is_unforked(self) -> bool:
        """Its sequences share all their tokens: one is computed and the others are forked from it."""
        return len(self.sequences) > 1 and all(s.num_completion_tokens == 0 for s in self.sequences)

    @property
    def awaits_result(self) -> bool:
        """A plan that was sent before it was preempted will bring tokens; until then it is not known how it goes on."""
        return any(sequence.num_in_flight for sequence in self.sequences)

    @property
    def needs_steps(self) -> bool:
        return any(not sequence.is_planned_to_its_end for sequence in self.sequences)


@dataclass(slots=True)
class SequenceEnd:
    """How a sequence ended well."""

    sequence: Sequence
    reason: EndReason
    stop_id: int | None
    num_tokens: int  # of its completion, that the client keeps


def num_sequences(submit: Submit) -> int:
    """Sequences, or beams, that a request runs at once."""
    return submit.beam.num_beams if submit.beam else len(submit.sequences)


def most_blocks(*, num_prompt_tokens: int, max_tokens: int, num_sequences: int, block_size: int) -> int:
    """Most blocks that a request holds at once, whatever happens to it.

    Its sequences share the full blocks before the prompt's last token; from there on each has its own.
    """
    num_shared = max(num_prompt_tokens - 1, 0) // block_size
    own_tokens = num_prompt_tokens + max_tokens - num_shared * block_size
    return num_shared + num_sequences * math.ceil(own_tokens / block_size)
