"""Which tokens a row must not draw, or is to draw more or less often: bias, allowed and bad ids, bad sequences, min_tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.common.messages import SamplingState
from quire.worker.device_tensor import device_tensor


class LogitRules:
    """The rules of rows that have any, kept as numbers on the device that are added to logits: -inf forbids a token.

    Rows without rules cost nothing. One addition serves all rows, but for allowed ids, which take another, and for bad
    sequences, which each row compares with its own tokens.
    """

    def __init__(self, *, vocab_size: int, device: str) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[int, _RowRules] = {}

    def __len__(self) -> int:
        """Rows that have rules."""
        return len(self._rows)

    def __contains__(self, row: object) -> bool:
        return row in self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def set(self, row: int, state: SamplingState, *, prompt_len: int) -> None:
        """Give a free row the rules of its state, whose ids are in the vocabulary."""
        has_stops = state.min_tokens > 0 and len(state.stop_ids) > 0
        if not (state.bias or state.bad_ids or has_stops or state.allowed_ids is not None or state.bad_sequences):
            return
        self._rows[row] = _RowRules(
            additions=self._additions([*state.bias, *_forbidding(state.bad_ids)]),
            stops=self._additions(_forbidding(state.stop_ids)),
            stops_end=prompt_len + state.min_tokens,
            allowed=None if state.allowed_ids is None else self._allowed(state.allowed_ids),
            bad_sequences=self._bad_sequences(state.bad_sequences) if state.bad_sequences else None,
        )

    def fork(self, source: int, target: int) -> None:
        """Give a free row the rules of another; rules never change, so they are shared."""
        if source in self._rows:
            self._rows[target] = self._rows[source]

    def apply(self, logits: Tensor, rows: Sequence[int], *, tokens: Tensor, lengths: Sequence[int]) -> list[int]:
        """Apply each row's rules to its logits, in place; returns the samples that have rules.

        logits:  [num_samples, vocab_size] float32
        rows:    the row of each sample
        tokens:  [max_rows, max_tokens_per_row] int64, the tokens of all rows
        lengths: how many tokens each sample's row has
        """
        ruled = [(index, self._rows[row]) for index, row in enumerate(rows) if row in self._rows]
        additions = [(index, rules.additions) for index, rules in ruled]
        additions += [(index, rules.stops) for index, rules in ruled if lengths[index] < rules.stops_end]
        counts = [len(addition.ids) for _, addition in additions]
        if sum(counts):
            samples = self._tensor(index for index, _ in additions).repeat_interleave(self._tensor(counts), output_size=sum(counts))
            ids = torch.cat([addition.ids for _, addition in additions])
            logits.index_put_((samples, ids), torch.cat([addition.values for _, addition in additions]), accumulate=True)
        allowed = [(index, rules.allowed) for index, rules in ruled if rules.allowed is not None]
        if allowed:
            logits[self._tensor(index for index, _ in allowed)] += torch.stack([additions for _, additions in allowed])
        for index, rules in ruled:
            if rules.bad_sequences is not None:
                bad = rules.bad_sequences
                logits[index].index_add_(0, bad.last_ids, bad.additions(tokens[rows[index], : lengths[index]]))
        return [index for index, _ in ruled]

    def _additions(self, pairs: Sequence[tuple[int, float]]) -> "_Additions":
        values = device_tensor([value for _, value in pairs], device=self._device, dtype=torch.float32)
        return _Additions(self._tensor(token_id for token_id, _ in pairs), values)

    def _allowed(self, token_ids: Sequence[int]) -> Tensor:
        additions = torch.full((self._vocab_size,), float("-inf"), device=self._device)
        additions[self._tensor(token_ids)] = 0.0
        return additions

    def _bad_sequences(self, sequences: Sequence[Sequence[int]]) -> "_BadSequences":
        longest = max(len(sequence) for sequence in sequences) - 1
        prefixes = [token_id for sequence in sequences for token_id in [-1] * (longest + 1 - len(sequence)) + list(sequence[:-1])]
        return _BadSequences(
            prefixes=self._tensor(prefixes).view(len(sequences), longest),
            prefix_lengths=self._tensor(len(sequence) - 1 for sequence in sequences),
            last_ids=self._tensor(sequence[-1] for sequence in sequences),
        )

    def _tensor(self, values: Iterable[int]) -> Tensor:
        return device_tensor(list(values), device=self._device)


@dataclass(frozen=True, slots=True)
class _Additions:
    """Numbers to add to the logits of some tokens; several for one token add up."""

    ids: Tensor  # [n] int64
    values: Tensor  # [n] float32


@dataclass(frozen=True, slots=True)
class _BadSequences:
    """Sequences of tokens whose last one is forbidden behind the others."""

    prefixes: Tensor  # [n, longest] int64, right-aligned, -1 in front; a prefix may be empty
    prefix_lengths: Tensor  # [n] int64
    last_ids: Tensor  # [n] int64

    def additions(self, tokens: Tensor) -> Tensor:
        """What to add to the logits of last_ids behind these tokens: [n] float32, -inf or 0.

        tokens: [num_tokens] int64, the whole sequence so far
        """
        width = min(self.prefixes.shape[1], len(tokens))
        ends = self.prefixes[:, self.prefixes.shape[1] - width :]
        matches = ((ends == tokens[len(tokens) - width :]) | (ends < 0)).all(dim=1) & (self.prefix_lengths <= width)
        return torch.zeros(len(matches), device=tokens.device).masked_fill_(matches, float("-inf"))


@dataclass(frozen=True, slots=True)
class _RowRules:
    additions: _Additions  # bias and bad ids
    stops: _Additions  # stop ids, while the row is shorter than stops_end
    stops_end: int  # tokens of prompt and completion
    allowed: Tensor | None  # [vocab_size] float32, 0 or -inf
    bad_sequences: _BadSequences | None


def _forbidding(token_ids: Sequence[int]) -> list[tuple[int, float]]:
    return [(token_id, float("-inf")) for token_id in token_ids]
