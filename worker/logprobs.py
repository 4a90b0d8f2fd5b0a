"""Log probabilities as messages carry them, and those of prompts, which come chunk by chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from quire.common.messages import Chunk, Logprobs
from quire.kernels.logprobs import TokenLogprobs, token_logprobs
from quire.worker.batch import Batch
from quire.worker.step_inputs import StepInputs

# Rows of logits whose logarithms are held at once: a long chunk of a large vocabulary would double gigabytes otherwise.
_MAX_ROWS_AT_ONCE: Final = 256

_NONE: Final = Logprobs((), (), (), ())


def as_message(columns: TokenLogprobs) -> Logprobs:
    """The same as numbers on the host; waits for the device."""
    return Logprobs(
        logprobs=tuple(columns.logprobs.tolist()),
        ranks=tuple(columns.ranks.tolist()),
        top_ids=tuple(map(tuple, columns.top_ids.tolist())),
        top_logprobs=tuple(map(tuple, columns.top_logprobs.tolist())),
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


def prompt_spans(batch: Batch, chunks: Sequence[Chunk], inputs: StepInputs) -> list[PromptSpan]:
    """The chunks of prompts whose log probabilities are asked for; resumed tokens of a completion have none."""
    spans = []
    for index, (chunk, place) in enumerate(zip(chunks, inputs.chunk_places, strict=True)):
        row = batch.rows[chunk.row]
        num_top = row.sampling.num_prompt_logprobs
        if num_top is not None:
            num_known = max(0, min(chunk.start + chunk.count, row.prompt_len - 1) - chunk.start)
            spans.append(PromptSpan(index, chunk.row, chunk.start, chunk.count, range(place, place + num_known), num_top))
    return spans


def prompt_logprobs(batch: Batch, spans: Sequence[PromptSpan], logits: Tensor) -> tuple[tuple[int, Logprobs], ...]:
    """What a step tells of its prompts: (index of the chunk, log probabilities of its tokens).

    logits: [sum of the spans' places, vocab_size] float32, in the order of the spans

    Nothing is known of the first token that a row computes, because the step before did not compute its logits. So a row added
    with num_computed = n reports from position n + 1 on, and a prompt computed from its start all but its first token.
    """
    reports = []
    for span, part in zip(spans, logits.split([len(span.places) for span in spans]), strict=True):
        row = batch.rows[span.row]
        entries = _join([row.next_logprob or _NONE, *_following(batch, span, part)])
        # The chunk's last logits are those of the next chunk's first token.
        is_ahead = span.start + span.count < row.prompt_len
        row.next_logprob = _slice(entries, -1, None) if is_ahead else None
        reported = _slice(entries, 0, -1) if is_ahead else entries
        if reported.logprobs:
            reports.append((span.chunk_index, reported))
    return tuple(reports)


def _following(batch: Batch, span: PromptSpan, logits: Tensor) -> list[Logprobs]:
    """Of the tokens behind each of the span's places."""
    first = span.start + 1
    token_ids = batch.tokens[span.row, first : first + len(logits)]
    parts = zip(logits.split(_MAX_ROWS_AT_ONCE), token_ids.split(_MAX_ROWS_AT_ONCE), strict=True)
    return [as_message(token_logprobs(part, ids, num_top=span.num_top)) for part, ids in parts if len(ids)]


def _join(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(
        logprobs=tuple(value for part in parts for value in part.logprobs),
        ranks=tuple(value for part in parts for value in part.ranks),
        top_ids=tuple(ids for part in parts for ids in part.top_ids),
        top_logprobs=tuple(values for part in parts for values in part.top_logprobs),
    )


def _slice(whole: Logprobs, start: int, stop: int | None) -> Logprobs:
    return Logprobs(whole.logprobs[start:stop], whole.ranks[start:stop], whole.top_ids[start:stop], whole.top_logprobs[start:stop])
