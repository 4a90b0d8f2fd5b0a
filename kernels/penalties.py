"""Penalties for tokens that a sequence already holds."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """What each row of logits is penalised for, and how much; neutral values change no bit of the logits."""

    tokens: Tensor  # [num_rows, width] int64; prompt and completion, and any ids behind them
    prompt_lengths: Tensor  # [num_rows] int64
    lengths: Tensor  # [num_rows] int64, at most width; tokens of prompt and completion
    repetition: Tensor  # [num_rows] float32, above 0; 1 is neutral
    frequency: Tensor  # [num_rows] float32; 0 is neutral
    presence: Tensor  # [num_rows] float32; 0 is neutral


def apply_penalties(logits: Tensor, inputs: PenaltyInputs) -> Tensor:
    """The logits with the penalties taken off.

    logits: [num_rows, vocab_size] float32; result: the same shape

    repetition, of any token in prompt or completion: divides a logit that is not negative and multiplies one that is.
    frequency, of tokens of the completion: taken off once for each time that the token occurs.
    presence, of tokens of the completion: taken off once.

    The first is transformers' definition, the others are OpenAI's; in this order. The counts are taken from the tokens each
    time, so no state of their own has to follow a fork, a preemption or a draw.
    """
    positions = torch.arange(inputs.tokens.shape[1], device=logits.device)
    is_token = positions < inputs.lengths[:, None]
    seen = _count(inputs.tokens, is_token, logits.shape[1]) > 0
    completion_counts = _count(inputs.tokens, is_token & (positions >= inputs.prompt_lengths[:, None]), logits.shape[1])
    repetition = inputs.repetition[:, None]
    penalised = torch.where(seen, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
    return penalised - completion_counts * inputs.frequency[:, None] - (completion_counts > 0) * inputs.presence[:, None]


def _count(tokens: Tensor, is_counted: Tensor, vocab_size: int) -> Tensor:
    """How often each token id occurs in each row, where is_counted: [num_rows, vocab_size] int32. Whole numbers add up exactly."""
    counts = torch.zeros((len(tokens), vocab_size), dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, tokens, is_counted.int())


def apply_penalties_reference(logits: Tensor, inputs: PenaltyInputs) -> Tensor:
    """The same, token by token."""
    penalised = logits.clone()
    for row in range(len(logits)):
        sequence = inputs.tokens[row, : inputs.lengths[row]].tolist()
        completion = sequence[inputs.prompt_lengths[row] :]
        for token_id in set(sequence):
            logit = penalised[row, token_id]
            logit = logit * inputs.repetition[row] if logit < 0 else logit / inputs.repetition[row]
            count = completion.count(token_id)
            penalised[row, token_id] = logit - count * inputs.frequency[row] - (count > 0) * inputs.presence[row]
    return penalised
