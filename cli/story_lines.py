"""Streams that are printed side by side, a line at a time."""


class LineWrapper:
    """Text in pieces to whole lines of at most `width` characters, broken between words. State: it prints nothing."""

    # Invariant: `_rest` has no line break, and at most `width` characters.

    def __init__(self, width: int) -> None:
        self._width = width
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        """The lines that are complete now that `text` has come."""
        lines: list[str] = []
        *ended, self._rest = (self._rest + text).split("\n")
        for paragraph in ended:
            lines += self._wrap(paragraph, ends=True)
        lines += self._wrap(self._rest, ends=False)
        return lines

    def flush(self) -> list[str]:
        """What is left when the text has ended."""
        lines = self._wrap(self._rest, ends=True) if self._rest.strip() else []
        self._rest = ""
        return lines

    def _wrap(self, text: str, *, ends: bool) -> list[str]:
        """Full lines from the front of `text`; with `ends` all of it, else the rest is kept for later."""
        lines = []
        while len(text) > self._width:
            space = text.rfind(" ", 0, self._width + 1)
            cut = space if space > 0 else self._width
            lines.append(text[:cut].rstrip())
            text = text[cut:].lstrip(" ") if space > 0 else text[cut:]
        if ends:
            lines.append(text.rstrip())
        else:
            self._rest = text
        return lines
