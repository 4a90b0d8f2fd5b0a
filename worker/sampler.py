"""From logits to tokens, log probabilities and beam candidates, by the sampling state of the rows that ask for them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.common.messages import DrawPurpose, Logprobs, RowErrorCode
from quire.kernels.logprobs import token_logprobs
from quire.kernels.penalties import PenaltyInputs, apply_penalties
from quire.kernels.sample import broken_rows, sample
from quire.worker.batch import Batch
from quire.worker.device_tensor import device_tensor
from quire.worker.host_copy import HostCopy
from quire.worker.logprobs import LogprobColumns


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the samples of a step gave, in their order."""

    token_ids: Sequence[int]  # 0 for a failed draw and for a beam
    drawing: Sequence[int]  # the samples that draw: all but beams
    errors: Mapping[int, RowErrorCode]  # of the samples that failed
    logprobs: tuple[tuple[int, Logprobs], ...] = ()  # (sample, of its token), for rows that ask
    beam_candidates: tuple[tuple[int, tuple[tuple[int, float], ...]], ...] = ()  # (sample, its candidates), of beams


class Draw:
    """The samples of a step, computed on the device and on their way to the host."""

    def __init__(self, batch: Batch, logits: Tensor, sampled: Sequence[int]) -> None:
        """Choose for each sample as its row's state says. The batch does not change, and the host does not wait.

        logits:  [num_samples, vocab_size] float32; overwritten
        sampled: the row of each sample, distinct

        Log probabilities are those of the model, before any rule, penalty or temperature. A beam's candidates come with what
        transformers' beam search adds up: rules and penalties act on log probabilities there, not on logits, and nothing makes
        the result sum to 1 again. Temperature and truncation are for draws, so beams know none.
        """
        state = batch.sampling
        self._batch = batch
        self._sampled = sampled
        failed = broken_rows(logits)
        self._broken = HostCopy(failed)
        beams = _groups(sampled, state.num_beam_candidates)
        asking = _groups(sampled, state.num_logprobs)
        raw_logits = {num_top: logits[self._indices(samples)] for num_top, samples in asking.items()}  # copies: logits are overwritten
        for samples in beams.values():
            indices = self._indices(samples)
            logits[indices] = logits[indices].log_softmax(dim=-1)
        self._changed = _apply_rules_and_penalties(batch, logits, sampled)
        self._peaks: HostCopy | None = None
        if self._changed:
            changed = self._indices(self._changed)
            peaks = logits[changed].amax(dim=-1)
            failed = failed.index_put((changed,), failed[changed] | ~peaks.isfinite())
            self._peaks = HostCopy(peaks)

        self.drawing: Sequence[int] = range(len(sampled))
        if beams:
            beam_samples = {sample for samples in beams.values() for sample in samples}
            self.drawing = [sample for sample in self.drawing if sample not in beam_samples]
        # [num_samples] int64, on the device
        self.token_ids = self._draw(batch, logits, sampled).masked_fill(failed, 0)
        self._token_ids = HostCopy(self.token_ids)
        self._logprobs = [
            (samples, LogprobColumns(token_logprobs(raw_logits[num_top], self.token_ids[self._indices(samples)], num_top=num_top)))
            for num_top, samples in asking.items()
        ]
        self._candidates = []
        for num_candidates, samples in beams.items():
            values, ids = logits[self._indices(samples)].topk(min(num_candidates, logits.shape[1]), dim=-1)
            self._candidates.append((samples, HostCopy(values), HostCopy(ids)))

    def append(self) -> None:
        """Append what was drawn to the rows of the samples that draw."""
        rows = [self._sampled[index] for index in self.drawing]
        self._batch.append_drawn(rows, self.token_ids if len(rows) == len(self._sampled) else self.token_ids[self._indices(self.drawing)])

    def read(self) -> Sampled:
        """What came of it, once the step has ended."""
        errors = {index: RowErrorCode.NOT_FINITE for index, is_broken in enumerate(self._broken.tolist()) if is_broken}
        if self._peaks is not None:
            for index, peak in zip(self._changed, self._peaks.tolist(), strict=True):
                if not math.isfinite(peak):
                    errors.setdefault(index, RowErrorCode.NO_ALLOWED_TOKEN if peak == -math.inf else RowErrorCode.NOT_FINITE)
        return Sampled(
            token_ids=self._token_ids.tolist(),
            drawing=self.drawing,
            errors=errors,
            logprobs=self._read_logprobs(unless=errors),
            beam_candidates=self._read_candidates(unless=errors),
        )

    def _indices(self, samples: Sequence[int]) -> Tensor:
        return device_tensor(samples, device=self._batch.device)

    def _draw(self, batch: Batch, logits: Tensor, sampled: Sequence[int]) -> Tensor:
        """A token for each sample that draws, 0 for the others: [num_samples] int64."""
        rows = self._indices([sampled[index] for index in self.drawing])
        inputs = batch.sampling.inputs(rows, lengths=batch.lengths)
        has_typical = not batch.sampling.typical.isdisjoint(sampled)
        if len(self.drawing) == len(sampled):
            return sample(logits, inputs, purpose=DrawPurpose.TARGET, has_typical=has_typical)
        token_ids = torch.zeros(len(sampled), dtype=torch.int64, device=logits.device)
        if self.drawing:
            indices = self._indices(self.drawing)
            token_ids[indices] = sample(logits[indices], inputs, purpose=DrawPurpose.TARGET, has_typical=has_typical)
        return token_ids

    def _read_logprobs(self, *, unless: Mapping[int, RowErrorCode]) -> tuple[tuple[int, Logprobs], ...]:
        found: dict[int, Logprobs] = {}
        for samples, group in self._logprobs:
            of_group = group.read()
            columns = zip(of_group.logprobs, of_group.ranks, of_group.top_ids, of_group.top_logprobs, strict=True)
            for index, (logprob, rank, top_ids, top_logprobs) in zip(samples, columns, strict=True):
                if index not in unless:
                    found[index] = Logprobs((logprob,), (rank,), (top_ids,), (top_logprobs,))
        return tuple(sorted(found.items()))

    def _read_candidates(self, *, unless: Mapping[int, RowErrorCode]) -> tuple[tuple[int, tuple[tuple[int, float], ...]], ...]:
        """The most likely continuations of each beam, fewer than asked for if the rules forbid the others."""
        found: dict[int, tuple[tuple[int, float], ...]] = {}
        for samples, values, ids in self._candidates:
            for index, of_values, of_ids in zip(samples, values.tolist(), ids.tolist(), strict=True):
                if index not in unless:
                    found[index] = tuple((token_id, value) for token_id, value in zip(of_ids, of_values, strict=True) if value > -math.inf)
        return tuple(sorted(found.items()))


def _groups(sampled: Sequence[int], numbers: Mapping[int, int]) -> dict[int, list[int]]:
    """The samples whose rows have a number, by that number. Rows of one number share a top-k, whoever else is in the batch."""
    groups: dict[int, list[int]] = {}
    if numbers:
        for index, row in enumerate(sampled):
            if row in numbers:
                groups.setdefault(numbers[row], []).append(index)
    return groups


def _apply_rules_and_penalties(batch: Batch, logits: Tensor, sampled: Sequence[int]) -> list[int]:
    """Change the logits of the rows that ask for it, in place; the samples that were changed."""
    state = batch.sampling
    changed: list[int] = []
    if state.rules:
        lengths = [batch.rows[row].length for row in sampled]
        changed += state.rules.apply(logits, sampled, tokens=batch.tokens, lengths=lengths)
    if state.penalised:
        penalised = [index for index, row in enumerate(sampled) if row in state.penalised]
        if penalised:
            indices = device_tensor(penalised, device=batch.device)
            logits[indices] = apply_penalties(logits[indices], _penalty_inputs(batch, [sampled[index] for index in penalised]))
            changed += [index for index in penalised if index not in changed]
    return changed


def _penalty_inputs(batch: Batch, rows: Sequence[int]) -> PenaltyInputs:
    width = max(batch.rows[row].length for row in rows)
    columns = batch.sampling.columns
    return PenaltyInputs(
        rows=device_tensor(rows, device=batch.device),
        tokens=batch.tokens[:, :width],
        prompt_lengths=batch.prompt_lengths,
        lengths=batch.lengths,
        repetition=columns["repetition_penalty"],
        frequency=columns["frequency_penalty"],
        presence=columns["presence_penalty"],
    )
