import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from quire.kernels.penalties import PenaltyInputs, apply_penalties, apply_penalties_reference


def inputs_of(
    sequences: Sequence[tuple[Sequence[int], int]],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    width: int | None = None,
    behind: int = 0,
) -> PenaltyInputs:
    """Of (tokens, prompt length) pairs; `behind` is what stands behind the tokens of a row."""
    width = width or max(len(tokens) for tokens, _ in sequences)
    ones = torch.ones(len(sequences), dtype=torch.float64)
    return PenaltyInputs(
        rows=torch.arange(len(sequences)),
        tokens=torch.tensor([[*tokens, *[behind] * (width - len(tokens))] for tokens, _ in sequences]),
        prompt_lengths=torch.tensor([prompt_length for _, prompt_length in sequences]),
        lengths=torch.tensor([len(tokens) for tokens, _ in sequences]),
        repetition=ones * repetition,
        frequency=ones * frequency,
        presence=ones * presence,
    )


def logits_of(num_rows: int, vocab_size: int) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 4


def sequences_of(num_rows: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """Sequences in which tokens come back, some without a completion."""
    chance = random.Random(num_rows * vocab_size)
    sequences = []
    for _ in range(num_rows):
        length = chance.randrange(1, 40)
        few = [chance.randrange(vocab_size) for _ in range(5)]
        sequences.append(([chance.choice([*few, chance.randrange(vocab_size)]) for _ in range(length)], chance.randint(1, length)))
    return sequences


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("vocab_size", [1, 7, 129])
@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"), [(1.3, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.0, -0.6), (1.1, -0.2, 1.5)]
)
def test_penalties_are_those_of_the_reference(num_rows: int, vocab_size: int, repetition: float, frequency: float, presence: float) -> None:
    logits = logits_of(num_rows, vocab_size)
    sequences = sequences_of(num_rows, vocab_size)
    inputs = inputs_of(sequences, repetition=repetition, frequency=frequency, presence=presence, width=41, behind=vocab_size - 1)
    assert torch.equal(apply_penalties(logits, inputs), apply_penalties_reference(logits, inputs))


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_is_penalised_as_transformers_does_in_prompt_and_completion(penalty: float) -> None:
    for tokens, prompt_length in sequences_of(5, 129):
        logits = logits_of(1, 129)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits)
        assert torch.equal(apply_penalties(logits, inputs_of([(tokens, prompt_length)], repetition=penalty)), expected)


def test_presence_and_frequency_look_at_the_completion_alone() -> None:
    inputs = inputs_of([([1, 1, 2, 3, 3, 3, 4], 3)], frequency=0.5, presence=0.25)
    assert apply_penalties(torch.zeros(1, 6), inputs).tolist() == [[0, 0, 0, -1.75, -0.75, 0]]


def test_neutral_penalties_change_nothing_and_rows_do_not_touch_each_other() -> None:
    logits = logits_of(3, 129)
    sequences = sequences_of(3, 129)
    assert torch.equal(apply_penalties(logits, inputs_of(sequences)), logits)
    together = apply_penalties(logits, inputs_of(sequences, repetition=1.2, frequency=0.3))
    for row, sequence in enumerate(sequences):
        alone = apply_penalties(logits[row : row + 1], inputs_of([sequence], repetition=1.2, frequency=0.3))
        assert torch.equal(alone[0], together[row])


def test_rows_read_their_own_place_and_padding_is_not_penalised() -> None:
    logits = logits_of(4, 129)
    columns = inputs_of(sequences_of(3, 129), repetition=1.2, frequency=0.3)
    inputs = replace(columns, rows=torch.tensor([2, -1, 0, 2]))
    penalised = apply_penalties(logits, inputs)
    assert torch.equal(penalised, apply_penalties_reference(logits, inputs))
    assert torch.equal(penalised[1], logits[1])
    assert torch.equal(penalised[2:3], apply_penalties(logits[2:3], replace(columns, rows=torch.tensor([0]))))


def test_forbidden_tokens_stay_forbidden() -> None:
    logits = torch.full((1, 4), float("-inf"))
    inputs = inputs_of([([0, 1, 1], 1)], repetition=0.5, frequency=-2.0, presence=-2.0)
    assert torch.equal(apply_penalties(logits, inputs), logits)
