"""Beam search by plans, against transformers' own: the ranks give candidates, the least of a scheduler chooses among them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from plan_driver import GREEDY, MakeRunner, PlanDriver
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.common.errors import InternalError
from quire.common.messages import Chunk, SamplingState, StepResult

PROMPT = [17, 900, 3, 77, 2048, 5, 6]
MAX_TOKENS = 11
NUM_BEAMS = 4
PAD_ID = 1
COMPANION = 9  # the row of a greedy sequence that decodes beside the beams


@dataclass
class Beam:
    row: int
    tokens: list[int]  # of the completion
    score: float


class BeamSearch:
    """transformers' beam search of one prompt, as plans. Rows and blocks are shared, copied and given back as the beams fork and end."""

    def __init__(self, driver: PlanDriver, *, eos_ids: Sequence[int], early_stopping: bool | str, length_penalty: float) -> None:
        self.driver = driver
        self.companion_tokens: list[int] = []
        self._eos_ids = eos_ids
        self._early_stopping = early_stopping
        self._length_penalty = length_penalty
        self._num_candidates = max(2, 1 + len(eos_ids)) * NUM_BEAMS
        self._tables: dict[int, list[int]] = {}
        self._finished: list[tuple[float, list[int]]] = []

    def run(self, state: SamplingState) -> list[list[int]]:
        """The NUM_BEAMS best completions, best first."""
        state = msgspec.structs.replace(state, num_beam_candidates=self._num_candidates)
        companion = self.driver.add(COMPANION, PROMPT, room=MAX_TOKENS)
        added = self.driver.add(0, PROMPT, state)
        self._tables[0] = list(added.block_ids)
        result = self.driver.step(
            add_rows=(companion, added),
            hold_rows=(0,),
            chunks=(Chunk(COMPANION, 0, len(PROMPT), True), Chunk(0, 0, len(PROMPT), True)),
            samples=((0, 0), (COMPANION, COMPANION)),
        )
        beams = [Beam(0, [], 0.0)]
        can_improve = True
        while True:
            chosen = self._choose(beams, result, can_improve=can_improve)
            can_improve = can_improve and self._can_improve(chosen)
            is_full = len(self._finished) == NUM_BEAMS and self._early_stopping is True
            if not can_improve or is_full or len(chosen[0].tokens) == MAX_TOKENS:
                break
            result, beams = self._advance(chosen)
        self.driver.step(remove_rows=(COMPANION, *self._tables))
        for row in list(self._tables):
            self._release(row)
        self.driver.free_blocks += companion.block_ids
        return [tokens for _, tokens in self._finished]

    def _choose(self, beams: Sequence[Beam], result: StepResult, *, can_improve: bool) -> list[Beam]:
        """The beams to go on with, each still in its parent's row; those that end are noted."""
        assert result.counts == (0,) * len(beams) + (1,)
        self.companion_tokens += result.token_ids
        assert [index for index, _ in result.beam_candidates] == list(range(len(beams)))
        for _, candidates in result.beam_candidates:
            assert len(candidates) == self._num_candidates
            assert list(candidates) == sorted(candidates, key=lambda pair: -pair[1])
        continued = [
            Beam(beam.row, [*beam.tokens, token_id], beam.score + logprob)
            for beam, (_, candidates) in zip(beams, result.beam_candidates, strict=True)
            for token_id, logprob in candidates
        ]
        best = sorted(continued, key=lambda beam: -beam.score)[: self._num_candidates]
        ended = [beam for beam in best[:NUM_BEAMS] if self._has_ended(beam)]
        if can_improve and not (len(self._finished) == NUM_BEAMS and self._early_stopping is True):
            self._finished += [(beam.score / len(beam.tokens) ** self._length_penalty, beam.tokens) for beam in ended]
            self._finished = sorted(self._finished, key=lambda pair: -pair[0])[:NUM_BEAMS]
        return sorted(best, key=lambda beam: (self._has_ended(beam), -beam.score))[:NUM_BEAMS]

    def _has_ended(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self._eos_ids or len(beam.tokens) == MAX_TOKENS

    def _can_improve(self, beams: Sequence[Beam]) -> bool:
        if len(self._finished) < NUM_BEAMS:
            return True
        length = MAX_TOKENS if self._early_stopping == "never" and self._length_penalty > 0 else len(beams[0].tokens)
        best_possible: float = beams[0].score / length**self._length_penalty
        return best_possible > self._finished[-1][0]

    def _advance(self, chosen: Sequence[Beam]) -> tuple[StepResult, list[Beam]]:
        """Fork, append and compute: each parent's first child keeps its row, the others take rows that are free."""
        parents = {beam.row for beam in chosen}
        removed = sorted(set(self._tables) - parents)
        for row in removed:
            self._release(row)
        free_rows = [row for row in range(NUM_BEAMS) if row not in parents]
        placed: list[Beam] = []
        forks: list[tuple[int, int, int]] = []
        for beam in chosen:
            row = beam.row
            if any(other.row == row for other in placed):
                row = free_rows.pop(0)
                forks.append((beam.row, row, len(forks) + 1))
                self._tables[row] = list(self._tables[beam.row])
            placed.append(Beam(row, beam.tokens, beam.score))
        position = len(PROMPT) + len(chosen[0].tokens) - 1  # of the token that each beam gets
        rows = tuple(beam.row for beam in placed)
        fields: dict[str, Any] = {}
        if position % self.driver.block_size == 0:
            block_ids = self.driver.blocks(len(rows) * self.driver.block_size)
            for row, block_id in zip(rows, block_ids, strict=True):
                self._tables[row].append(block_id)
            fields = {"grow_rows": rows, "grow_block_ids": block_ids}
        else:
            fields = {"cow": tuple(self._copies(rows))}
        result = self.driver.step(
            remove_rows=tuple(removed),
            forks=tuple(forks),
            append_rows=rows,
            append_ids=tuple(beam.tokens[-1] for beam in placed),
            hold_rows=tuple(row for _, row, _ in forks),
            chunks=tuple(Chunk(row, position, 1, True) for row in rows),
            samples=tuple((row, row) for row in rows),
            **fields,
        )
        return result, placed

    def _copies(self, rows: Sequence[int]) -> list[tuple[int, int, int]]:
        """Copies of last blocks that several rows hold, so that each can write into its own; the last holder keeps it."""
        copies = []
        for row in rows:
            shared = self._tables[row][-1]
            if sum(table[-1] == shared for table in self._tables.values()) > 1:
                (target,) = self.driver.blocks(1)
                copies.append((row, shared, target))
                self._tables[row][-1] = target
        return copies

    def _release(self, row: int) -> None:
        holders = Counter(block_id for table in self._tables.values() for block_id in table)
        self.driver.free_blocks += [block_id for block_id in self._tables.pop(row) if holders[block_id] == 1]


RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "rules": {"repetition_penalty": 1.3, "bad_words_ids": [[40], [77, 900]], "sequence_bias": {(5,): 1.5}, "min_new_tokens": 3},
}


@pytest.mark.parametrize("rules", list(RULES))
@pytest.mark.parametrize(
    ("num_eos", "early_stopping", "length_penalty"),
    [(0, False, 1.0), (1, False, 1.0), (1, True, 1.0), (2, "never", 0.5), (2, False, -0.5), (1, "never", 0.0)],
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_beams_are_those_of_transformers(
    make_runner: MakeRunner,
    tiny_folder: Path,
    rules: str,
    num_eos: int,
    early_stopping: bool | str,
    length_penalty: float,
    block_size: int,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, use_safetensors=True).eval()

    def generate(eos_ids: Sequence[int]) -> list[list[int]]:
        config = GenerationConfig(
            do_sample=False,
            num_beams=NUM_BEAMS,
            num_return_sequences=NUM_BEAMS,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=PAD_ID,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
            **{**RULES[rules], **({} if eos_ids else {"min_new_tokens": None})},
        )
        return [output[len(PROMPT) :] for output in model.generate(torch.tensor([PROMPT]), generation_config=config).tolist()]

    # Ends that the search meets: tokens of its own best beams.
    free = generate([])
    eos_ids = [free[0][4], free[1][6]][:num_eos]
    expected = generate(eos_ids)
    state = GREEDY
    if RULES[rules]:
        state = SamplingState(
            temperature=0.0,
            repetition_penalty=1.3,
            bad_sequences=((40,), (77, 900)),
            bias=((5, 1.5),),
            min_tokens=3,
            stop_ids=tuple(eos_ids),
        )
    driver = PlanDriver(make_runner(block_size=block_size))
    num_free = len(driver.free_blocks)
    search = BeamSearch(driver, eos_ids=eos_ids, early_stopping=early_stopping, length_penalty=length_penalty)
    actual = search.run(state)
    width = max(map(len, actual))
    assert [tokens + [PAD_ID] * (width - len(tokens)) for tokens in actual] == expected
    assert len(set(driver.free_blocks)) == num_free, "blocks are lost or given back twice"
    (alone,) = PlanDriver(make_runner()).generate([PROMPT], num_tokens=len(search.companion_tokens), chunk=100)
    assert search.companion_tokens == alone


def test_a_beam_has_no_more_candidates_than_its_rules_allow(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    states = [SamplingState(num_beam_candidates=8, allowed_ids=(3, 7, 11)), SamplingState(num_beam_candidates=2, num_logprobs=3)]
    adds = tuple(driver.add(row, PROMPT, state) for row, state in enumerate(states))
    result = driver.step(add_rows=adds, chunks=tuple(Chunk(row, 0, len(PROMPT), True) for row in (0, 1)), samples=((1, 1), (0, 0)))
    assert (result.counts, result.token_ids, result.logprobs) == ((0, 0), (), ())
    (first, two), (second, three) = result.beam_candidates
    assert (first, second, len(two)) == (0, 1, 2)
    assert {token_id for token_id, _ in three} == {3, 7, 11}


def test_a_beam_never_decodes_by_itself(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    added = driver.add(0, PROMPT, SamplingState(num_beam_candidates=2), room=4)
    driver.step(add_rows=(added,), chunks=(Chunk(0, 0, len(PROMPT), True),), samples=((0, 0),))
    assert driver.step().counts == ()


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        ((0,), (4096,), "row 0 gets token 4096; ids are below 4096"),
        ((3,), (1,), "row 3 is not in the batch"),
        ((0, 0, 0), (1, 2, 3), "row 0 would pass 9 tokens"),
    ],
)
def test_a_token_that_cannot_be_appended_is_an_error(
    make_runner: MakeRunner, rows: tuple[int, ...], ids: tuple[int, ...], message: str
) -> None:
    driver = PlanDriver(make_runner(max_model_len=len(PROMPT) + 2))
    driver.step(add_rows=(driver.add(0, PROMPT),))
    with pytest.raises(InternalError, match=message):
        driver.step(append_rows=rows, append_ids=ids)


def test_several_tokens_may_be_appended_to_a_row_at_once(make_runner: MakeRunner) -> None:
    """The scheduler's tokens come in its order, and are computed as a prompt's are."""
    driver = PlanDriver(make_runner())
    whole = driver.generate([PROMPT], num_tokens=5, chunk=100)[0]
    driver.step(add_rows=(driver.add(4, PROMPT, room=5),), chunks=(Chunk(4, 0, 6, False),))
    result = driver.step(append_rows=(4, 4, 4), append_ids=tuple(whole[:3]), chunks=(Chunk(4, 6, 4, True),), samples=((4, 4),))
    assert [*result.token_ids, *driver.step().token_ids] == whole[3:]
