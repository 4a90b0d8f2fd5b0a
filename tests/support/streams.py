"""Many streams at once, greedy and seeded, for tests in which something dies or changes under them."""

import threading
import time
from itertools import pairwise
from typing import Any, Final

from quire.client import Client

TIMEOUT_S: Final = 120.0


def request(index: int, num_tokens: int) -> dict[str, Any]:
    """Every other one greedy, the others seeded."""
    chance = {"temperature": 0.0} if index % 2 else {"seed": 100 + index, "temperature": 0.9}
    return {"prompt": f"Once upon a time there were {index} small", "max_tokens": num_tokens, "ignore_eos": True, **chance}


# Of the built-in model, by stream: the tokens of the first that ran undisturbed. It draws the same on every cluster.
_undisturbed: list[list[int]] = []


def are_known(*, num_streams: int, num_tokens: int) -> bool:
    """Whether `undisturbed` has such tokens already."""
    return len(_undisturbed) >= num_streams and len(_undisturbed[0]) >= num_tokens


def undisturbed(address: str, *, num_streams: int, num_tokens: int) -> list[list[int]]:
    """The tokens of streams under which nothing happens: run here, unless as many as long ran anywhere before."""
    if not are_known(num_streams=num_streams, num_tokens=num_tokens):
        _undisturbed[:] = Streams(address, num_streams=num_streams, num_tokens=num_tokens).wait()
        assert all(len(token_ids) == num_tokens for token_ids in _undisturbed)
    return [token_ids[:num_tokens] for token_ids in _undisturbed[:num_streams]]


class Streams:
    """`num_streams` streams of `num_tokens` tokens, each in a thread, all through one connection without retries."""

    def __init__(self, address: str, *, num_streams: int, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self.num_wanted = num_streams * num_tokens
        self.token_ids: list[list[int]] = [[] for _ in range(num_streams)]
        self.errors: list[BaseException] = []
        self.longest_pause_s = 0.0
        self.num_preemptions = 0
        self._arrivals_s = [time.monotonic()]
        self._client = Client(address, max_retries=0)
        self._threads = [threading.Thread(target=self._read, args=(index,), daemon=True) for index in range(num_streams)]
        for thread in self._threads:
            thread.start()

    @property
    def num_tokens(self) -> int:
        """Tokens that came so far, of all streams."""
        return sum(map(len, self.token_ids))

    @property
    def longest_silence_s(self) -> float:
        """The longest time in which no stream had a token: longest_pause_s without what a stream waits while others are served."""
        arrivals_s = sorted(self._arrivals_s)
        return max((later - earlier for earlier, later in pairwise(arrivals_s)), default=0.0)

    @property
    def are_done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> list[list[int]]:
        """The token ids of each stream, once all have ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        assert not self.errors, self.errors
        assert self.are_done, [len(ids) for ids in self.token_ids]
        self._client.close()
        return self.token_ids

    def _read(self, index: int) -> None:
        try:
            last_s = time.monotonic()
            for delta in self._client.stream(**request(index, self._num_tokens)):
                self.token_ids[index] += delta.token_ids
                self.num_preemptions += 0 if delta.timings is None else delta.timings.num_preemptions
                now_s = time.monotonic()
                self._arrivals_s.append(now_s)
                self.longest_pause_s = max(self.longest_pause_s, now_s - last_s)
                last_s = now_s
        except BaseException as error:
            self.errors.append(error)
