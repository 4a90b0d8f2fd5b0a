"""A line at the terminal that fills up."""

import sys
from typing import Final

WIDTH: Final = 30
# A bar is drawn this often at most.
MIN_PAUSE_S: Final = 0.1


class ProgressBar:
    """Drawn on standard error, and only if that is a terminal."""

    def __init__(self, total: int, what: str) -> None:
        self._total = total
        self._what = what
        self._is_shown = sys.stderr.isatty()
        self._drawn_s = float("-inf")

    def draw(self, count: int, *, elapsed_s: float, note: str = "") -> None:
        """So many of all are done. The last one is always drawn."""
        if self._is_shown and (count >= self._total or elapsed_s - self._drawn_s >= MIN_PAUSE_S):
            self._drawn_s = elapsed_s
            print(f"\r{bar_line(count, self._total, self._what, elapsed_s=elapsed_s, note=note)}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line."""
        if self._is_shown:
            print(file=sys.stderr)


def bar_line(count: int, total: int, what: str, *, elapsed_s: float, note: str = "") -> str:
    """Padded, so that it covers the line before it."""
    num_full = WIDTH * min(count, total) // max(1, total)
    bar = "#" * num_full + "." * (WIDTH - num_full)
    return f"[{bar}] {count}/{total} {what}, {elapsed_s:.0f} s{note}".ljust(78)
