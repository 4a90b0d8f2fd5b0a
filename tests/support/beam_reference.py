"""Beam search over the pretended model, the slow and obvious way: every beam is a list of tokens, nothing is shared.

Follows what transformers' `generate` does step by step (running beams, finished beams, the three stopping rules).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fake_ranks import Candidates, beam_candidates, encode_tokens

from quire.common.messages import BeamSearch, SamplingState


@dataclass
class Hypothesis:
    tokens: list[int]
    total: float
    score: float
    stopped: bool


def reference_beam_search(
    prompt_ids: Sequence[int], sampling: SamplingState, beam: BeamSearch, *, max_tokens: int, candidates: Candidates = beam_candidates
) -> list[Hypothesis]:
    """The finished beams, best first."""
    width = beam.num_beams
    keep = max(2, 1 + len(sampling.stop_ids)) * width
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Hypothesis] = []
    for step in range(max_tokens):
        pool = []
        for place, (total, tokens) in enumerate(running):
            for order, (token_id, logprob) in enumerate(candidates(encode_tokens([*prompt_ids, *tokens]), sampling, keep, len(tokens))):
                pool.append((-(total + logprob), place, order, [*tokens, token_id]))
        pool.sort(key=lambda entry: entry[:3])
        pool = pool[:keep]
        length = step + 1
        was_full = len(finished) == width
        next_running = []
        new = []
        for rank, (negative, _, _, tokens) in enumerate(pool):
            stopped = tokens[-1] in sampling.stop_ids and length > sampling.min_tokens
            if stopped or length == max_tokens:
                if rank < width and not (was_full and beam.early_stopping == 2):
                    new.append(Hypothesis(tokens, -negative, -negative / length**beam.length_penalty, stopped))
            else:
                next_running.append((-negative, tokens))
        finished = sorted([*finished, *new], key=lambda hypothesis: -hypothesis.score)[:width]
        running = next_running[:width]
        if not running:
            break
        if len(finished) == width:
            if beam.early_stopping == 2:
                break
            best_length = max_tokens if beam.early_stopping == 3 and beam.length_penalty > 0 else length
            if running[0][0] / best_length**beam.length_penalty <= min(hypothesis.score for hypothesis in finished):
                break
    return finished
