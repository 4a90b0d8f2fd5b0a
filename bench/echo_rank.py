"""A rank that computes nothing: every sample of a plan is the same token. So a scheduler can be measured without a model."""

from typing import Final

from quire.common.messages import StepAck, StepPlan, StepResult

# Above 256, up to where Python shares one object per number: each token that a process decodes is an object of its own, as real ones are.
ECHO_TOKEN_ID: Final = 30_000


class EchoRank:
    """Keeps of the batch only what says how many tokens a step gives: which rows are sticky, and which of them are held.

    It knows no beams, no drafts and no copies.
    """

    def __init__(self) -> None:
        self._sticky: set[int] = set()
        self._held: set[int] = set()
        self._num_decoding = 0  # sticky rows that are not held
        self.num_samples = 0  # of the last plan

    def execute(self, plan: StepPlan) -> tuple[StepResult, StepAck]:
        """What rank 0 answers to a plan. In steady decode nothing depends on the number of rows but two tuples."""
        if plan.remove_rows or plan.forks or plan.hold_rows:
            self._sticky.difference_update(plan.remove_rows)
            self._held.difference_update(plan.remove_rows)
            self._sticky.update(target for source, target, _ in plan.forks if source in self._sticky)
            self._held.update(row for row in plan.hold_rows if row >= 0)
            self._held.difference_update(~row for row in plan.hold_rows if row < 0)
            self._num_decoding = len(self._sticky - self._held)
        self.num_samples = len(plan.samples) + self._num_decoding
        if plan.samples:
            self._sticky.update(row for _, row in plan.samples)
            self._num_decoding = len(self._sticky - self._held)
        return echo(plan.term, plan.step_id, self.num_samples)


def echo(term: int, step_id: int, num_samples: int) -> tuple[StepResult, StepAck]:
    """The answer to a plan with so many samples."""
    return StepResult(term, step_id, (1,) * num_samples, (ECHO_TOKEN_ID,) * num_samples), StepAck(term, step_id, 0)
