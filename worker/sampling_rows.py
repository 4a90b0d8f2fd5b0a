"""The sampling state of every row, on the device, and the step from logits to tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.common.errors import NotSupported
from quire.common.messages import DrawPurpose, RowErrorCode, SamplingState
from quire.kernels.sample import SamplingInputs, broken_rows, sample

# Fields that no code here honours yet, and the value that asks for nothing.
_UNSUPPORTED = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "bias": (),
    "allowed_ids": None,
    "bad_ids": (),
    "num_logprobs": None,
    "num_prompt_logprobs": None,
    "num_beam_candidates": 0,
    "grammar_id": None,
    "typical_p": 1.0,
    "bad_sequences": (),
}


def refuse_unsupported(state: SamplingState) -> None:
    """Raises NotSupported, by field name, for a state that asks for what this rank cannot do."""
    for name, neutral in _UNSUPPORTED.items():
        if getattr(state, name) != neutral:
            raise NotSupported(f"SamplingState.{name} = {getattr(state, name)!r} is not supported by this rank yet")


class SamplingRows:
    """Columns of SamplingState, an entry per row of the batch; entries of free rows mean nothing."""

    def __init__(self, *, max_rows: int, device: str) -> None:
        self._temperature = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._top_k = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._top_p = torch.ones(max_rows, dtype=torch.float64, device=device)
        self._min_p = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._seed = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._sequence_index = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def set(self, row: int, state: SamplingState) -> None:
        self._temperature[row] = state.temperature
        self._top_k[row] = state.top_k
        self._top_p[row] = state.top_p
        self._min_p[row] = state.min_p
        self._seed[row] = state.seed - 2**64 if state.seed >= 2**63 else state.seed
        self._sequence_index[row] = state.sequence_index

    def sample(
        self, logits: Tensor, rows: Tensor, *, positions: Tensor, forbidden: Sequence[tuple[int, Sequence[int]]]
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Draw one token per sample.

        logits:    [num_samples, vocab_size] float32; written to where tokens are forbidden
        rows:      [num_samples] int64, whose state each sample uses
        positions: [num_samples] int64, the place in the sequence that each drawn token takes
        forbidden: (sample, token ids that it must not draw)
        result:    [num_samples] int64, 0 where the draw failed; and (sample, RowErrorCode) of those
        """
        errors = dict.fromkeys(broken_rows(logits).nonzero()[:, 0].tolist(), RowErrorCode.NOT_FINITE)
        for index, token_ids in forbidden:
            logits[index, list(token_ids)] = float("-inf")
            if index not in errors and bool(broken_rows(logits[index : index + 1])):
                errors[index] = RowErrorCode.NO_ALLOWED_TOKEN
        inputs = SamplingInputs(
            temperature=self._temperature[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            seed=self._seed[rows],
            sequence_index=self._sequence_index[rows],
            position=positions,
        )
        token_ids_drawn = sample(logits, inputs, purpose=DrawPurpose.TARGET)
        if errors:
            token_ids_drawn[list(errors)] = 0
        return token_ids_drawn, sorted((index, int(code)) for index, code in errors.items())
