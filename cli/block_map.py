"""The blocks of a pool as a map of characters."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

# By state of a block: free, cached, held, shared. In the swap pool the held ones are those of preempted sequences.
CHARACTERS: Final = "·░▓█"
# Where a terminal cannot show these.
ASCII_CHARACTERS: Final = ".-o#"


def block_map(states: bytes, *, width: int, max_lines: int, characters: Sequence[str] = CHARACTERS) -> list[str]:
    """Lines of at most `width` characters, in the order of block ids. When there are more blocks than places, each place shows so
    many neighbours, by the state that most of them have, the busier one if two are as many."""
    if not states:
        return []
    per_place = -(-len(states) // (width * max_lines))
    places = [_commonest(states[start : start + per_place]) for start in range(0, len(states), per_place)]
    text = "".join(characters[state] for state in places)
    return [text[start : start + width] for start in range(0, len(text), width)]


def _commonest(states: bytes) -> int:
    counts = Counter(states)
    return max(counts, key=lambda state: (counts[state], state))
