"""Whether and when a call is tried again. State: the caller holds the clock and does the waiting."""

import random
from typing import Final

from quire.common.errors import Overloaded, QuireError, Unavailable

# Back-off where the server names no delay: 0.25 s doubled per try up to 8 s, of which a random half is taken off, so that
# clients that failed together do not come back together.
FIRST_DELAY_S: Final = 0.25
MAX_DELAY_S: Final = 8.0


class Tries:
    """The tries of one call.

    A call is tried again only while nothing of its answer was received; the caller asks only then.
    """

    def __init__(self, *, max_retries: int, deadline_s: float, rng: random.Random) -> None:
        """`deadline_s` is on the caller's clock; infinity means that there is none."""
        self.deadline_s = deadline_s
        self._num_left = max_retries
        self._num_failed = 0
        self._rng = rng

    def time_left_s(self, now_s: float) -> float | None:
        """What gRPC gets as the timeout of the next try; None when there is no deadline."""
        return None if self.deadline_s == float("inf") else max(0.0, self.deadline_s - now_s)

    def delay_after_s(self, error: QuireError, *, now_s: float) -> float | None:
        """How long to wait before the next try; None when `error` is to be raised.

        Overload and absence are tried again unless the server says, by naming no delay, that it will not help. A delay that
        reaches past the deadline is not waited for.
        """
        if not isinstance(error, (Overloaded, Unavailable)) or error.retry_after_s is None or self._num_left == 0:
            return None
        back_off_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2**self._num_failed)
        jitter = self._rng.random()
        delay_s = error.retry_after_s * (1 + 0.25 * jitter) if error.retry_after_s else back_off_s * (0.5 + 0.5 * jitter)
        if now_s + delay_s >= self.deadline_s:
            return None
        self._num_left -= 1
        self._num_failed += 1
        return delay_s
