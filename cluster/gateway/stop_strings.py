"""Finds stop strings in text that arrives piece by piece."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through until one of the stop strings is complete.

    The first to become complete wins, the longest of those that end at the same character, so the result does not depend on
    how the text was cut into pieces. Text that may still become a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool) -> None:
        self._stop_strings = tuple(sorted(stop_strings, key=len, reverse=True))
        self._include = include
        self._held = ""
        self.found: str | None = None  # once set, nothing is let through any more

    def push(self, text: str) -> str:
        """The text that can go out now that `text` has come."""
        if self.found is not None or not text:
            return ""
        if not self._stop_strings:
            return text
        held = self._held + text
        hits = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := held.find(stop)) >= 0]
        if hits:
            end, start, self.found = min(hits, key=lambda hit: hit[:2])
            self._held = ""
            return held[: end if self._include else start]
        keep = max(_overlap(held, stop) for stop in self._stop_strings)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, `stop` itself not counted."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
