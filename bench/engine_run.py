"""What a gateway sees of requests that run together: when their tokens came, and how they ended."""

import statistics
from dataclasses import dataclass, field

from quire.common.errors import InternalError
from quire.common.messages import Accepted, Finished, Tokens


@dataclass(slots=True)
class RequestTimes:
    """One request. Times are in seconds from the first submission of its run."""

    submit_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)  # of each token
    end_s: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """From the submission to the first token; None if there was none."""
        return self.token_times_s[0] - self.submit_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None if there was no second."""
        num_later = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / num_later if num_later > 0 else None

    @property
    def gaps_s(self) -> list[float]:
        """ITL: from each token to the next."""
        return [later - sooner for sooner, later in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


class RunMeter:
    """Takes the scheduler's messages with their times. State: the caller holds the clock and the sockets."""

    def __init__(self, request_ids: list[str]) -> None:
        self.requests = [RequestTimes() for _ in request_ids]
        self.steps: list[tuple[float, int]] = []  # when a message of tokens came, and how many sequences had one token in it
        self.num_unfinished = len(request_ids)
        self._by_id = dict(zip(request_ids, self.requests, strict=True))
        self._by_handle: dict[int, RequestTimes] = {}

    def on_accepted(self, message: Accepted) -> None:
        request = self._by_id.get(message.request_id)
        if request is not None:  # else of a run before
            self._by_handle[message.handle] = request

    def on_tokens(self, message: Tokens, now_s: float) -> None:
        is_one_step = len(set(message.handles)) == len(message.handles) == len(message.token_ids)
        self.steps.append((now_s, len(message.handles) if is_one_step else 0))
        for handle, count in zip(message.handles, message.counts, strict=True):
            request = self._by_handle.get(handle)
            if request is not None:  # else of a run before, cancelled
                request.token_times_s.extend([now_s] * count)

    def on_finished(self, message: Finished, now_s: float) -> None:
        request = self._by_handle.get(message.handle)
        if request is None:
            return
        if request.end_s is not None:
            raise InternalError(f"a request ended twice: {message}")
        request.end_s = now_s
        request.num_preemptions = message.num_preemptions
        request.num_cached_tokens = message.usage.num_cached_tokens
        self.num_unfinished -= 1

    @property
    def total_s(self) -> float:
        """From the first submission to the last end."""
        return max((request.end_s for request in self.requests if request.end_s is not None), default=0.0)

    @property
    def num_tokens(self) -> int:
        return sum(len(request.token_times_s) for request in self.requests)

    @property
    def num_preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.requests)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return sum(request.num_cached_tokens for request in self.requests)

    def steady_step_s(self) -> float | None:
        """Median gap between messages in which every sequence had one token: steps that only decode. None if there were no two."""
        everyone = len(self.requests)
        pairs = zip(self.steps, self.steps[1:], strict=False)
        gaps = [later[0] - sooner[0] for sooner, later in pairs if sooner[1] == later[1] == everyone]
        return statistics.median(gaps) if gaps else None
