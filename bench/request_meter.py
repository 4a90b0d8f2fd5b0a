"""How fast one streamed request was, as its client saw it."""

from collections.abc import Callable
from dataclasses import dataclass

from quire.client import AsyncStream, Delta, QuireError, Usage
from quire.common.clock import Clock, monotonic


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Spans are in seconds, by the client's clock."""

    num_prompt_tokens: int | None  # None if it failed before the server said
    num_tokens: int  # received, over all sequences
    ttft_s: float | None  # from the call to the first token; None if there was none
    tpot_s: float | None  # mean time per token after the first message's; None if all came with it
    total_s: float
    error: str | None
    num_cached_tokens: int = 0  # of the prompt, which the server had computed before
    gaps_s: tuple[float, ...] = ()  # ITL: between messages with tokens, over all sequences

    @property
    def normalized_s(self) -> float | None:
        """The whole time per token; None without tokens."""
        return self.total_s / self.num_tokens if self.num_tokens else None

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s if self.total_s > 0 else 0.0


class RequestMeter:
    """Takes a stream's deltas with their times, gives the record. State: the caller holds the clock."""

    def __init__(self, *, start_s: float) -> None:
        self._start_s = start_s
        self._first_s: float | None = None
        self._last_s = start_s
        self._num_first_tokens = 0
        self._num_tokens = 0
        self._gaps_s: list[float] = []
        self._usage: Usage | None = None

    def add(self, delta: Delta, *, now_s: float) -> None:
        self._usage = delta.usage or self._usage
        if not delta.token_ids:
            return
        self._num_tokens += len(delta.token_ids)
        if self._first_s is not None:
            self._gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        if self._first_s is None:
            self._first_s = now_s
            self._num_first_tokens = len(delta.token_ids)

    def record(self, *, now_s: float, error: str | None = None) -> RequestRecord:
        num_later = self._num_tokens - self._num_first_tokens
        return RequestRecord(
            num_prompt_tokens=self._usage.num_prompt_tokens if self._usage else None,
            num_tokens=self._num_tokens,
            ttft_s=None if self._first_s is None else self._first_s - self._start_s,
            tpot_s=(self._last_s - self._first_s) / num_later if self._first_s is not None and num_later else None,
            total_s=now_s - self._start_s,
            error=error,
            num_cached_tokens=self._usage.num_cached_tokens if self._usage else 0,
            gaps_s=tuple(self._gaps_s),
        )


async def measure_stream(
    stream: AsyncStream, *, on_delta: Callable[[Delta], None] | None = None, start_s: float | None = None, clock: Clock = monotonic
) -> RequestRecord:
    """Read a stream that was opened just now to its end. An error of the request is part of its record.

    start_s: when the request arrived, if that was before it was sent
    """
    meter = RequestMeter(start_s=clock() if start_s is None else start_s)
    try:
        async with stream:
            async for delta in stream:
                meter.add(delta, now_s=clock())
                if on_delta is not None:
                    on_delta(delta)
    except QuireError as error:
        return meter.record(now_s=clock(), error=f"{error.reason}: {error.message}")
    return meter.record(now_s=clock())
