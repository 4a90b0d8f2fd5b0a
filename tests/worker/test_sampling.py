"""Every field of SamplingState, against the model's own logits and transformers' own processors."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from plan_driver import GREEDY, MakeRunner, PlanDriver
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from quire.common.errors import InternalError
from quire.common.messages import Chunk, DrawPurpose, RowAdd, RowErrorCode, SamplingState
from quire.kernels.sample import SamplingInputs, gumbel_noise
from quire.worker.models.transformers_model import TransformersModel
from quire.worker.sampler import Draw

VOCAB_SIZE = 4096
PROMPT = [17, 900, 3, 77, 900, 2048, 5, 6, 77]
NUM_TOKENS = 12
DRAWN = SamplingState(temperature=0.9, seed=2**63 + 5, sequence_index=1)


class CompletionPenalties:
    """OpenAI's definition of the frequency and presence penalties, of which transformers has none."""

    def __init__(self, state: SamplingState, prompt_length: int) -> None:
        self._state = state
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        penalised = scores.clone()
        for token_id, count in Counter(input_ids[0, self._prompt_length :].tolist()).items():
            penalised[0, token_id] -= count * self._state.frequency_penalty + self._state.presence_penalty
        return penalised


def processors_of(state: SamplingState, prompt_length: int) -> LogitsProcessorList:
    """transformers' processors for a state, in the order that SamplingState gives."""
    chain: list[Any] = []
    if state.bias:
        chain.append(SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in state.bias}))
    if state.allowed_ids is not None:
        chain.append(SuppressTokensLogitsProcessor(sorted(set(range(VOCAB_SIZE)) - set(state.allowed_ids))))
    if state.bad_ids or state.bad_sequences:
        chain.append(NoBadWordsLogitsProcessor([*([token_id] for token_id in state.bad_ids), *map(list, state.bad_sequences)]))
    if state.min_tokens and state.stop_ids:
        chain.append(MinNewTokensLengthLogitsProcessor(prompt_length, state.min_tokens, list(state.stop_ids)))
    if state.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(state.repetition_penalty))
    if state.frequency_penalty or state.presence_penalty:
        chain.append(CompletionPenalties(state, prompt_length))
    if state.temperature not in (0, 1):
        chain.append(TemperatureLogitsWarper(state.temperature))
    chain += [TopKLogitsWarper(state.top_k)] if state.top_k else []
    chain += [TopPLogitsWarper(state.top_p)] if state.top_p < 1 else []
    chain += [MinPLogitsWarper(state.min_p)] if state.min_p > 0 else []
    chain += [TypicalLogitsWarper(state.typical_p)] if state.typical_p < 1 else []
    return LogitsProcessorList(chain)


def noise(state: SamplingState, position: int) -> Tensor:
    """Of every token, for the draw at this position."""
    ones, seed = torch.ones(1), state.seed - 2**64 if state.seed >= 2**63 else state.seed
    key = (torch.tensor([seed]), torch.tensor([state.sequence_index]), torch.tensor([position]))
    return gumbel_noise(VOCAB_SIZE, SamplingInputs(torch.tensor([0]), ones, ones, ones, ones, ones, *key), purpose=DrawPurpose.TARGET)[0]


def expected_tokens(model: TransformersModel, prompt: Sequence[int], state: SamplingState, *, num_tokens: int) -> list[int]:
    """The completion of a dense forward pass per token, transformers' processors, and an argmax."""
    processors = processors_of(state, len(prompt))
    tokens = list(prompt)
    for _ in range(num_tokens):
        scores = processors(torch.tensor([tokens]), model.own_logits(torch.tensor(tokens))[-1:].clone())[0]
        tokens.append(int((scores + noise(state, len(tokens)) if state.temperature else scores).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def greedy(models: dict[str, TransformersModel]) -> list[int]:
    """What the tiny model says after PROMPT when nothing is asked of it."""
    return expected_tokens(models["tiny"], PROMPT, GREEDY, num_tokens=NUM_TOKENS)


def states_of(greedy: Sequence[int]) -> dict[str, SamplingState]:
    """A state per field, each changing what the tiny model says, and some with all of them."""
    first, second = greedy[:2]
    few = tuple(sorted({*range(0, VOCAB_SIZE, 37), first}))
    everything: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "bias": ((first, -3.0), (1000, 2.5)),
        "bad_ids": (second, 40),
        "bad_sequences": ((77, first, 7), (77, first), (900,)),
        "min_tokens": 6,
        "stop_ids": (first, second, 0),
    }
    fields: dict[str, dict[str, Any]] = {
        "repetition": {"repetition_penalty": 1.5},
        "repetition below 1": {"repetition_penalty": 0.5},
        "presence": {"presence_penalty": 2.0},
        "frequency": {"frequency_penalty": 2.0},
        "frequency below 0": {"frequency_penalty": -2.0},
        "bias": {"bias": ((first, -100.0), (1234, 9.0))},
        "allowed": {"allowed_ids": few},
        "bad ids": {"bad_ids": (first, second)},
        "bad sequence of prompt and completion": {"bad_sequences": ((6, 77, first), (first, second), (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2))},
        "bad sequence of one": {"bad_sequences": ((first,),)},
        "min_tokens": {"min_tokens": 4, "stop_ids": (first, second)},
        "everything": everything,
        "everything allowed": {**everything, "allowed_ids": few},
    }
    states: dict[str, SamplingState] = {name: msgspec.structs.replace(GREEDY, **change) for name, change in fields.items()}
    states |= {f"{name}, drawn": msgspec.structs.replace(DRAWN, **change) for name, change in fields.items() if "everything" in name}
    truncation: dict[str, dict[str, Any]] = {
        "typical_p": {"typical_p": 0.3},
        "top_k": {"top_k": 3},
        "top_p": {"top_p": 0.5},
        "min_p": {"min_p": 0.2},
        "temperature": {"temperature": 2.5},
        "all truncation": {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "temperature": 1.3, **everything},
    }
    return states | {name: msgspec.structs.replace(DRAWN, **change) for name, change in truncation.items()}


def test_every_field_does_what_transformers_does_alone_and_in_a_crowd(
    make_runner: MakeRunner, models: dict[str, TransformersModel], greedy: list[int]
) -> None:
    states = states_of(greedy)
    expected = {name: expected_tokens(models["tiny"], PROMPT, state, num_tokens=NUM_TOKENS) for name, state in states.items()}
    plain = {0.0: greedy, 0.9: expected_tokens(models["tiny"], PROMPT, DRAWN, num_tokens=NUM_TOKENS)}
    for name, state in states.items():
        assert expected[name] != plain.get(state.temperature), f"{name} asks for nothing"
        alone = PlanDriver(make_runner()).generate([PROMPT], num_tokens=NUM_TOKENS, chunk=4, sampling=[state])
        assert alone == [expected[name]], name
    crowd = PlanDriver(make_runner(max_rows=len(states) + 1))
    together = crowd.generate(
        [PROMPT] * (len(states) + 1), num_tokens=NUM_TOKENS, chunk=100, sampling=[GREEDY, *states.values()], stagger=1
    )
    assert dict(zip(states, together[1:], strict=True)) == expected
    assert together[0] == greedy, "a row without rules is touched by its neighbours'"


def test_greedy_generate_of_transformers_gives_the_same(make_runner: MakeRunner, tiny_folder: Path, greedy: list[int]) -> None:
    first, second = greedy[:2]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        eos_token_id=[first],
        pad_token_id=0,
        repetition_penalty=1.2,
        sequence_bias={(second,): -4.0},
        bad_words_ids=[[40], [77, second]],
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, use_safetensors=True).eval()
    expected = model.generate(torch.tensor([PROMPT]), generation_config=config)[0, len(PROMPT) :].tolist()
    state = SamplingState(
        temperature=0.0,
        repetition_penalty=1.2,
        bias=((second, -4.0),),
        bad_ids=(40,),
        bad_sequences=((77, second),),
        min_tokens=NUM_TOKENS,
        stop_ids=(first,),
    )
    assert PlanDriver(make_runner()).generate([PROMPT], num_tokens=NUM_TOKENS, chunk=4, sampling=[state]) == [expected]


def test_a_resumed_row_goes_on_with_all_its_state(make_runner: MakeRunner, greedy: list[int]) -> None:
    """Counts of penalties, min_tokens and bad sequences are those of the whole completion, whatever was computed where."""
    for name, state in states_of(greedy).items():
        driver = PlanDriver(make_runner())
        whole = driver.generate([PROMPT], num_tokens=NUM_TOKENS, chunk=100, sampling=[state])[0]
        resumed = (*PROMPT, *whole[:5])
        added = driver.add(0, resumed[:-1], room=NUM_TOKENS)
        driver.step(add_rows=(added,), chunks=(Chunk(0, 0, len(resumed) - 1, False),))
        # As after a swap: all but the last token is computed, and it comes as a chunk of one token.
        again = RowAdd(1, resumed, len(PROMPT), len(resumed) - 1, added.block_ids, 0, state)
        result = driver.step(remove_rows=(0,), add_rows=(again,), chunks=(Chunk(1, len(resumed) - 1, 1, True),), samples=((1, 1),))
        tokens = list(result.token_ids)
        while len(tokens) < NUM_TOKENS - 5:
            tokens += driver.step().token_ids
        assert tokens == whole[5:], name


def test_samples_of_one_prompt_draw_as_single_runs_do(make_runner: MakeRunner, greedy: list[int]) -> None:
    """n = 4: forks take the state along, and each draws as the sequence of its own index."""
    for name in ("everything, drawn", "all truncation"):
        states = [msgspec.structs.replace(states_of(greedy)[name], sequence_index=index, num_logprobs=1) for index in range(4)]
        alone = [PlanDriver(make_runner()).generate([PROMPT], num_tokens=NUM_TOKENS, chunk=100, sampling=[state])[0] for state in states]
        assert len({tuple(tokens) for tokens in alone}) == 4
        driver = PlanDriver(make_runner())
        added = driver.add(0, PROMPT, states[0])
        shared = added.block_ids[-1]
        result = driver.step(
            add_rows=(added,),
            forks=((0, 3, 1), (3, 1, 2), (0, 2, 3)),  # row 1 is a fork of a fork
            chunks=(Chunk(0, 0, len(PROMPT), True),),
            samples=((0, 0), (0, 3), (0, 1), (0, 2)),
        )
        rows = (0, 3, 1, 2)
        drawn = {row: [token_id] for row, token_id in zip(rows, result.token_ids, strict=True)}
        assert [index for index, _ in result.logprobs] == [0, 1, 2, 3]
        for step in range(1, NUM_TOKENS):
            grows = driver.blocks(4 * 4) if (len(PROMPT) + step - 1) % 4 == 0 else ()
            result = driver.step(
                cow=tuple((row, shared, driver.blocks(1)[0]) for row in (0, 1, 2)) if step == 1 else (),
                grow_rows=(0, 1, 2, 3) if grows else (),
                grow_block_ids=grows,
            )
            assert len(result.logprobs) == 4
            for row, token_id in zip((0, 1, 2, 3), result.token_ids, strict=True):
                drawn[row].append(token_id)
        assert [drawn[row] for row in rows] == alone, name


def test_a_row_may_be_left_with_no_token_by_any_rule(make_runner: MakeRunner) -> None:
    everything = tuple(range(VOCAB_SIZE))
    closed = [
        SamplingState(allowed_ids=()),
        SamplingState(bad_ids=everything),
        SamplingState(temperature=0.0, allowed_ids=(5, 9), bad_ids=(5,), bad_sequences=((77, 9),)),
        SamplingState(temperature=0.0, allowed_ids=(5, 9), num_beam_candidates=3, bad_ids=(5, 9)),
        SamplingState(bias=tuple((token_id, float("-inf")) for token_id in everything), repetition_penalty=1.2, num_logprobs=2),
    ]
    driver = PlanDriver(make_runner())
    adds = tuple(driver.add(row, PROMPT, state, room=1) for row, state in enumerate([*closed, GREEDY]))
    rows = range(len(adds))
    result = driver.step(
        add_rows=adds, chunks=tuple(Chunk(row, 0, len(PROMPT), True) for row in rows), samples=tuple((row, row) for row in rows)
    )
    assert result.row_errors == tuple((index, RowErrorCode.NO_ALLOWED_TOKEN) for index in range(len(closed)))
    assert result.counts == (0,) * len(closed) + (1,)
    assert (result.logprobs, result.beam_candidates) == ((), ())


def test_a_penalty_that_overflows_fails_its_own_row(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    states = (SamplingState(repetition_penalty=1e-38, bias=((PROMPT[0], 100.0),)), GREEDY)
    adds = tuple(driver.add(row, PROMPT, state) for row, state in enumerate(states))
    chunks = tuple(Chunk(row, 0, len(PROMPT), True) for row in (0, 1))
    result = driver.step(add_rows=adds, chunks=chunks, samples=((0, 0), (1, 1)))
    assert (result.counts, result.row_errors) == ((0, 1), ((0, RowErrorCode.NOT_FINITE),))


def test_a_bad_sequence_that_begins_before_the_first_token_forbids_nothing(make_runner: MakeRunner, greedy: list[int]) -> None:
    state = msgspec.structs.replace(GREEDY, bad_sequences=((PROMPT[0], *PROMPT, greedy[0]), (4, 4, 4, *PROMPT, greedy[0])))
    assert PlanDriver(make_runner()).generate([PROMPT], num_tokens=NUM_TOKENS, chunk=100, sampling=[state]) == [greedy]


def test_logits_that_are_broken_from_the_start_are_not_blamed_on_the_rules(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    states = (GREEDY, msgspec.structs.replace(GREEDY, bad_ids=(7,)), msgspec.structs.replace(GREEDY, bad_ids=(5,)), GREEDY)
    driver.step(add_rows=tuple(driver.add(row, PROMPT, state) for row, state in enumerate(states)))
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[0, 9] = float("nan")
    logits[1] = float("-inf")
    logits[2:, 5] = 1.0
    sampled = Draw(driver.runner.batch, logits, [0, 1, 2, 3]).read()
    assert sampled.errors == {0: RowErrorCode.NOT_FINITE, 1: RowErrorCode.NOT_FINITE}
    assert sampled.token_ids == [0, 0, 0, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": ((4096, 1.0),)}, "bias of row 0 names ids from 4096 to 4096; ids are below 4096"),
        ({"allowed_ids": (1, -1)}, "allowed_ids of row 0 names ids from -1 to 1"),
        ({"bad_ids": (5000,)}, "bad_ids of row 0"),
        ({"stop_ids": (5000,)}, "stop_ids of row 0"),
        ({"bad_sequences": ((1, 5000, 2),)}, "bad_sequences of row 0"),
        ({"bad_sequences": ((1,), ())}, "bad_sequences of row 0 has an empty sequence"),
    ],
)
def test_a_state_that_names_ids_outside_the_vocabulary_is_an_error(make_runner: MakeRunner, change: dict[str, Any], message: str) -> None:
    driver = PlanDriver(make_runner())
    with pytest.raises(InternalError, match=message):
        driver.step(add_rows=(driver.add(0, [1, 2], SamplingState(**change)),))


def test_a_rows_rules_leave_with_it(make_runner: MakeRunner, greedy: list[int]) -> None:
    ruled = SamplingState(temperature=0.0, bad_ids=(greedy[0],), repetition_penalty=3.0, num_logprobs=4)
    beam = msgspec.structs.replace(ruled, num_beam_candidates=2)
    fields: dict[str, Any] = {"chunks": (Chunk(0, 0, len(PROMPT), True), Chunk(1, 0, len(PROMPT), True)), "samples": ((0, 0), (1, 1))}
    for remove_rows in ((0, 1), ()):
        driver = PlanDriver(make_runner())
        result = driver.step(add_rows=(driver.add(0, PROMPT, ruled, room=1), driver.add(1, PROMPT, beam, room=1)), **fields)
        assert (result.counts, len(result.logprobs), len(result.beam_candidates)) == ((1, 0), 1, 1)
        if not remove_rows:
            driver.runner.clear()
            driver.runner.batch.check()
        plain = (driver.add(1, PROMPT, room=1), driver.add(0, PROMPT, room=1))
        result = driver.step(remove_rows=remove_rows, add_rows=plain, **fields)
        assert (result.token_ids, result.logprobs, result.beam_candidates) == ((greedy[0], greedy[0]), (), ())
