"""What a gateway knows of one request that it gave to the scheduler: pure, without socket or clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.common.errors import InternalError, QuireError
from quire.common.messages import EndReason, Finished, Logprobs, Spans, UsageCounts


class TokenEntry(NamedTuple):
    """The log probability of one token, and the most likely tokens at its place, most likely first."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def token_entries(columns: Logprobs) -> list[TokenEntry]:
    """Columns by token."""
    return [TokenEntry(*row) for row in zip(columns.logprobs, columns.ranks, columns.top_ids, columns.top_logprobs, strict=True)]


@dataclass(slots=True)
class SequenceStream:
    """The tokens of one sequence on their way from the scheduler to the client."""

    # Invariant: `unsent` are the last of token_ids, and their entries, if any are asked for, lie beside them.
    token_ids: list[int] = field(default_factory=list)  # all that came: with these the sequence can be resumed elsewhere
    unsent: list[int] = field(default_factory=list)
    unsent_entries: list[TokenEntry] = field(default_factory=list)
    finished: Finished | None = None
    is_dropped: bool = False  # nobody wants its further tokens
    cumulative_logprob: float = 0.0  # of token_ids, as far as their log probabilities were asked for

    @property
    def num_received(self) -> int:
        return len(self.token_ids)

    def take(self, *, max_tokens: int) -> tuple[list[int], list[TokenEntry]]:
        """The tokens that have not been taken yet, however many have come since the last time, but at most max_tokens."""
        taken, self.unsent = self.unsent[:max_tokens], self.unsent[max_tokens:]
        entries, self.unsent_entries = self.unsent_entries[:max_tokens], self.unsent_entries[max_tokens:]
        return taken, entries

    def drop(self) -> None:
        """Forget what has come and what comes: the sequence has ended for its reader."""
        self.is_dropped = True
        self.unsent, self.unsent_entries = [], []


class RequestStream:
    """The tokens of a request's sequences on their way from the scheduler to the client.

    It ends exactly once, by the Finished of its last sequence or by `error`; whatever comes later is ignored.
    """

    # Invariant: num_received <= max_tokens of each sequence, which bounds what a client that does not read can hold up.

    def __init__(
        self,
        request_id: str,
        attempt: int,
        *,
        max_tokens: int,
        num_sequences: int = 1,
        has_entries: bool = False,
        num_prompt_entries: int = 0,
    ) -> None:
        """has_entries: each token comes with its log probability; num_prompt_entries: so many come before the first token."""
        self.request_id = request_id  # the gateway's own, unique in the cluster
        self.attempt = attempt
        self.max_tokens = max_tokens
        self.handle: int | None = None  # the scheduler's name for it, once it is accepted
        self.sequences = [SequenceStream() for _ in range(num_sequences)]
        self.prompt_entries: list[TokenEntry] = []  # from the prompt's second token on
        self.finished: Finished | None = None  # the latest, whose account covers all before it
        self.error: QuireError | None = None
        self._has_entries = has_entries
        self._num_prompt_entries = num_prompt_entries
        self._is_repeated = False  # this attempt began anew, so what an earlier one brought may come again
        self._num_ended_tokens = 0  # of the sequences that ended in this attempt, by the scheduler's account

    @property
    def has_prompt_entries(self) -> bool:
        """Whether nothing of the prompt's log probabilities is missing."""
        return len(self.prompt_entries) == self._num_prompt_entries

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come; there may still be unsent tokens."""
        return self.error is not None or (self.finished is not None and self.finished.is_last)

    def receive(self, *, sequence: int, first_offset: int, token_ids: Sequence[int], entries: Sequence[TokenEntry] = ()) -> None:
        """Take in tokens. Those that are known already are dropped; a gap or one too many ends the request, it is our bug."""
        if self.is_over:
            return
        stream = self.sequences[sequence] if sequence < len(self.sequences) else None
        if stream is None or first_offset > stream.num_received:
            num_known = stream.num_received if stream is not None else 0
            text = f"tokens of sequence {sequence} of {len(self.sequences)} came from offset {first_offset} on"
            self.fail(InternalError(f"{text}, but {num_known} of it are there", reason="TOKENS_LOST"))
            return
        if stream.finished is not None:
            return  # by the gateway's Finish, or in an earlier attempt
        num_known = stream.num_received - first_offset
        news = token_ids[num_known:]
        if stream.num_received + len(news) > self.max_tokens:
            self.fail(InternalError(f"more than max_tokens {self.max_tokens} tokens came", reason="TOO_MANY_TOKENS"))
            return
        if self._has_entries and len(entries) != len(token_ids):
            text = f"{len(token_ids)} tokens came with {len(entries)} log probabilities"
            self.fail(InternalError(text, reason="LOGPROBS_LOST"))
            return
        if news and len(self.prompt_entries) < self._num_prompt_entries:
            text = f"{len(self.prompt_entries)} of {self._num_prompt_entries} log probabilities of the prompt came before the first token"
            self.fail(InternalError(text, reason="LOGPROBS_LOST"))
            return
        stream.token_ids.extend(news)
        if self._has_entries:
            stream.cumulative_logprob += sum(entry.logprob for entry in entries[num_known:])
        if not stream.is_dropped:
            stream.unsent.extend(news)
            if self._has_entries:
                stream.unsent_entries.extend(entries[num_known:])

    def receive_prompt(self, *, first_position: int, entries: Sequence[TokenEntry]) -> None:
        """Take in the log probabilities of prompt tokens. Those that are known already are dropped; a gap ends the request."""
        if self.is_over or self._num_prompt_entries == 0:
            return
        num_known = len(self.prompt_entries) + 1 - first_position
        if num_known < 0 or len(self.prompt_entries) + len(entries[num_known:]) > self._num_prompt_entries:
            text = f"{len(entries)} log probabilities of the prompt came from position {first_position} on, out of order"
            self.fail(InternalError(text, reason="LOGPROBS_LOST"))
            return
        self.prompt_entries.extend(entries[num_known:])

    def finish(self, finished: Finished) -> None:
        """A sequence ended well."""
        if self.is_over:
            return
        stream = self.sequences[finished.sequence] if finished.sequence < len(self.sequences) else None
        if stream is None or (stream.finished is not None and not self._is_repeated):
            self.fail(InternalError(f"sequence {finished.sequence} of {len(self.sequences)} ended twice", reason="TOKENS_LOST"))
            return
        # The account counts the tokens of all sequences that ended so far.
        num_tokens = finished.usage.num_completion_tokens - self._num_ended_tokens
        if num_tokens > stream.num_received:
            self.fail(InternalError(f"{num_tokens} tokens were generated, {stream.num_received} came", reason="TOKENS_LOST"))
            return
        self._num_ended_tokens = finished.usage.num_completion_tokens
        stream.finished = self.finished = finished
        # A search may end with fewer sequences than were asked for; of those nothing was ever heard.
        left = [index for index, other in enumerate(self.sequences) if other.finished is None and other.num_received > 0]
        if finished.is_last and left:
            self.error = InternalError(f"the request ended without an end of sequence {left[0]}", reason="TOKENS_LOST")

    def end_here(self, index: int, reason: EndReason, *, stop_id: int | None = None) -> None:
        """A sequence has reached an end that the tokens themselves show, and no scheduler is there to confirm it.

        The account is the last that came: what the lost scheduler knew of times and cached tokens went with it.
        """
        if self.is_over or self.sequences[index].finished is not None:
            return
        is_last = all(other.finished is not None for place, other in enumerate(self.sequences) if place != index)
        usage = self.finished.usage if self.finished is not None else UsageCounts(0, 0, 0)
        spans = self.finished.spans if self.finished is not None else Spans(0.0, 0.0, 0.0, 0.0)
        num_preemptions = self.finished.num_preemptions if self.finished is not None else 0
        logprob = self.sequences[index].cumulative_logprob if self._has_entries else None
        finished = Finished(0, index, reason, stop_id, is_last, usage, spans, num_preemptions, logprob)
        self.sequences[index].finished = self.finished = finished

    def begin_attempt(self, attempt: int, *, is_repeated: bool) -> None:
        """The request is submitted once more, under another number. is_repeated: from its start, ended sequences included."""
        self.attempt, self.handle = attempt, None
        self._num_ended_tokens = 0
        self._is_repeated = is_repeated

    def fail(self, error: QuireError) -> None:
        """The request ended without success."""
        if not self.is_over:
            self.error = error
