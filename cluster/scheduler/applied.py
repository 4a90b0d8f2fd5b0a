"""What a step's result brought, for the scheduler to pass on."""

from collections import defaultdict
from dataclasses import dataclass, field

from quire.cluster.scheduler.request import Request, Sequence, SequenceEnd
from quire.common.messages import Logprobs, RowErrorCode, Tokens


@dataclass(slots=True)
class TokenColumns:
    """New tokens for one gateway: the columns of a Tokens message, an entry per token."""

    handles: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    first_offsets: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, Logprobs]] = field(default_factory=list)  # (index of the entry, of its token)

    def message(self) -> Tokens:
        return Tokens(
            handles=tuple(self.handles),
            sequences=tuple(self.sequences),
            first_offsets=tuple(self.first_offsets),
            counts=(1,) * len(self.handles),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
        )


@dataclass(slots=True)
class Applied:
    """What happened to sequences that are still wanted."""

    tokens_of: defaultdict[bytes, TokenColumns] = field(default_factory=lambda: defaultdict(TokenColumns))  # by gateway
    has_resumable: bool = False  # a preempted request has what it waited for
    first: list[Request] = field(default_factory=list)  # these have their first token
    ends: list[SequenceEnd] = field(default_factory=list)
    beam_steps: list[Request] = field(default_factory=list)  # all beams of these have reported
    failed: list[tuple[Request, RowErrorCode]] = field(default_factory=list)
    prompt_logprobs: list[tuple[Sequence, int, Logprobs]] = field(default_factory=list)  # (sequence, first token of its chunk, …)

    def add(self, sequence: Sequence, token_id: int, logprobs: Logprobs | None) -> None:
        """One more token of a sequence, which holds it already."""
        columns = self.tokens_of[sequence.gateway]
        if logprobs is not None:
            columns.logprobs.append((len(columns.handles), logprobs))
        columns.handles.append(sequence.handle)
        columns.sequences.append(sequence.index)
        columns.first_offsets.append(sequence.num_completion_tokens - 1)
        columns.token_ids.append(token_id)
