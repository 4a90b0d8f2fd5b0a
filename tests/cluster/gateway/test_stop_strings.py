"""Stop strings are found wherever the text is cut, and nothing of them is let out before."""

import random

import pytest

from quire.cluster.gateway.stop_strings import StopStrings


def run(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include=include)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + ("" if matcher.found is not None else matcher.flush()), matcher.found


@pytest.mark.parametrize(
    ("text", "stops", "expected", "found"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["four"], "one two three", None),
        ("aab", ["ab"], "a", "ab"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcde", ["bcd", "c"], "ab", "c"),  # the one that is complete first
        ("xabc", ["bc", "abc"], "x", "abc"),  # both complete at the same character: the longest
        ("ends with ab", ["abc"], "ends with ab", None),
        ("你好。再见", ["。"], "你好", "。"),
        ("", ["a"], "", None),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_the_text_ends_in_front_of_the_stop_string(text: str, stops: list[str], expected: str, found: str | None) -> None:
    assert run([text], stops) == (expected, found)
    assert run(list(text), stops) == (expected, found)
    if found is not None:
        assert run(list(text), stops, include=True) == (expected + found, found)


def test_the_result_does_not_depend_on_how_the_text_was_cut() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(0, 30)))
        stops = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 5))]
        pieces, start = [], 0
        while start < len(text):
            size = rng.randrange(1, 5)
            pieces.append(text[start : start + size])
            start += size
        assert run(pieces, stops) == run(list(text), stops), (text, stops, pieces)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["<end>"], include=False)
    assert matcher.push("a < b <e") == "a < b "
    assert matcher.push("x") == "<ex"
