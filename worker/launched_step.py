"""A step between its launch and its result."""

import time

import torch

from quire.common.messages import StepAck, StepPlan, StepResult
from quire.worker.cuda_swap_pool import CudaSwapPool
from quire.worker.graphed_steps import GraphedDraw
from quire.worker.logprobs import PromptLogprobs
from quire.worker.sampler import Draw
from quire.worker.swap_pool import SwapPool


class StepTimer:
    """How long a step takes, and when it has ended: by the device's clock where there is one."""

    def __init__(self, device: str) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._launch_s = time.perf_counter()
        self._forward_s = self._end_s = self._launch_s
        if self._is_cuda:
            self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def begin_forward(self) -> None:
        self._forward_s = time.perf_counter()
        if self._is_cuda:
            self._begin.record()

    def end_forward(self) -> None:
        self._end_s = time.perf_counter()
        if self._is_cuda:
            self._end.record()

    def is_done(self) -> bool:
        return not self._is_cuda or self._end.query()

    def wait(self) -> None:
        if self._is_cuda:
            self._end.synchronize()

    @property
    def device_s(self) -> float:
        """Of forward and sampling; for a step that has ended. On a GPU, from when the step before it had ended."""
        return self._begin.elapsed_time(self._end) / 1000 if self._is_cuda else self._end_s - self._forward_s

    @property
    def host_s(self) -> float:
        """What the host took besides: on CPU before the forward pass, on a GPU for launching everything."""
        return (self._end_s if self._is_cuda else self._forward_s) - self._launch_s


class LaunchedStep:
    """What a plan will give. Steps are finished in the order in which they were launched."""

    def __init__(
        self,
        plan: StepPlan,
        *,
        rank: int,
        timer: StepTimer,
        draw: Draw | GraphedDraw | None,
        prompts: PromptLogprobs | None,
        swap_pool: SwapPool | CudaSwapPool,
        checksum: int,
    ) -> None:
        self._term = plan.term
        self._step_id = plan.step_id
        self._computes = draw is not None or bool(plan.chunks)
        self._rank = rank
        self._timer = timer
        self._draw = draw
        self._prompts = prompts
        self._swap_pool = swap_pool
        self._checksum = checksum

    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return self._timer.is_done()

    def finish(self) -> tuple[StepResult, StepAck]:
        """Wait for the step's end and read what it gave."""
        self._timer.wait()
        result = self._result() if self._computes else StepResult(self._term, self._step_id)
        copies_done, copies_failed = self._swap_pool.take_ended()
        ack = StepAck(
            term=self._term,
            step_id=self._step_id,
            rank=self._rank,
            copies_done=copies_done,
            checksum=self._checksum,
            copies_failed=copies_failed,
        )
        return result, ack

    def _result(self) -> StepResult:
        prompt_logprobs = () if self._prompts is None else self._prompts.read()
        device_s, host_s = self._timer.device_s, self._timer.host_s
        if self._draw is None:
            return StepResult(self._term, self._step_id, prompt_logprobs=prompt_logprobs, device_s=device_s, host_s=host_s)
        sampled = self._draw.read()
        num_samples = len(sampled.token_ids)
        token_ids = sampled.token_ids
        counts = [1] * num_samples
        if sampled.errors or len(sampled.drawing) < num_samples:
            # A failed draw was appended as well: the row's length must go on as the scheduler expects. But it is not told as a token.
            told = [index for index in sampled.drawing if index not in sampled.errors]
            counts = [0] * num_samples
            for index in told:
                counts[index] = 1
            token_ids = [token_ids[index] for index in told]
        return StepResult(
            self._term,
            self._step_id,
            counts=tuple(counts),
            token_ids=tuple(token_ids),
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            beam_candidates=sampled.beam_candidates,
            row_errors=tuple(sorted((index, int(code)) for index, code in sampled.errors.items())),
            device_s=device_s,
            host_s=host_s,
        )
