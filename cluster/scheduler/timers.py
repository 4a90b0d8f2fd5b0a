"""Times at which something falls due for a request."""

import heapq
from collections.abc import Callable
from typing import Final

# Entries of requests that have gone may stay up to so many beyond twice the live ones.
MAX_STALE_TIMERS: Final = 1000


class Timers:
    """A heap of (time, handle). An entry that `is_live` denies is skipped when it surfaces, and swept out when there are many."""

    def __init__(self, is_live: Callable[[float, int], bool]) -> None:
        self._is_live = is_live
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, due_s: float, handle: int, *, num_live: int) -> None:
        """num_live: about how many entries are live, this one included."""
        heapq.heappush(self._heap, (due_s, handle))
        if len(self._heap) > 2 * num_live + MAX_STALE_TIMERS:
            self._heap = [entry for entry in self._heap if self._is_live(*entry)]
            heapq.heapify(self._heap)

    def next_due_s(self) -> float | None:
        """The earliest time, of a live entry or of one that was not swept out yet."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_s: float) -> int | None:
        """The handle of a live entry that is due, earliest first; None when there is none."""
        while self._heap and self._heap[0][0] <= now_s:
            due_s, handle = heapq.heappop(self._heap)
            if self._is_live(due_s, handle):
                return handle
        return None
