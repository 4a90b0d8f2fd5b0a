"""One request from Submit to its end: the scheduler's tokens become news of its sequences for the client."""

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, Self

from quire.cluster.gateway.completion import Completion, Piece
from quire.cluster.gateway.request_stream import TokenEntry
from quire.cluster.gateway.scheduler_link import SchedulerLink, SchedulerStream
from quire.cluster.gateway.served_model import ServedModel
from quire.cluster.gateway.stop_strings import StopStrings
from quire.cluster.gateway.validation import ResolvedRequest
from quire.common.clock import Clock
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import EndReason, SequenceStart, Spans, Submit, UsageCounts

FIRST_ATTEMPT: Final = 1
# A client takes messages of 4 MiB by default; so many tokens of some kilobytes of text each still fit. Most likely tokens that
# are reported beside them count as well.
MAX_TOKENS_PER_PIECE: Final = 1024
# How long the scheduler may take to confirm an end that the gateway found; after that the gateway ends by itself.
FINISH_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """How a sequence ended."""

    reason: EndReason
    stop_id: int | None
    stop_string: str | None
    num_tokens: int
    cumulative_logprob: float | None  # of its tokens; None when it was not computed


@dataclass(frozen=True, slots=True)
class News:
    """What follows of one sequence; the last of it has its end."""

    index: int
    piece: Piece
    end: SequenceEnd | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """What a request cost, as far as the scheduler could tell."""

    usage: UsageCounts  # over the returned sequences
    spans: Spans
    num_preemptions: int


def make_submit(
    request: ResolvedRequest,
    model: ServedModel,
    *,
    tenant: str,
    submit_id: str,
    block_size: int,
    time_left_s: float,
    age_s: float,
    trace: str = "",
) -> Submit:
    """The request for the scheduler, under the gateway's own id of it. Hashes the whole prompt: call it from a worker thread."""
    root = cache_root(model=model.name, adapter="", tenant_scope=tenant, cache_salt=request.cache_salt)
    counts = request.counts
    return Submit(
        request_id=submit_id,
        attempt=FIRST_ATTEMPT,
        tenant=tenant,
        priority=request.priority,
        model=model.name,
        adapter="",
        prompt_ids=request.prompt_ids,
        block_hashes=tuple(hash_full_blocks(root, request.prompt_ids, block_size=block_size)),
        cache_root=root,
        sequences=tuple(SequenceStart(index) for index in range(counts.num_sequences)),
        n=counts.n,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        time_left_s=time_left_s,
        age_s=age_s,
        beam=counts.beam,
        trace=trace,
    )


def start_completions(request: ResolvedRequest, model: ServedModel) -> list[Completion]:
    """One per returned or chosen sequence. An echoed prompt is decoded for each: call it from a worker thread."""
    return [_start_completion(request, model) for _ in range(request.counts.num_reported)]


class Generation:
    """A request at the scheduler. Use it as a context manager: leaving it cancels what has not ended.

    Sequences come interleaved, in turns. When the best of several are asked for, nothing comes before all have ended.
    """

    # Invariant: `_open` are the sequences whose end was not given out, in the order of their turns.

    def __init__(
        self,
        link: SchedulerLink,
        stream: SchedulerStream,
        request: ResolvedRequest,
        completions: list[Completion],
        *,
        clock: Clock,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ) -> None:
        self._link = link
        self._stream = stream
        self._request = request
        self._clock = clock
        self._finish_timeout_s = finish_timeout_s
        self._completions = completions
        self._open = deque(range(len(completions)))
        self._best: deque[News] = deque()  # chosen among all, not yet given out
        self._num_tokens = 0  # of the sequences that were given out
        self._confirm_by_s: float | None = None  # loop time at which an end that the scheduler does not confirm counts all the same
        num_top = request.sampling.num_logprobs or 0
        self._max_tokens_per_piece = max(1, MAX_TOKENS_PER_PIECE // (1 + num_top))
        self.account: Account | None = None  # set with the last news
        self.first_token_s: float | None = None  # clock time at which the first token was handed on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self._stream.is_over:
            why = "the client is gone" if error_type is asyncio.CancelledError else "the call ended"
            self._link.cancel(self._stream, reason=why)

    @property
    def prompt_entries(self) -> list[TokenEntry]:
        """Log probabilities of the prompt, complete with the first news: of every token but the first."""
        return self._stream.prompt_entries

    async def next_news(self) -> News:
        """What has come of a sequence since its last news, however much that is; waits until there is something.

        `account` is set with the last.

        Raises:
            QuireError: the request ended without success.
        """
        assert self.account is None, "there are no news after the last"
        if self._request.counts.are_all_returned:
            news = await self._next()
        else:
            if not self._best:
                self._best.extend(await self._choose())
            news = self._best.popleft()
        if news.piece.token_ids and self.first_token_s is None:
            self.first_token_s = self._clock()
        if news.end is not None:
            self._num_tokens += news.end.num_tokens
        if not self._open and not self._best:
            self.account = self._make_account()
        return news

    async def _choose(self) -> list[News]:
        """Let all sequences end; the n best of them, as sequences 0 to n - 1, best first."""
        pieces: list[list[Piece]] = [[] for _ in self._completions]
        ends: dict[int, SequenceEnd] = {}
        while self._open:
            news = await self._next()
            pieces[news.index].append(news.piece)
            if news.end is not None:
                ends[news.index] = news.end
        ranked = sorted(ends, key=lambda index: -(ends[index].cumulative_logprob or 0.0))  # stable: ties go to the lower index
        chosen: list[News] = []
        for place, index in enumerate(ranked[: self._request.counts.n]):
            *others, last = _joined(pieces[index], max_tokens=self._max_tokens_per_piece)
            chosen += [News(place, piece) for piece in others]
            chosen.append(News(place, last, ends[index]))
        return chosen

    async def _next(self) -> News:
        while True:
            if self._stream.is_over:
                self._forget_absent()
            for _ in range(len(self._open)):
                index = self._open[0]
                self._open.rotate(-1)
                news = self._news_of(index)
                if news is not None:
                    return news
            if self._stream.error is not None:
                raise self._stream.error
            await self._wait()

    def _news_of(self, index: int) -> News | None:
        """What there is to say of a sequence now, if anything."""
        received, completion = self._stream.sequences[index], self._completions[index]
        piece = Piece("", ())
        if received.unsent:
            piece = completion.push(*received.take(max_tokens=self._max_tokens_per_piece))
            if completion.stop_string is not None:
                self._link.finish(self._stream, sequence=index, kept_tokens=completion.num_tokens)
                received.drop()
        if self._has_ended(index) and (len(self._open) > 1 or self._stream.is_over):
            return self._close(index, piece)
        return News(index, piece) if piece.text or piece.token_ids else None

    def _has_ended(self, index: int) -> bool:
        """Whether nothing more comes of a sequence. A failure that comes after its tokens have reached an end is none."""
        received, completion = self._stream.sequences[index], self._completions[index]
        if completion.stop_string is not None:
            return True
        is_known = received.finished is not None or (self._stream.is_over and completion.own_end() is not None)
        return is_known and not received.unsent

    def _close(self, index: int, piece: Piece) -> News:
        """The last news of a sequence."""
        self._open.remove(index)
        received, completion = self._stream.sequences[index], self._completions[index]
        finished = received.finished
        reason, stop_id = (finished.reason, finished.stop_id) if finished is not None else completion.own_end() or (EndReason.LENGTH, None)
        tail = completion.finish(stop_id=stop_id)
        if completion.stop_string is not None:
            reason, stop_id = EndReason.STOP, None
        logprob = completion.cumulative_logprob
        if logprob is None and finished is not None:
            logprob = finished.cumulative_logprob
        end = SequenceEnd(reason, stop_id, completion.stop_string, completion.num_tokens, logprob)
        return News(index, replace(piece, text=piece.text + tail), end)

    def _forget_absent(self) -> None:
        """A search may end with fewer sequences than were asked for."""
        if self._stream.error is None:
            self._open = deque(
                index
                for index in self._open
                if self._stream.sequences[index].finished is not None or self._completions[index].stop_string is not None
            )

    async def _wait(self) -> None:
        """For news of the scheduler; when only its account of the request is missing, not for long."""
        if len(self._open) != 1 or not self._has_ended(self._open[0]):
            await self._stream.wait_for_news()
            return
        if self._confirm_by_s is None:
            self._confirm_by_s = asyncio.get_running_loop().time() + self._finish_timeout_s
        try:
            async with asyncio.timeout_at(self._confirm_by_s):
                await self._stream.wait_for_news()
        except TimeoutError:
            self._link.cancel(self._stream, reason="the end of the sequence was not confirmed")

    def _make_account(self) -> Account:
        finished = self._stream.finished
        num_cached_tokens = finished.usage.num_cached_tokens if finished is not None else 0
        return Account(
            usage=UsageCounts(len(self._request.prompt_ids), num_cached_tokens, self._num_tokens),
            spans=finished.spans if finished is not None else Spans(0.0, 0.0, 0.0, 0.0),
            num_preemptions=finished.num_preemptions if finished is not None else 0,
        )


def _start_completion(request: ResolvedRequest, model: ServedModel) -> Completion:
    detokenizer = model.tokenizer.detokenizers.start(skip_special_tokens=request.skip_special_tokens)
    return Completion(
        detokenizer,
        StopStrings(request.stop_strings, include=request.include_stop_string),
        stop_ids=request.sampling.stop_ids,
        max_tokens=request.max_tokens,
        text_before=detokenizer.push(request.prompt_ids) if request.echo_prompt else "",
    )


def _joined(pieces: list[Piece], *, max_tokens: int) -> list[Piece]:
    """The same text and tokens in as few pieces as may be, at least one."""
    groups: list[list[Piece]] = [[]]
    num_tokens = 0
    for piece in pieces:
        num_tokens += len(piece.token_ids)
        if num_tokens > max_tokens:
            groups.append([])
            num_tokens = len(piece.token_ids)
        groups[-1].append(piece)
    return [
        Piece(
            "".join(piece.text for piece in group),
            tuple(token_id for piece in group for token_id in piece.token_ids),
            tuple(entry for piece in group for entry in piece.entries),
        )
        for group in groups
    ]
