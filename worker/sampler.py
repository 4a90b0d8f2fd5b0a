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
from quire.worker.logprobs import as_message


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the samples of a step gave, in their order."""

    token_ids: Tensor  # [num_samples] int64; 0 for a failed draw and for a beam
    drawing: Sequence[int]  # the samples that draw: all but beams
    errors: Mapping[int, RowErrorCode]  # of the samples that failed
    logprobs: tuple[tuple[int, Logprobs], ...]  # (sample, of its token), for rows that ask
    beam_candidates: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]  # (sample, its candidates), of beams


def sample_rows(batch: Batch, logits: Tensor, sampled: Sequence[int]) -> Sampled:
    """Choose for each sample as its row's state says. The batch does not change.

    logits:  [num_samples, vocab_size] float32; overwritten
    sampled: the row of each sample, distinct

    Log probabilities are those of the model, before any rule, penalty or temperature. A beam's candidates come with what
    transformers' beam search adds up: rules and penalties act on log probabilities there, not on logits, and nothing makes
    the result sum to 1 again. Temperature and truncation are for draws, so beams know none.
    """
    state = batch.sampling
    errors = dict.fromkeys(broken_rows(logits).nonzero()[:, 0].tolist(), RowErrorCode.NOT_FINITE)
    beams = _groups(sampled, state.num_beam_candidates)
    asking = _groups(sampled, state.num_logprobs)
    raw_logits = {num_top: logits[samples] for num_top, samples in asking.items()}  # copies, because logits are overwritten
    for samples in beams.values():
        logits[samples] = logits[samples].log_softmax(dim=-1)
    errors = {**_apply_rules_and_penalties(batch, logits, sampled), **errors}

    drawing: Sequence[int] = range(len(sampled))
    if beams:
        beam_samples = {sample for samples in beams.values() for sample in samples}
        drawing = [sample for sample in drawing if sample not in beam_samples]
    token_ids = _draw(batch, logits, sampled, drawing)
    if errors:
        token_ids[list(errors)] = 0
    return Sampled(
        token_ids=token_ids,
        drawing=drawing,
        errors=errors,
        logprobs=_logprobs(raw_logits, asking, token_ids, unless=errors),
        beam_candidates=_beam_candidates(logits, beams, unless=errors),
    )


def _groups(sampled: Sequence[int], numbers: Mapping[int, int]) -> dict[int, list[int]]:
    """The samples whose rows have a number, by that number. Rows of one number share a top-k, whoever else is in the batch."""
    groups: dict[int, list[int]] = {}
    if numbers:
        for index, row in enumerate(sampled):
            if row in numbers:
                groups.setdefault(numbers[row], []).append(index)
    return groups


def _apply_rules_and_penalties(batch: Batch, logits: Tensor, sampled: Sequence[int]) -> dict[int, RowErrorCode]:
    """Change the logits of the rows that ask for it, in place; the samples that cannot be sampled afterwards."""
    state = batch.sampling
    changed: list[int] = []
    if state.rules:
        lengths = [batch.rows[row].length for row in sampled]
        changed += state.rules.apply(logits, sampled, tokens=batch.tokens, lengths=lengths)
    if state.penalised:
        penalised = [index for index, row in enumerate(sampled) if row in state.penalised]
        if penalised:
            logits[penalised] = apply_penalties(logits[penalised], _penalty_inputs(batch, [sampled[index] for index in penalised]))
            changed += penalised
    if not changed:
        return {}
    peaks = logits[changed].amax(dim=-1).tolist()
    return {
        index: RowErrorCode.NO_ALLOWED_TOKEN if peak == -math.inf else RowErrorCode.NOT_FINITE
        for index, peak in zip(changed, peaks, strict=True)
        if not math.isfinite(peak)
    }


def _penalty_inputs(batch: Batch, rows: Sequence[int]) -> PenaltyInputs:
    width = max(batch.rows[row].length for row in rows)
    indices = device_tensor(rows, device=batch.device)
    repetition, frequency, presence = batch.sampling.penalties()
    return PenaltyInputs(
        rows=indices,
        tokens=batch.tokens[:, :width],
        prompt_lengths=batch.prompt_lengths,
        lengths=batch.lengths,
        repetition=repetition,
        frequency=frequency,
        presence=presence,
    )


def _draw(batch: Batch, logits: Tensor, sampled: Sequence[int], drawing: Sequence[int]) -> Tensor:
    """A token for each sample that draws, 0 for the others: [num_samples] int64."""
    rows = device_tensor([sampled[index] for index in drawing], device=batch.device)
    inputs = batch.sampling.inputs(rows, position=batch.lengths)
    has_typical = bool(batch.sampling.typical)
    if len(drawing) == len(sampled):
        return sample(logits, inputs, purpose=DrawPurpose.TARGET, has_typical=has_typical)
    token_ids = torch.zeros(len(sampled), dtype=torch.int64, device=batch.device)
    if drawing:
        token_ids[list(drawing)] = sample(logits[list(drawing)], inputs, purpose=DrawPurpose.TARGET, has_typical=has_typical)
    return token_ids


def _logprobs(
    raw_logits: Mapping[int, Tensor], asking: Mapping[int, Sequence[int]], token_ids: Tensor, *, unless: Mapping[int, RowErrorCode]
) -> tuple[tuple[int, Logprobs], ...]:
    found: dict[int, Logprobs] = {}
    for num_top, samples in asking.items():
        of_group = as_message(token_logprobs(raw_logits[num_top], token_ids[list(samples)], num_top=num_top))
        columns = zip(of_group.logprobs, of_group.ranks, of_group.top_ids, of_group.top_logprobs, strict=True)
        for index, (logprob, rank, top_ids, top_logprobs) in zip(samples, columns, strict=True):
            if index not in unless:
                found[index] = Logprobs((logprob,), (rank,), (top_ids,), (top_logprobs,))
    return tuple(sorted(found.items()))


def _beam_candidates(
    log_probabilities: Tensor, beams: Mapping[int, Sequence[int]], *, unless: Mapping[int, RowErrorCode]
) -> tuple[tuple[int, tuple[tuple[int, float], ...]], ...]:
    """The most likely continuations of each beam, fewer than asked for if the rules forbid the others."""
    found: dict[int, tuple[tuple[int, float], ...]] = {}
    for num_candidates, samples in beams.items():
        values, ids = log_probabilities[list(samples)].topk(min(num_candidates, log_probabilities.shape[1]), dim=-1)
        for index, of_values, of_ids in zip(samples, values.tolist(), ids.tolist(), strict=True):
            if index not in unless:
                found[index] = tuple((token_id, value) for token_id, value in zip(of_ids, of_values, strict=True) if value > -math.inf)
    return tuple(sorted(found.items()))
