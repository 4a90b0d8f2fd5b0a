"""Executes step plans: the order of StepPlan's docstring, read as a story in `launch`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire.common.errors import InternalError, NotSupported
from quire.common.messages import StepAck, StepPlan, StepResult
from quire.kernels.copy_blocks import copy_blocks
from quire.worker.batch import Batch, RowIds
from quire.worker.cuda_swap_pool import CudaSwapPool
from quire.worker.device_tensor import device_tensor
from quire.worker.eager_steps import EagerSteps
from quire.worker.graphed_steps import GraphedSteps
from quire.worker.kv_cache import KvCache
from quire.worker.launched_step import LaunchedStep, StepTimer
from quire.worker.models.llama import LlamaModel
from quire.worker.swap_pool import SwapPool

# transformers takes seconds to import, and the native family needs none of it.
if TYPE_CHECKING:
    from quire.worker.models.transformers_model import TransformersModel

# Parts of a plan that no code here honours yet.
_UNSUPPORTED = ("draft_rows", "draft_ids", "grammars", "forget_grammars")


class Runner:
    """A rank's model, its cache, its swap pool and its batch."""

    def __init__(
        self,
        model: "TransformersModel | LlamaModel",
        kv_cache: KvCache,
        *,
        rank: int,
        max_rows: int,
        max_model_len: int,
        device: str,
        max_batched_tokens: int = 0,
        num_cpu_blocks: int = 0,
        slabs: Sequence[Tensor] | None = None,
        has_static_steps: bool | None = None,
    ) -> None:
        """
        max_batched_tokens: of a step; 0 for as many as a row can hold
        slabs:              memory of the swap pool, on a GPU, where it is pinned already
        has_static_steps:   whether a native model runs by GraphedSteps; None: on GPUs alone. Padded sizes are for graphs
        """
        self.model = model
        self.kv_cache = kv_cache
        self.swap_pool: CudaSwapPool | SwapPool
        if kv_cache.blocks.is_cuda:
            self.swap_pool = CudaSwapPool(kv_cache, num_blocks=num_cpu_blocks, slabs=slabs)
        else:
            self.swap_pool = SwapPool(kv_cache, num_blocks=num_cpu_blocks)
        self.batch = Batch(
            max_rows=max_rows,
            max_tokens_per_row=max_model_len,
            block_size=kv_cache.block_size,
            num_blocks=kv_cache.num_blocks,
            vocab_size=model.vocab_size,
            device=device,
        )
        self.steps: GraphedSteps | EagerSteps
        if has_static_steps is None:
            has_static_steps = kv_cache.blocks.is_cuda
        if isinstance(model, LlamaModel) and has_static_steps:
            self.steps = GraphedSteps(model, kv_cache, self.batch, max_batched_tokens=max_batched_tokens or max_model_len)
        else:
            self.steps = EagerSteps(model, kv_cache, self.batch)
        self._rank = rank

    def execute(self, plan: StepPlan) -> tuple[StepResult, StepAck]:
        """Perform one plan; raises as `launch` does."""
        return self.launch(plan).finish()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start one plan. On a GPU it runs beside what the host does next; plans run in the order in which they are launched.

        Raises:
            NotSupported: it asks for what this rank cannot do yet; the message names the field.
            InternalError: it contradicts what the rank holds. Either way the rank's state is undefined and it must exit.
        """
        timer = StepTimer(self.batch.device)
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
        batch.flush()
        timer.begin_forward()
        draw, prompts = None, None
        if plan.chunks or len(decoding):
            self._check(plan, decoding)
            draw, prompts = self.steps.compute(plan.chunks, decoding, plan.samples)
        elif plan.samples:
            raise InternalError("the plan samples rows but computes none")
        timer.end_forward()
        self.swap_pool.start_out(plan.swap_out)
        return LaunchedStep(
            plan,
            rank=self._rank,
            timer=timer,
            draw=draw,
            prompts=prompts,
            swap_pool=self.swap_pool,
            checksum=batch.checksum() if plan.debug_checksum else 0,
        )

    def clear(self) -> None:
        """Forget every row and every copy, for a scheduler that knows of none."""
        self.batch.clear()
        self.swap_pool.clear()

    def _check(self, plan: StepPlan, decoding: RowIds) -> None:
        """What is computed comes next and has slots. Every source's logits exist, every sampled row stands where its source
        stands, none is sampled twice. Notes what will be computed."""
        batch = self.batch
        for chunk in plan.chunks:
            batch.check_slots(chunk.row, start=chunk.start, end=chunk.start + chunk.count)
            batch.rows[chunk.row].num_computed += chunk.count
        batch.compute_decodes(decoding)
        if not plan.samples and not plan.chunks:
            return
        rows = batch.rows
        decodes = set(decoding.tolist())
        computed = {chunk.row for chunk in plan.chunks} | decodes
        sampled = [row for _, row in plan.samples]
        ends = {chunk.row for chunk in plan.chunks if chunk.is_last}
        if len(set(sampled)) != len(sampled) or not decodes.isdisjoint(sampled) or not ends <= {source for source, _ in plan.samples}:
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


def _refuse_unsupported(plan: StepPlan) -> None:
    for name in _UNSUPPORTED:
        if getattr(plan, name):
            raise NotSupported(f"StepPlan.{name} is not supported by this rank yet")
