"""One sequence's tokens as the client gets them: text, token ids, and where it stops."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from quire.cluster.gateway.detokenizer import Detokenizer
from quire.cluster.gateway.request_stream import TokenEntry
from quire.cluster.gateway.stop_strings import StopStrings
from quire.common.messages import EndReason


@dataclass(frozen=True, slots=True)
class Piece:
    """News of a sequence: text and token ids that follow what was sent before. Text may come later than its tokens."""

    text: str
    token_ids: tuple[int, ...]
    entries: tuple[TokenEntry, ...] = ()  # log probabilities of token_ids, if they came


class Completion:
    """Turns token ids into pieces.

    The token that ends a sequence by being a stop token is among the token ids but gives no text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: StopStrings,
        *,
        stop_ids: Collection[int],
        max_tokens: int,
        text_before: str = "",
    ) -> None:
        """text_before: stands in front of the completion's text, and is not searched for stop strings."""
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._stop_ids = frozenset(stop_ids)
        self._max_tokens = max_tokens
        self._text_before = text_before
        self._undecided_id: int | None = None  # a stop token that came last: it gives text only if the sequence goes on
        self.num_tokens = 0  # kept ones
        self.cumulative_logprob: float | None = None  # of the kept tokens, if their log probabilities came

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found; tokens after the one that completed it are not kept."""
        return self._stop_strings.found

    def push(self, token_ids: list[int], entries: Sequence[TokenEntry] = ()) -> Piece:
        """The news that these tokens bring. Token by token, so that the stop does not depend on how they were grouped."""
        texts, self._text_before = [self._text_before], ""
        num_kept = 0
        for token_id in token_ids:
            if self.stop_string is not None:
                break
            num_kept += 1
            if self._undecided_id is not None:
                texts.append(self._text_of(self._undecided_id))
                self._undecided_id = None
                if self.stop_string is not None:
                    num_kept -= 1
                    break
            if token_id in self._stop_ids:
                self._undecided_id = token_id
            else:
                texts.append(self._text_of(token_id))
        self.num_tokens += num_kept
        kept = tuple(entries[:num_kept])
        if kept:
            self.cumulative_logprob = sum((entry.logprob for entry in kept), self.cumulative_logprob or 0.0)
        return Piece("".join(texts), tuple(token_ids[:num_kept]), kept)

    def finish(self, *, stop_id: int | None) -> str:
        """The rest of the text; `stop_id` is the token that ended the sequence. May still complete a stop string."""
        if self.stop_string is not None:
            return ""
        texts: list[str] = []
        if self._undecided_id is not None and stop_id is None:
            texts.append(self._text_of(self._undecided_id))
        self._undecided_id = None
        texts.append(self._stop_strings.push(self._detokenizer.flush()))
        if self.stop_string is None:
            texts.append(self._stop_strings.flush())
        return "".join(texts)

    def own_end(self) -> tuple[EndReason, int | None] | None:
        """How the sequence has ended as far as its tokens show, for when the scheduler can no longer say so."""
        if self.stop_string is not None:
            return EndReason.STOP, None
        if self._undecided_id is not None:
            return EndReason.STOP, self._undecided_id
        return (EndReason.LENGTH, None) if self.num_tokens >= self._max_tokens else None

    def _text_of(self, token_id: int) -> str:
        return self._stop_strings.push(self._detokenizer.push((token_id,)))
