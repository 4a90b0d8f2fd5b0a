"""The sampling state of every row, on the device, with the host's knowledge of which rows ask for what is rare."""

from collections.abc import Container, Sequence
from typing import Final

import torch
from torch import Tensor

from quire.common.errors import InternalError, NotSupported
from quire.common.messages import SamplingState
from quire.kernels.sample import SamplingInputs
from quire.worker.batch_memory import BatchMemory
from quire.worker.device_tensor import device_tensor
from quire.worker.logit_rules import LogitRules

# Columns of numbers, an entry per row, of 8 bytes each as BatchMemory wants them. What is float32 in the sampler is rounded there.
COLUMNS: Final = {
    "temperature": torch.float64,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "typical_p": torch.float64,
    "seed": torch.int64,
    "sequence_index": torch.int64,
    "repetition_penalty": torch.float64,
    "frequency_penalty": torch.float64,
    "presence_penalty": torch.float64,
}


class SamplingRows:
    """SamplingState of the rows of a batch; the numbers of free rows mean nothing."""

    # Invariant: a row is in `penalised`, `typical`, `num_logprobs`, `num_beam_candidates` and `rules` only while the batch holds it.

    def __init__(self, memory: BatchMemory, *, vocab_size: int, device: str) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._memory = memory
        self.columns = {name: memory[name] for name in COLUMNS}
        self.rules = LogitRules(vocab_size=vocab_size, device=device)
        self.penalised: set[int] = set()  # rows with any penalty
        self.typical: set[int] = set()  # rows with typical_p
        self.num_logprobs: dict[int, int] = {}  # of most likely tokens beside the drawn one, for rows that draw and ask
        self.num_beam_candidates: dict[int, int] = {}  # for beams, which draw nothing

    @property
    def has_special(self) -> bool:
        """Whether any row asks for more than a draw by temperature, top-k, top-p and min-p."""
        return bool(self.penalised or self.typical or self.num_logprobs or self.num_beam_candidates or len(self.rules))

    def is_special(self, row: int) -> bool:
        """Whether this row is one of those."""
        rare = (self.penalised, self.typical, self.num_logprobs, self.num_beam_candidates, self.rules)
        return any(row in rows for rows in rare)

    def clear(self) -> None:
        """Forget all rows."""
        self.rules.clear()
        self.penalised.clear()
        self.typical.clear()
        self.num_logprobs.clear()
        self.num_beam_candidates.clear()

    def remove(self, row: int) -> None:
        self.rules.remove(row)
        self.penalised.discard(row)
        self.typical.discard(row)
        self.num_logprobs.pop(row, None)
        self.num_beam_candidates.pop(row, None)

    def set(self, row: int, state: SamplingState, *, prompt_len: int) -> None:
        """Give a free row its state; prompt_len is tokens of its prompt.

        Raises:
            NotSupported: the state asks for what this rank cannot do, by field name.
            InternalError: the state names ids that the vocabulary does not have.
        """
        _refuse_unsupported(state)
        self._check_ids(row, state)
        self.rules.set(row, state, prompt_len=prompt_len)
        if (state.repetition_penalty, state.frequency_penalty, state.presence_penalty) != (1, 0, 0):
            self.penalised.add(row)
        if state.typical_p < 1:
            self.typical.add(row)
        if state.num_beam_candidates > 0:
            self.num_beam_candidates[row] = state.num_beam_candidates
        elif state.num_logprobs is not None:
            self.num_logprobs[row] = state.num_logprobs
        for name in COLUMNS:
            self._memory.write(name, row, (_signed(state.seed) if name == "seed" else getattr(state, name),))

    def fork(self, sources: Sequence[int], targets: Sequence[int], sequence_indices: Sequence[int]) -> None:
        """Give free target rows the state of their sources, and a sequence_index of their own. No source is also a target."""
        for source, target in zip(sources, targets, strict=True):
            self.rules.fork(source, target)
            for rows in (self.penalised, self.typical):
                if source in rows:
                    rows.add(target)
            for counts in (self.num_logprobs, self.num_beam_candidates):
                if source in counts:
                    counts[target] = counts[source]
        origins, copies = (device_tensor(rows, device=self._device) for rows in (sources, targets))
        for column in self.columns.values():
            column[copies] = column[origins]
        for target, sequence_index in zip(targets, sequence_indices, strict=True):
            self._memory.write("sequence_index", target, (sequence_index,))

    def inputs(self, rows: Tensor, *, lengths: Tensor) -> SamplingInputs:
        """How to draw for these rows, each at the place behind its last token.

        rows: [n] int64, -1 for padding; lengths: [max_rows] int64
        """
        names = [name for name in SamplingInputs.__slots__ if name not in ("rows", "position")]
        return SamplingInputs(rows=rows, position=lengths, **{name: self.columns[name] for name in names})

    def check(self, rows: Container[int]) -> None:
        """Assert that nothing is remembered of rows other than these."""
        for remembered in (self.penalised, self.typical, self.num_logprobs, self.num_beam_candidates, self.rules):
            assert all(row in rows for row in remembered), (remembered, rows)

    def _check_ids(self, row: int, state: SamplingState) -> None:
        lists = {
            "stop_ids": state.stop_ids,
            "bias": [token_id for token_id, _ in state.bias],
            "allowed_ids": state.allowed_ids or (),
            "bad_ids": state.bad_ids,
            "bad_sequences": [token_id for sequence in state.bad_sequences for token_id in sequence],
        }
        for name, ids in lists.items():
            if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise InternalError(f"{name} of row {row} names ids from {min(ids)} to {max(ids)}; ids are below {self._vocab_size}")
        if not all(state.bad_sequences):
            raise InternalError(f"bad_sequences of row {row} has an empty sequence")


def _refuse_unsupported(state: SamplingState) -> None:
    if state.grammar_id is not None:
        raise NotSupported(f"SamplingState.grammar_id = {state.grammar_id!r} is not supported by this rank yet")


def _signed(seed: int) -> int:
    """The int64 of an unsigned seed's bits."""
    return seed - 2**64 if seed >= 2**63 else seed
