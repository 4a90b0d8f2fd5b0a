"""How many blocks a request may come to hold: the formula of admission beside small lives, lived block by block."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_block_pool import SlowBlockPool
from story import Story

from quire.cluster.scheduler.request import most_blocks
from quire.common.messages import Finished, Rejected

SMALL: dict[str, Any] = {
    "num_prompt_tokens": st.integers(1, 7),
    "max_tokens": st.integers(1, 6),
    "num_sequences": st.integers(1, 3),
    "block_size": st.integers(1, 4),
}


class Life:
    """One request's blocks from prompt to end. Each sequence writes token after token; `num_held` is what it holds now."""

    def __init__(self, *, num_prompt_tokens: int, num_sequences: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_prompt_tokens = num_prompt_tokens
        self.pool = SlowBlockPool(1000)
        prompt = self._allocate(math.ceil(num_prompt_tokens / block_size))
        self.pool.fork(prompt * (num_sequences - 1))
        self.tables = [list(prompt) for _ in range(num_sequences)]
        self.lengths = [num_prompt_tokens] * num_sequences
        self.most_held = self.num_held

    @property
    def num_held(self) -> int:
        return sum(block.num_holders > 0 for block in self.pool.blocks)

    def write(self, index: int) -> None:
        """One more token, in a block of the sequence's own."""
        table, place = self.tables[index], self.lengths[index] // self.block_size
        if place == len(table):
            table += self._allocate(1)
        elif self.pool.blocks[table[place]].num_holders > 1:
            self.pool.free([table[place]])
            table[place] = self._allocate(1)[0]
        self.lengths[index] += 1
        self.most_held = max(self.most_held, self.num_held)

    def recompute(self) -> None:
        """It lost its blocks: its sequences share the full blocks before the prompt's last token and compute the rest themselves."""
        for table in self.tables:
            self.pool.free(table)
        shared = self._allocate((self.num_prompt_tokens - 1) // self.block_size)
        self.pool.fork(shared * (len(self.tables) - 1))
        self.tables = [shared + self._allocate(math.ceil(length / self.block_size) - len(shared)) for length in self.lengths]
        self.most_held = max(self.most_held, self.num_held)

    def _allocate(self, num_blocks: int) -> list[int]:
        taken = self.pool.allocate(num_blocks)
        assert taken is not None
        return taken


@given(**SMALL, data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_life_takes_more_than_most_blocks(
    num_prompt_tokens: int, max_tokens: int, num_sequences: int, block_size: int, data: st.DataObject
) -> None:
    life = Life(num_prompt_tokens=num_prompt_tokens, num_sequences=num_sequences, block_size=block_size)
    writers = data.draw(st.permutations([index for index in range(num_sequences) for _ in range(max_tokens)]))
    dies_at = data.draw(st.sets(st.integers(0, len(writers)), max_size=2))
    for step, index in enumerate(writers):
        # Sequences that have no token of their own yet are forked anew instead.
        if step in dies_at and min(life.lengths) > num_prompt_tokens:
            life.recompute()
        life.write(index)
    most = most_blocks(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, num_sequences=num_sequences, block_size=block_size)
    assert life.most_held <= most


@given(**SMALL)
@settings(max_examples=300, deadline=None)
def test_a_life_with_a_recompute_at_its_end_takes_all_of_most_blocks(
    num_prompt_tokens: int, max_tokens: int, num_sequences: int, block_size: int
) -> None:
    life = Life(num_prompt_tokens=num_prompt_tokens, num_sequences=num_sequences, block_size=block_size)
    for index in range(num_sequences):
        for _ in range(max_tokens):
            life.write(index)
    life.recompute()
    most = most_blocks(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, num_sequences=num_sequences, block_size=block_size)
    assert life.most_held == most


@given(**SMALL, as_beams=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_pool_of_most_blocks_takes_a_request_to_its_end_and_a_smaller_one_refuses_it(
    num_prompt_tokens: int, max_tokens: int, num_sequences: int, block_size: int, as_beams: bool
) -> None:
    most = most_blocks(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, num_sequences=num_sequences, block_size=block_size)
    kind: dict[str, Any] = {"num_beams": num_sequences} if as_beams else {"n": num_sequences}
    story = Story(num_blocks=most, block_size=block_size)
    story.submit("fits", range(num_prompt_tokens), max_tokens=max_tokens, **kind)
    story.run()
    assert isinstance(story.ends["fits"], Finished)
    if most > 1:
        story = Story(num_blocks=most - 1, block_size=block_size)
        story.submit("too large", range(num_prompt_tokens), max_tokens=max_tokens, **kind)
        assert isinstance(story.ends["too large"], Rejected)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "num_sequences", "num_blocks"),
    [
        (7, 4, 1, 3),  # 11 tokens in blocks of 4
        (8, 4, 1, 3),
        (8, 4, 2, 5),  # the prompt's last token is computed by each, after a recompute: one block is shared
        (9, 4, 2, 6),
        (1, 1, 3, 3),
    ],
)
def test_the_arithmetic_of_most_blocks(num_prompt_tokens: int, max_tokens: int, num_sequences: int, num_blocks: int) -> None:
    most = most_blocks(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, num_sequences=num_sequences, block_size=4)
    assert most == num_blocks
