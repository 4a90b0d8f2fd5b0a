"""Beam search as transformers' `generate(num_beams=…)` does it: which beams go on, which are done. Pure.

Scores are sums of log probabilities. At each step the best candidates over all beams are taken, in order: those that end
become results, divided by length ** length_penalty, if they are among the first `num_beams`; of the others the first
`num_beams` go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.common.messages import BeamSearch, EndReason

# Values of BeamSearch.early_stopping.
HEURISTIC = 1  # stop when no running beam beats the worst result at the present length
FIRST = 2  # stop as soon as num_beams results are there
NEVER = 3  # stop only when no running beam can ever beat the worst result


def num_candidates(num_beams: int, num_stop_ids: int) -> int:
    """Candidates wanted of each beam: enough that num_beams go on when each of them could end in every way."""
    return max(2, 1 + num_stop_ids) * num_beams


@dataclass(frozen=True, slots=True)
class BeamResult:
    """A finished beam."""

    score: float
    token_ids: tuple[int, ...]  # of its completion
    cumulative_logprob: float
    reason: EndReason
    stop_id: int | None


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam that goes on: its parent's place among the beams before, and its next token."""

    parent: int
    token_id: int
    cumulative_logprob: float


@dataclass(slots=True)
class BeamSearchState:
    """What one beam search knows between steps."""

    params: BeamSearch
    max_tokens: int
    results: list[BeamResult] = field(default_factory=list)  # best first, at most num_beams
    # Candidates of this step, by the beam's place, as they come: (token id, log probability), most likely first.
    reported: dict[int, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def advance(
        self, completions: Sequence[Sequence[int]], cumulative_logprobs: Sequence[float], *, stop_ids: frozenset[int], min_tokens: int
    ) -> list[Continuation]:
        """Take the step for which all beams have reported; the beams that go on, best first. None go on when it has ended.

        completions: the tokens of each beam so far, without the prompt; all of one length
        """
        num_beams = self.params.num_beams
        length = len(completions[0]) + 1
        candidates = [
            (cumulative_logprobs[beam] + logprob, beam, token_id)
            for beam in range(len(completions))
            for token_id, logprob in self.reported[beam]
        ]
        candidates.sort(key=lambda candidate: -candidate[0])  # stable: ties go to the lower beam, then to the likelier token
        self.reported = {}
        going_on: list[Continuation] = []
        for place, (total, beam, token_id) in enumerate(candidates[: num_candidates(num_beams, len(stop_ids))]):
            stops = token_id in stop_ids and length > min_tokens
            if not stops and length < self.max_tokens:
                if len(going_on) < num_beams:
                    going_on.append(Continuation(beam, token_id, total))
            elif place < num_beams:
                reason, stop_id = (EndReason.STOP, token_id) if stops else (EndReason.LENGTH, None)
                tokens = (*completions[beam], token_id)
                self.results.append(BeamResult(total / length**self.params.length_penalty, tokens, total, reason, stop_id))
        self.results.sort(key=lambda result: -result.score)
        del self.results[num_beams:]
        return going_on if going_on and self._may_improve(going_on[0].cumulative_logprob, length) else []

    def _may_improve(self, best_running: float, length: int) -> bool:
        """Whether a running beam may still become one of the results."""
        if len(self.results) < self.params.num_beams:
            return True
        if self.params.early_stopping == FIRST:
            return False
        penalty = self.params.length_penalty
        best_length = self.max_tokens if self.params.early_stopping == NEVER and penalty > 0 else length
        return bool(best_running / best_length**penalty > self.results[-1].score)
