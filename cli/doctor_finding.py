"""One line of `quire doctor`."""

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    GOOD = "good"
    NOTE = "note"  # it works, but someone may want to know
    BAD = "bad"  # `quire serve` will not work


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at and found, and what to do about it, if anything."""

    verdict: Verdict
    what: str
    advice: str = ""


def good(what: str) -> Finding:
    return Finding(Verdict.GOOD, what)


def note(what: str, advice: str = "") -> Finding:
    return Finding(Verdict.NOTE, what, advice)


def bad(what: str, advice: str) -> Finding:
    return Finding(Verdict.BAD, what, advice)
