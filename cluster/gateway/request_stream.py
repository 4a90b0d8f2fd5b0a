"""What a gateway knows of one request that it gave to the scheduler: pure, without socket or clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.common.errors import InternalError, QuireError
from quire.common.messages import Finished


@dataclass(slots=True)
class RequestStream:
    """The tokens of a request's one sequence on their way from the scheduler to the client.

    It ends exactly once, by `finished` or by `error`; whatever comes later is ignored.
    """

    # Invariant: num_received <= max_tokens, and the last len(unsent) of them are in `unsent`, which bounds what a client
    # that does not read can hold up.
    request_id: str  # the gateway's own, unique in the cluster
    attempt: int
    max_tokens: int
    handle: int | None = None  # the scheduler's name for it, once it is accepted
    num_received: int = 0
    unsent: list[int] = field(default_factory=list)
    finished: Finished | None = None
    error: QuireError | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come; there may still be unsent tokens."""
        return self.finished is not None or self.error is not None

    def receive(self, *, sequence: int, first_offset: int, token_ids: Sequence[int]) -> None:
        """Take in tokens. Those that are known already are dropped; a gap or one too many ends the request, it is our bug."""
        if self.is_over:
            return
        if sequence != 0 or first_offset > self.num_received:
            self.fail(
                InternalError(
                    f"tokens of sequence {sequence} came from offset {first_offset} on, but {self.num_received} of sequence 0 are there",
                    reason="TOKENS_LOST",
                )
            )
            return
        news = token_ids[self.num_received - first_offset :]
        if self.num_received + len(news) > self.max_tokens:
            self.fail(InternalError(f"more than max_tokens {self.max_tokens} tokens came", reason="TOO_MANY_TOKENS"))
            return
        self.unsent.extend(news)
        self.num_received += len(news)

    def finish(self, finished: Finished) -> None:
        """The sequence ended well."""
        if self.is_over:
            return
        num_tokens = finished.usage.num_completion_tokens
        if num_tokens > self.num_received:
            self.fail(InternalError(f"{num_tokens} tokens were generated, {self.num_received} came", reason="TOKENS_LOST"))
            return
        self.finished = finished

    def fail(self, error: QuireError) -> None:
        """The request ended without success."""
        if not self.is_over:
            self.error = error

    def take(self, *, max_tokens: int) -> list[int]:
        """The tokens that have not been taken yet, however many have come since the last time, but at most max_tokens."""
        taken, self.unsent = self.unsent[:max_tokens], self.unsent[max_tokens:]
        return taken
