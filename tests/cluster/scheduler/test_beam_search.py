"""Beam search beside transformers' own: the same log probabilities in, the same sequences and scores out."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest
import torch
from tiny_models import save_tiny_llama
from transformers import AutoModelForCausalLM

from quire.cluster.scheduler.beam_search import FIRST, HEURISTIC, NEVER, BeamResult, BeamSearchState, num_candidates
from quire.common.messages import BeamSearch, EndReason

VOCAB_SIZE: Final = 24  # so few that end tokens are met often
PAD: Final = VOCAB_SIZE - 1  # 0 would not do: transformers takes it for none, and pads with an end token
ODD: Final = list(range(1, VOCAB_SIZE, 2))  # every second token ends a beam, often more of the best ones than there are beams
EARLY_STOPPING: Final = {True: FIRST, False: HEURISTIC, "never": NEVER}
PROMPTS: Final = [(5, 9, 17), (20, 2), (11, 7, 7, 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to share
    yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(num_threads)


@torch.inference_mode()
def search(
    model: Any, prompt: Sequence[int], beam: BeamSearch, *, max_tokens: int, stop_ids: Sequence[int], min_tokens: int = 0
) -> tuple[list[BeamResult], int]:
    """The search as the scheduler drives it, with every beam computed from its first token: its results, and how many steps it took."""
    state = BeamSearchState(beam, max_tokens)
    beams: list[list[int]] = [[]]
    totals = [0.0]
    num_steps = 0
    while beams:
        num_steps += 1
        logprobs = torch.log_softmax(model(torch.tensor([[*prompt, *tokens] for tokens in beams])).logits[:, -1], dim=-1)
        if len(beams[0]) < min_tokens:
            logprobs[:, list(stop_ids)] = -torch.inf  # transformers forbids tokens behind the softmax
        best = logprobs.topk(min(num_candidates(beam.num_beams, len(stop_ids)), VOCAB_SIZE))
        for place, (ids, values) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            state.reported[place] = list(zip(ids, values, strict=True))
        going_on = state.advance(beams, totals, stop_ids=frozenset(stop_ids), min_tokens=min_tokens)
        beams = [[*beams[one.parent], one.token_id] for one in going_on]
        totals = [one.cumulative_logprob for one in going_on]
    return state.results, num_steps


def compare(
    model: Any, prompt: Sequence[int], beam: BeamSearch, *, n: int, max_tokens: int, stop_ids: list[int], min_tokens: int = 0
) -> int:
    """How many of the n sequences ended by a stop token."""
    (early_stopping,) = [theirs for theirs, ours in EARLY_STOPPING.items() if ours == beam.early_stopping]
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=beam.num_beams,
        num_return_sequences=n,
        length_penalty=beam.length_penalty,
        early_stopping=early_stopping,
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens or None,
        eos_token_id=stop_ids,
        pad_token_id=PAD,
        output_scores=True,
        return_dict_in_generate=True,
    )
    results, num_steps = search(model, prompt, beam, max_tokens=max_tokens, stop_ids=stop_ids, min_tokens=min_tokens)
    results = results[:n]
    sequences = [row[len(prompt) :].tolist() for row in expected.sequences]
    assert [list(result.token_ids) for result in results] == [
        tokens[: len(result.token_ids)] for tokens, result in zip(sequences, results, strict=True)
    ]
    for tokens, result in zip(sequences, results, strict=True):
        assert set(tokens[len(result.token_ids) :]) <= {PAD}, "transformers' sequence is longer"
        assert (result.reason == EndReason.STOP) == (result.token_ids[-1] in stop_ids and len(result.token_ids) > min_tokens)
        assert result.stop_id == (result.token_ids[-1] if result.reason == EndReason.STOP else None)
    assert num_steps == len(expected.scores)
    torch.testing.assert_close(torch.tensor([result.score for result in results]), expected.sequences_scores, rtol=1e-4, atol=1e-4)
    return sum(result.reason == EndReason.STOP for result in results)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
def test_sequences_and_scores_are_those_of_transformers(model: Any, early_stopping: bool | str, length_penalty: float) -> None:
    num_stopped = num_returned = 0
    for place, prompt in enumerate(PROMPTS):
        for num_beams, n, stop_ids in ((2, 1, [11]), (3, 3, [3, 19, 22]), (4, 2, [15, 6]), (3, 2, ODD)):
            beam = BeamSearch(num_beams, length_penalty, EARLY_STOPPING[early_stopping])
            num_stopped += compare(model, prompt, beam, n=n, max_tokens=6 + 5 * place, stop_ids=stop_ids)
            num_returned += n
    assert 0 < num_stopped < num_returned, "one of the two ends was never met"


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
def test_no_beam_ends_before_min_tokens(model: Any, early_stopping: bool | str) -> None:
    for prompt in PROMPTS:
        beam = BeamSearch(4, 1.0, EARLY_STOPPING[early_stopping])
        compare(model, prompt, beam, n=4, max_tokens=9, stop_ids=[11, 12, 13, 14], min_tokens=4)


def test_a_search_of_one_token_returns_the_most_likely_ones(model: Any) -> None:
    compare(model, PROMPTS[0], BeamSearch(4), n=4, max_tokens=1, stop_ids=[11])


def test_a_stop_token_that_came_before_min_tokens_ends_nothing() -> None:
    state = BeamSearchState(BeamSearch(1), max_tokens=5)
    state.reported = {0: [(7, -1.0), (8, -2.0)]}
    going_on = state.advance([[1]], [-0.5], stop_ids=frozenset({7}), min_tokens=2)
    assert [(one.token_id, one.cumulative_logprob) for one in going_on] == [(7, -1.5)]
    state.reported = {0: [(7, -1.0), (8, -2.0)]}
    state.advance([[1, 7]], [-1.5], stop_ids=frozenset({7}), min_tokens=2)
    assert [(result.token_ids, result.stop_id) for result in state.results] == [((1, 7, 7), 7)]
