"""Penalties for tokens that a sequence already holds."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """What each row of logits is penalised for, and how much: its place, and columns with an entry for each place.

    Neutral values, and padding, change no bit of the logits.
    """

    rows: Tensor  # [num_rows] int64, the place of each row of logits in the columns; -1 is padding
    tokens: Tensor  # [max_rows, width] int64; prompt and completion, and any ids of the vocabulary behind them
    prompt_lengths: Tensor  # [max_rows] int64
    lengths: Tensor  # [max_rows] int64, at most width where a row is named; tokens of prompt and completion
    repetition: Tensor  # [max_rows] float64, above 0; 1 is neutral; penalties are rounded to float32 before they are used
    frequency: Tensor  # [max_rows] float64; 0 is neutral
    presence: Tensor  # [max_rows] float64; 0 is neutral


def apply_penalties(logits: Tensor, inputs: PenaltyInputs) -> Tensor:
    """The logits with the penalties taken off.

    logits: [num_rows, vocab_size] float32; result: the same shape

    repetition, of any token in prompt or completion: divides a logit that is not negative and multiplies one that is.
    frequency, of tokens of the completion: taken off once for each time that the token occurs.
    presence, of tokens of the completion: taken off once.

    The first is transformers' definition, the others are OpenAI's; in this order. The counts are taken from the tokens each
    time, so no state of their own has to follow a fork, a preemption or a draw. The device is never waited for.
    """
    rows = inputs.rows.clamp(min=0)
    tokens = inputs.tokens[rows]
    positions = torch.arange(tokens.shape[1], device=logits.device)
    is_token = (positions < inputs.lengths[rows, None]) & (inputs.rows >= 0)[:, None]
    seen = _count(tokens, is_token, logits.shape[1]) > 0
    completion_counts = _count(tokens, is_token & (positions >= inputs.prompt_lengths[rows, None]), logits.shape[1])
    repetition, frequency, presence = (column[rows, None].float() for column in (inputs.repetition, inputs.frequency, inputs.presence))
    penalised = torch.where(seen, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
    return penalised - completion_counts * frequency - (completion_counts > 0) * presence


def _count(tokens: Tensor, is_counted: Tensor, vocab_size: int) -> Tensor:
    """How often each token id occurs in each row, where is_counted: [num_rows, vocab_size] int32. Whole numbers add up exactly."""
    counts = torch.zeros((len(tokens), vocab_size), dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, tokens, is_counted.int())


def apply_penalties_reference(logits: Tensor, inputs: PenaltyInputs) -> Tensor:
    """The same, token by token."""
    penalised = logits.clone()
    for row, place in enumerate(inputs.rows.tolist()):
        if place < 0:
            continue
        sequence = inputs.tokens[place, : inputs.lengths[place]].tolist()
        completion = sequence[inputs.prompt_lengths[place] :]
        repetition, frequency, presence = (column[place].float() for column in (inputs.repetition, inputs.frequency, inputs.presence))
        for token_id in set(sequence):
            logit = penalised[row, token_id]
            logit = logit * repetition if logit < 0 else logit / repetition
            count = completion.count(token_id)
            penalised[row, token_id] = logit - count * frequency - (count > 0) * presence
    return penalised
