"""Log probabilities as messages carry them, and those of prompts, which come chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from quire.common.messages import Chunk, Logprobs
from quire.kernels.logprobs import TokenLogprobs, token_logprobs
from quire.worker.batch import Batch
from quire.worker.host_copy import HostCopy

# Rows of logits that are held at once: those of a long chunk of a large vocabulary would be gigabytes.
_MAX_ROWS_AT_ONCE: Final = 256

_NONE: Final = Logprobs((), (), (), ())


class LogprobColumns:
    """Log probabilities of a step's tokens on their way to the host."""

    def __init__(self, columns: TokenLogprobs) -> None:
        self._copies = [HostCopy(column) for column in (columns.logprobs, columns.ranks, columns.top_ids, columns.top_logprobs)]

    def read(self) -> Logprobs:
        """As messages carry them, once the step has ended."""
        logprobs, ranks, top_ids, top_logprobs = (copy.tolist() for copy in self._copies)
        return Logprobs(
            logprobs=tuple(logprobs), ranks=tuple(ranks), top_ids=tuple(map(tuple, top_ids)), top_logprobs=tuple(map(tuple, top_logprobs))
        )


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A chunk of a prompt whose log probabilities are asked for."""

    chunk_index: int
    row: int
    start: int  # position of the chunk's first token
    count: int
    places: range  # in the step: tokens whose logits are those of the prompt's next token
    num_top: int


def prompt_spans(batch: Batch, chunks: Sequence[Chunk], chunk_places: Sequence[int]) -> list[PromptSpan]:
    """The chunks of prompts whose log probabilities are asked for; resumed tokens of a completion have none.

    chunk_places: where each chunk's tokens begin in the step
    """
    spans = []
    for index, (chunk, place) in enumerate(zip(chunks, chunk_places, strict=True)):
        row = batch.rows[chunk.row]
        num_top = row.sampling.num_prompt_logprobs
        if num_top is not None:
            num_known = max(0, min(chunk.start + chunk.count, row.prompt_len - 1) - chunk.start)
            spans.append(PromptSpan(index, chunk.row, chunk.start, chunk.count, range(place, place + num_known), num_top))
    return spans


class PromptLogprobs:
    """What a step tells of its prompts, on its way to the host."""

    def __init__(self, batch: Batch, spans: Sequence[PromptSpan], logits_of: Callable[[range], Tensor]) -> None:
        """Compute it.

        logits_of: the logits of places of the step: [number of places, vocab_size] float32
        """
        self._spans = [(span, batch.rows[span.row], _following(batch, span, logits_of)) for span in spans]

    def read(self) -> tuple[tuple[int, Logprobs], ...]:
        """(index of the chunk, log probabilities of its tokens), once the step has ended; steps are read in their order.

        Nothing is known of the first token that a row computes, because the step before did not compute its logits. So a row added
        with num_computed = n reports from position n + 1 on, and a prompt computed from its start all but its first token.
        """
        reports = []
        for span, row, following in self._spans:
            entries = _join([row.next_logprob or _NONE, *(part.read() for part in following)])
            # The chunk's last logits are those of the next chunk's first token.
            is_ahead = span.start + span.count < row.prompt_len
            row.next_logprob = _slice(entries, -1, None) if is_ahead else None
            reported = _slice(entries, 0, -1) if is_ahead else entries
            if reported.logprobs:
                reports.append((span.chunk_index, reported))
        return tuple(reports)


def _following(batch: Batch, span: PromptSpan, logits_of: Callable[[range], Tensor]) -> list[LogprobColumns]:
    """Of the tokens behind each of the span's places, a bounded number of them at once."""
    parts = []
    for first in range(0, len(span.places), _MAX_ROWS_AT_ONCE):
        places = span.places[first : first + _MAX_ROWS_AT_ONCE]
        start = span.start + 1 + first
        token_ids = batch.tokens[span.row, start : start + len(places)]
        parts.append(LogprobColumns(token_logprobs(logits_of(places), token_ids, num_top=span.num_top)))
    return parts


def _join(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(
        logprobs=tuple(value for part in parts for value in part.logprobs),
        ranks=tuple(value for part in parts for value in part.ranks),
        top_ids=tuple(ids for part in parts for ids in part.top_ids),
        top_logprobs=tuple(values for part in parts for values in part.top_logprobs),
    )


def _slice(whole: Logprobs, start: int, stop: int | None) -> Logprobs:
    return Logprobs(whole.logprobs[start:stop], whole.ranks[start:stop], whole.top_ids[start:stop], whole.top_logprobs[start:stop])
