"""Executes step plans: the order of StepPlan's docstring, read as a story in `execute`."""

import time
from collections.abc import Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from quire.common.errors import InternalError, NotSupported
from quire.common.messages import Chunk, StepAck, StepPlan, StepResult
from quire.kernels.copy_blocks import copy_blocks
from quire.worker.batch import Batch
from quire.worker.cuda_swap_pool import CudaSwapPool
from quire.worker.device_tensor import device_tensor
from quire.worker.kv_cache import KvCache
from quire.worker.logprobs import prompt_logprobs, prompt_spans
from quire.worker.models.transformers_model import TransformersModel
from quire.worker.sampler import sample_rows
from quire.worker.step_inputs import StepInputs, build_step_inputs
from quire.worker.swap_pool import SwapPool

# Parts of a plan that no code here honours yet.
_UNSUPPORTED = ("draft_rows", "draft_ids", "grammars", "forget_grammars")


class Runner:
    """A rank's model, its cache, its swap pool and its batch."""

    def __init__(
        self,
        model: TransformersModel,
        kv_cache: KvCache,
        *,
        rank: int,
        max_rows: int,
        max_model_len: int,
        device: str,
        num_cpu_blocks: int = 0,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        pool = CudaSwapPool if kv_cache.blocks.is_cuda else SwapPool
        self.swap_pool: CudaSwapPool | SwapPool = pool(kv_cache, num_blocks=num_cpu_blocks)
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
        batch.append(plan.append_rows, plan.append_ids)
        batch.grow(plan.grow_rows, plan.grow_block_ids)
        batch.hold(plan.hold_rows)
        decoding = batch.decoding_rows()
        self._copy_on_write(plan.cow)
        self.swap_pool.start_in(plan.swap_in)
        self.swap_pool.wait(plan.wait_copies)
        result = StepResult(term=plan.term, step_id=plan.step_id)
        if plan.chunks or decoding:
            result = self._compute(plan, decoding, started_s)
        elif plan.samples:
            raise InternalError("the plan samples rows but computes none")
        self.swap_pool.start_out(plan.swap_out)
        copies_done, copies_failed = self.swap_pool.take_ended()
        ack = StepAck(
            term=plan.term,
            step_id=plan.step_id,
            rank=self._rank,
            copies_done=copies_done,
            checksum=batch.checksum() if plan.debug_checksum else 0,
            copies_failed=copies_failed,
        )
        return result, ack

    def clear(self) -> None:
        """Forget every row and every copy, for a scheduler that knows of none."""
        self.batch.clear()
        self.swap_pool.clear()

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
        spans = prompt_spans(batch, plan.chunks, inputs)
        forward_s = time.perf_counter()
        last_places = _last_places(inputs, plan.chunks, decoding)
        logits_rows = {source: index for index, source in enumerate(dict.fromkeys(sources))}
        wanted = [last_places[source] for source in logits_rows] + [place for span in spans for place in span.places]
        # A step of chunks that end no prompt needs no logits; one row of them keeps every model's head happy.
        logits = self.model.forward(inputs, self.kv_cache, logits_index=device_tensor(wanted or [0], device=batch.device))
        logits, prompt_logits = logits[: len(logits_rows)], logits[len(logits_rows) : len(wanted)]
        result = StepResult(plan.term, plan.step_id, prompt_logprobs=prompt_logprobs(batch, spans, prompt_logits))
        if sampled:
            if len(logits_rows) < len(sources):
                logits = logits[device_tensor([logits_rows[source] for source in sources], device=batch.device)]
            result = self._sample(result, logits, sampled)
        elif logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # as reading what was drawn would; device_s is then true
        return replace(result, device_s=time.perf_counter() - forward_s, host_s=forward_s - started_s)

    def _sample(self, result: StepResult, logits: Tensor, sampled: Sequence[int]) -> StepResult:
        """Draw for the sampled rows, and put down what came of it: with the rows for the next step, in the result for the scheduler."""
        drawn = sample_rows(self.batch, logits, sampled)
        if len(drawn.drawing) == len(sampled):
            self.batch.append_drawn(sampled, drawn.token_ids)
        else:
            self.batch.append_drawn([sampled[index] for index in drawn.drawing], drawn.token_ids[list(drawn.drawing)])
        token_ids = drawn.token_ids.tolist()
        # A failed draw was appended as well: the row's length must go on as the scheduler expects. But it is not told as a token.
        told = [index for index in drawn.drawing if index not in drawn.errors]
        counts = [0] * len(sampled)
        for index in told:
            counts[index] = 1
        return replace(
            result,
            counts=tuple(counts),
            token_ids=tuple(token_ids[index] for index in told),
            logprobs=drawn.logprobs,
            beam_candidates=drawn.beam_candidates,
            row_errors=tuple(sorted((index, int(code)) for index, code in drawn.errors.items())),
        )

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
        if len({target for _, _, target in copies}) != len(copies):
            raise InternalError(f"the plan copies two blocks into one: {copies}")
        self.batch.replace_blocks(copies)
        sources, targets = (device_tensor([copy[i] for copy in copies], device=self.batch.device) for i in (1, 2))
        copy_blocks(self.kv_cache.blocks, sources, targets)


def _last_places(inputs: StepInputs, chunks: Sequence[Chunk], decoding: Sequence[int]) -> dict[int, int]:
    """Where in the step each computed row's last token lies."""
    places = {chunk.row: place + chunk.count - 1 for chunk, place in zip(chunks, inputs.chunk_places, strict=True)}
    return {**places, **dict(zip(decoding, inputs.decode_places, strict=True))}


def _refuse_unsupported(plan: StepPlan) -> None:
    for name in _UNSUPPORTED:
        if getattr(plan, name):
            raise NotSupported(f"StepPlan.{name} is not supported by this rank yet")
