"""Log probabilities of drawn tokens and of prompts, against a dense forward pass."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from plan_driver import GREEDY, MakeRunner, PlanDriver
from torch import Tensor

from quire.common.messages import Chunk, Logprobs, RowAdd, RowErrorCode, SamplingState, StepResult
from quire.worker import logprobs as logprobs_file
from quire.worker.models.transformers_model import TransformersModel

PROMPT = [17, 900, 3, 77, 900, 2048, 5, 6, 77, 12, 4000, 31, 8]


def dense_logprobs(model: TransformersModel, tokens: Sequence[int]) -> Tensor:
    """Of every token behind every prefix: [len(tokens), vocab_size]."""
    return model.own_logits(torch.tensor(tokens)).log_softmax(-1)


def assert_logprobs(actual: Logprobs, dense: Tensor, token_ids: Sequence[int], *, num_top: int) -> None:
    """dense: [len(token_ids), vocab_size], of each token's place."""
    assert len(actual.logprobs) == len(token_ids)
    for index, token_id in enumerate(token_ids):
        assert actual.logprobs[index] == pytest.approx(float(dense[index, token_id]), abs=1e-4)
        assert actual.ranks[index] == 1 + int((dense[index] > dense[index, token_id]).sum())
        top = dense[index].topk(num_top)
        assert list(actual.top_ids[index]) == top.indices.tolist()
        assert actual.top_logprobs[index] == pytest.approx(top.values.tolist(), abs=1e-4)


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(*(tuple(value for part in parts for value in getattr(part, name)) for name in Logprobs.__struct_fields__))


def test_drawn_tokens_come_with_the_models_own_log_probabilities(make_runner: MakeRunner, models: dict[str, TransformersModel]) -> None:
    """Whatever changes the draw: rules, penalties, temperature and truncation do not change what is reported."""
    states = [
        msgspec.structs.replace(GREEDY, num_logprobs=0),
        GREEDY,
        SamplingState(temperature=3.0, top_k=500, seed=1, num_logprobs=5, repetition_penalty=2.0, bias=((7, 20.0),)),
        SamplingState(temperature=0.7, seed=2, num_logprobs=2, bad_ids=tuple(range(2000)), presence_penalty=1.0),
        SamplingState(temperature=2.0, seed=3, num_logprobs=5),
    ]
    driver = PlanDriver(make_runner())
    tokens = {row: list(PROMPT) for row in range(len(states))}

    def note(result: StepResult) -> None:
        assert [index for index, _ in result.logprobs] == [0, 2, 3, 4]
        for index, logprobs in result.logprobs:
            dense = dense_logprobs(models["tiny"], tokens[index])[-1:]
            assert_logprobs(logprobs, dense, [result.token_ids[index]], num_top=states[index].num_logprobs or 0)
        for row, token_id in enumerate(result.token_ids):
            tokens[row].append(token_id)

    adds = tuple(driver.add(row, PROMPT, state, room=8) for row, state in enumerate(states))
    chunks = tuple(Chunk(row, 0, len(PROMPT), True) for row in tokens)
    note(driver.step(add_rows=adds, chunks=chunks, samples=tuple((row, row) for row in tokens)))
    for _ in range(7):
        note(driver.step())
    assert tokens[0] == tokens[1]
    ranks = dense_logprobs(models["tiny"], tokens[2])[len(PROMPT) - 1 : -1].argsort(descending=True)
    drawn = torch.tensor(tokens[2][len(PROMPT) :])[:, None]
    assert ((ranks == drawn).nonzero()[:, 1] > 5).any(), "no drawn token is outside the top: ranks are not tested"


def test_a_failed_draw_has_no_log_probability(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    states = (SamplingState(allowed_ids=(), num_logprobs=1), msgspec.structs.replace(GREEDY, num_logprobs=1))
    adds = tuple(driver.add(row, PROMPT, state) for row, state in enumerate(states))
    result = driver.step(add_rows=adds, chunks=tuple(Chunk(row, 0, len(PROMPT), True) for row in (0, 1)), samples=((0, 0), (1, 1)))
    assert result.row_errors == ((0, RowErrorCode.NO_ALLOWED_TOKEN),)
    assert [index for index, _ in result.logprobs] == [1]


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("max_rows_at_once", [256, 3])
def test_a_prompts_log_probabilities_come_with_its_chunks(
    make_runner: MakeRunner, models: dict[str, TransformersModel], monkeypatch: pytest.MonkeyPatch, chunk: int, max_rows_at_once: int
) -> None:
    monkeypatch.setattr(logprobs_file, "_MAX_ROWS_AT_ONCE", max_rows_at_once)
    driver = PlanDriver(make_runner())
    state = msgspec.structs.replace(GREEDY, num_prompt_logprobs=3, num_logprobs=1)
    silent = driver.add(5, PROMPT[:4], room=20)
    driver.step(add_rows=(silent,), chunks=(Chunk(5, 0, 4, True),), samples=((5, 5),))  # decodes beside the chunks
    dense = dense_logprobs(models["tiny"], PROMPT)
    start = 0
    while start < len(PROMPT):
        count = min(chunk, len(PROMPT) - start)
        is_last = start + count == len(PROMPT)
        other = driver.add(6, PROMPT[:6]) if start == 0 else None
        result = driver.step(
            add_rows=(driver.add(0, PROMPT, state), other) if other else (),
            chunks=(*((Chunk(6, 0, 6, False),) if other else ()), Chunk(0, start, count, is_last)),
            samples=((0, 0),) if is_last else (),
        )
        first = max(start, 1)  # nothing stands in front of the first token
        if first < start + count:
            ((index, reported),) = result.prompt_logprobs
            assert index == (1 if other else 0)
            assert_logprobs(reported, dense[first - 1 : start + count - 1], PROMPT[first : start + count], num_top=3)
        else:
            assert result.prompt_logprobs == ()
        start += count
    ((index, drawn),) = result.logprobs
    assert index == 0
    assert_logprobs(drawn, dense[-1:], result.token_ids[:1], num_top=1)
    assert driver.step().prompt_logprobs == ()


def test_a_resumed_row_reports_its_prompt_alone_and_only_what_follows_a_computed_token(
    make_runner: MakeRunner, models: dict[str, TransformersModel]
) -> None:
    driver = PlanDriver(make_runner())
    state = msgspec.structs.replace(GREEDY, num_prompt_logprobs=0)
    resumed = (*PROMPT, 9, 10, 11)
    dense = dense_logprobs(models["tiny"], resumed)

    def run(row: int, num_computed: int, block_ids: tuple[int, ...], counts: Sequence[int]) -> Logprobs:
        added: dict[str, Any] = {"add_rows": (RowAdd(row, resumed, len(PROMPT), num_computed, block_ids, 0, state),)}
        parts = []
        for index, count in enumerate(counts):
            is_last = index == len(counts) - 1
            chunk = Chunk(row, num_computed, count, is_last)
            result = driver.step(**added, chunks=(chunk,), samples=((row, row),) if is_last else ())
            parts += [logprobs for _, logprobs in result.prompt_logprobs]
            num_computed += count
            added = {}
        driver.step(remove_rows=(row,))
        return joined(parts)

    blocks = driver.blocks(len(resumed) + 1)
    whole = run(0, 0, blocks, (4, 8, 1, 1, 2))
    assert_logprobs(whole, dense, PROMPT[1:], num_top=0)
    # Of token 6 nothing is known: the logits in front of it were computed before the row came back.
    rest = run(1, 6, blocks, (1, 9))
    assert_logprobs(rest, dense[6:], PROMPT[7:], num_top=0)
    assert run(2, len(PROMPT), blocks, (3,)).logprobs == ()
