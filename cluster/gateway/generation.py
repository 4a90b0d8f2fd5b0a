"""One generation from Submit to its end: the scheduler's tokens become pieces for the client."""

import asyncio
from dataclasses import dataclass, replace
from typing import Final, Self

from quire.cluster.gateway.completion import Completion, Piece
from quire.cluster.gateway.scheduler_link import SchedulerLink, SchedulerStream
from quire.cluster.gateway.served_model import ServedModel
from quire.cluster.gateway.stop_strings import StopStrings
from quire.cluster.gateway.validation import ResolvedRequest
from quire.common.clock import Clock
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import EndReason, Finished, SequenceStart, Submit, UsageCounts

# Until tokens and roles come with authentication, everyone is this tenant.
LOCAL_TENANT: Final = "local"
NORMAL_PRIORITY: Final = 2
FIRST_ATTEMPT: Final = 1
# A client takes messages of 4 MiB by default; so many tokens of some kilobytes of text each still fit.
MAX_TOKENS_PER_PIECE: Final = 1024
# How long the scheduler may take to confirm an end that the gateway found; after that the gateway ends by itself.
FINISH_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class End:
    """How a generation ended, with what is known of its cost."""

    reason: EndReason
    stop_id: int | None
    stop_string: str | None
    usage: UsageCounts
    queue_s: float
    prefill_s: float
    decode_s: float
    preempted_s: float
    num_preemptions: int
    cumulative_logprob: float | None  # of its tokens; None when nobody asked for it


def make_submit(
    request: ResolvedRequest, model: ServedModel, *, submit_id: str, block_size: int, time_left_s: float, age_s: float
) -> Submit:
    """The request for the scheduler, under the gateway's own id of it. Hashes the whole prompt: call it from a worker thread."""
    root = cache_root(model=model.name, adapter="", tenant_scope=LOCAL_TENANT, cache_salt=request.cache_salt)
    return Submit(
        request_id=submit_id,
        attempt=FIRST_ATTEMPT,
        tenant=LOCAL_TENANT,
        priority=NORMAL_PRIORITY,
        model=model.name,
        adapter="",
        prompt_ids=request.prompt_ids,
        block_hashes=tuple(hash_full_blocks(root, request.prompt_ids, block_size=block_size)),
        cache_root=root,
        sequences=(SequenceStart(0),),
        n=1,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        time_left_s=time_left_s,
        age_s=age_s,
    )


class Generation:
    """A request at the scheduler. Use it as a context manager: leaving it cancels what has not ended."""

    def __init__(
        self,
        link: SchedulerLink,
        stream: SchedulerStream,
        request: ResolvedRequest,
        model: ServedModel,
        *,
        clock: Clock,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ) -> None:
        self._link = link
        self._stream = stream
        self._request = request
        self._clock = clock
        self._finish_timeout_s = finish_timeout_s
        self._completion = Completion(
            model.tokenizer.detokenizers.start(skip_special_tokens=request.skip_special_tokens),
            StopStrings(request.stop_strings, include=request.include_stop_string),
            stop_ids=request.sampling.stop_ids,
            max_tokens=request.max_tokens,
        )
        self.end: End | None = None  # set with the last piece
        self.first_token_s: float | None = None  # clock time at which the first token was handed on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self._stream.is_over:
            why = "the client is gone" if error_type is asyncio.CancelledError else "the call ended"
            self._link.cancel(self._stream, reason=why)

    async def next_piece(self) -> Piece:
        """What has come since the last piece, however much that is; waits until there is something. `end` is set with the last.

        Raises:
            QuireError: the request ended without success.
        """
        assert self.end is None, "there is no piece after the last"
        if self._completion.stop_string is not None:
            return await self._stopped_piece()
        while True:
            await self._stream.wait()
            piece = self._completion.push(self._stream.take(max_tokens=MAX_TOKENS_PER_PIECE))
            if piece.token_ids and self.first_token_s is None:
                self.first_token_s = self._clock()
            if self._completion.stop_string is not None:
                self._link.finish(self._stream, kept_tokens=self._completion.num_tokens)
                return piece if not self._stream.is_over else self._last_piece(piece)
            if self._stream.is_over and not self._stream.unsent:
                return self._last_piece(piece)
            if piece.text or piece.token_ids:
                return piece

    async def _stopped_piece(self) -> Piece:
        """After a stop string: wait for the scheduler's account of the request, but not for long."""
        try:
            async with asyncio.timeout(self._finish_timeout_s):
                await self._stream.wait_until_over()
        except TimeoutError:
            self._link.cancel(self._stream, reason="the end of the sequence was not confirmed")
        return self._last_piece(Piece("", ()))

    def _last_piece(self, piece: Piece) -> Piece:
        """Close the sequence. A failure that comes after its tokens have reached an end is none."""
        finished, own_end = self._stream.finished, self._completion.own_end()
        if finished is None and own_end is None:
            assert self._stream.error is not None, "a stream that is over has finished or failed"
            raise self._stream.error
        reason, stop_id = (finished.reason, finished.stop_id) if finished is not None else (own_end or (EndReason.LENGTH, None))
        tail = self._completion.finish(stop_id=stop_id)
        self.end = self._account(finished, reason=reason, stop_id=stop_id)
        return replace(piece, text=piece.text + tail)

    def _account(self, finished: Finished | None, *, reason: EndReason, stop_id: int | None) -> End:
        stop_string = self._completion.stop_string
        spans = finished.spans if finished is not None else None
        return End(
            reason=EndReason.STOP if stop_string is not None else reason,
            stop_id=None if stop_string is not None else stop_id,
            stop_string=stop_string,
            usage=UsageCounts(
                num_prompt_tokens=len(self._request.prompt_ids),
                num_cached_tokens=finished.usage.num_cached_tokens if finished is not None else 0,
                num_completion_tokens=self._completion.num_tokens,
            ),
            queue_s=spans.queue_s if spans is not None else 0.0,
            prefill_s=spans.prefill_s if spans is not None else 0.0,
            decode_s=spans.decode_s if spans is not None else 0.0,
            preempted_s=spans.preempted_s if spans is not None else 0.0,
            num_preemptions=finished.num_preemptions if finished is not None else 0,
            cumulative_logprob=finished.cumulative_logprob if finished is not None else None,
        )
