"""Executes step plans: the order of StepPlan's docstring, read as a story in `execute`."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from quire.common.errors import InternalError, NotSupported
from quire.common.messages import Chunk, StepAck, StepPlan, StepResult
from quire.kernels.copy_blocks import copy_blocks
from quire.worker.batch import Batch
from quire.worker.kv_cache import KvCache
from quire.worker.models.transformers_model import TransformersModel
from quire.worker.step_inputs import build_step_inputs

# Parts of a plan that no code here honours yet.
_UNSUPPORTED = ("swap_out", "swap_in", "wait_copies", "draft_rows", "draft_ids", "grammars", "append_rows", "append_ids")


class Runner:
    """A rank's model, its cache and its batch."""

    def __init__(
        self,
        model: TransformersModel,
        kv_cache: KvCache,
        *,
        rank: int,
        max_rows: int,
        max_model_len: int,
        device: str,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.batch = Batch(
            max_rows=max_rows,
            max_tokens_per_row=max_model_len,
            block_size=kv_cache.block_size,
            num_blocks=kv_cache.num_blocks,
            vocab_size=model.vocab_size,
            device=device,
        )
        self._rank = rank

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> tuple[StepResult, StepAck]:
        """Perform one plan.

        Raises:
            NotSupported: it asks for what this rank cannot do yet; the message names the field.
            InternalError: it contradicts what the rank holds. Either way the rank's state is undefined and it must exit.
        """
        started_s = time.perf_counter()
        _refuse_unsupported(plan)
        batch = self.batch
        batch.remove(plan.remove_rows)
        batch.add(plan.add_rows)
        batch.fork(plan.forks)
        batch.grow(plan.grow_rows, plan.grow_block_ids)
        batch.hold(plan.hold_rows)
        decoding = batch.decoding_rows()
        self._copy_on_write(plan.cow)
        result = StepResult(term=plan.term, step_id=plan.step_id)
        if plan.chunks or decoding:
            result = self._compute(plan, decoding, started_s)
        elif plan.samples:
            raise InternalError("the plan samples rows but computes none")
        ack = StepAck(term=plan.term, step_id=plan.step_id, rank=self._rank, checksum=batch.checksum() if plan.debug_checksum else 0)
        return result, ack

    def _compute(self, plan: StepPlan, decoding: list[int], started_s: float) -> StepResult:
        batch = self.batch
        for chunk in plan.chunks:
            batch.check_slots(chunk.row, start=chunk.start, end=chunk.start + chunk.count)
            batch.rows[chunk.row].num_computed += chunk.count
        for row in decoding:
            batch.check_slots(row, start=batch.rows[row].length - 1, end=batch.rows[row].length)
            batch.rows[row].num_computed += 1
        sources = [source for source, _ in plan.samples] + decoding
        sampled = [row for _, row in plan.samples] + decoding
        self._check_samples(plan, sampled, computed={chunk.row for chunk in plan.chunks}.union(decoding))

        inputs = build_step_inputs(batch, plan.chunks, decoding)
        forward_s = time.perf_counter()
        last_tokens = _last_tokens(plan.chunks, decoding)
        distinct = list(dict.fromkeys(sources))
        # A step of chunks that end no prompt needs no logits; one row of them keeps every model's head happy.
        wanted = [last_tokens[source] for source in distinct] or [0]
        logits = self.model.forward(inputs, self.kv_cache, logits_index=torch.tensor(wanted, device=batch.device))
        if not sampled:
            return StepResult(plan.term, plan.step_id, device_s=time.perf_counter() - forward_s, host_s=forward_s - started_s)
        if distinct != sources:
            logits = logits[torch.tensor([distinct.index(source) for source in sources], device=batch.device)]
        token_ids, errors = self._sample(logits, sampled)
        batch.append(sampled, token_ids)
        failed = {index for index, _ in errors}
        done_s = time.perf_counter()
        return StepResult(
            term=plan.term,
            step_id=plan.step_id,
            counts=tuple(0 if index in failed else 1 for index in range(len(sampled))),
            token_ids=tuple(token_id for index, token_id in enumerate(token_ids.tolist()) if index not in failed),
            row_errors=tuple(errors),
            device_s=done_s - forward_s,
            host_s=forward_s - started_s,
        )

    def _sample(self, logits: Tensor, sampled: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """A token for each sampled row, 0 for one that failed: its length must go on as the scheduler expects."""
        rows = torch.tensor(sampled, device=self.batch.device)
        forbidden = []
        for index, row in enumerate(sampled):
            state = self.batch.rows[row]
            if state.length - state.prompt_len < state.sampling.min_tokens and state.sampling.stop_ids:
                forbidden.append((index, state.sampling.stop_ids))
        return self.batch.sampling.sample(logits, rows, positions=self.batch.lengths[rows], forbidden=forbidden)

    def _check_samples(self, plan: StepPlan, sampled: Sequence[int], *, computed: set[int]) -> None:
        """Every source's logits exist, every sampled row stands where its source stands, none is sampled twice."""
        rows = self.batch.rows
        ends = {chunk.row for chunk in plan.chunks if chunk.is_last}
        if len(set(sampled)) != len(sampled) or not ends <= {source for source, _ in plan.samples}:
            raise InternalError(f"the plan samples a row twice, or not at all after its last chunk: {plan.samples}")
        for source, row in plan.samples:
            if source not in computed or row not in rows:
                raise InternalError(f"the plan samples row {source} into row {row}, but computes only {sorted(computed)}")
            if not rows[source].num_computed == rows[source].length == rows[row].length:
                raise InternalError(
                    f"the plan samples row {source} ({rows[source].num_computed} of {rows[source].length} tokens computed) "
                    f"into row {row} of {rows[row].length} tokens"
                )
            rows[row].num_computed = rows[source].num_computed

    def _copy_on_write(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy shared blocks in one go, each copy for the row that is about to write into it."""
        if not copies:
            return
        for row, source, target in copies:
            self.batch.replace_block(row, source, target)
        _, sources, targets = torch.tensor(copies, device=self.batch.device).unbind(1)
        copy_blocks(self.kv_cache.blocks, sources, targets)


def _last_tokens(chunks: Sequence[Chunk], decoding: Sequence[int]) -> dict[int, int]:
    """Where in the flattened step each computed row's last token lies."""
    places: dict[int, int] = {}
    num_tokens = 0
    for chunk in chunks:
        num_tokens += chunk.count
        places[chunk.row] = num_tokens - 1
    for index, row in enumerate(decoding):
        places[row] = num_tokens + index
    return places


def _refuse_unsupported(plan: StepPlan) -> None:
    for name in _UNSUPPORTED:
        if getattr(plan, name):
            raise NotSupported(f"StepPlan.{name} is not supported by this rank yet")
