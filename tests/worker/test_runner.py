import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from plan_driver import GREEDY, MakeRunner, PlanDriver
from tiny_models import DEMO_MODEL
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.common.errors import InternalError, NotSupported
from quire.common.messages import Chunk, DrawPurpose, Grammar, RowAdd, RowErrorCode, SamplingState, StepPlan, StepResult
from quire.kernels.sample import SamplingInputs, gumbel_noise
from quire.worker.models.transformers_model import TransformersModel

NUM_TOKENS = 10
PROMPT_LENGTHS = (1, 7, 16, 33, 2, 48, 5, 17)

Continuations: TypeAlias = dict[str, list[list[int]]]  # by model, in the order of the prompts


def prompts_of(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 4096) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="session")
def expected(tiny_folder: Path) -> Continuations:
    """What transformers' own greedy generate continues each prompt with, by model."""
    config = GenerationConfig(do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0)

    def continue_all(folder: Path) -> list[list[int]]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        outputs = [model.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in prompts_of()]
        return [output[len(prompt) :] for output, prompt in zip(outputs, prompts_of(), strict=True)]

    return {"tiny": continue_all(tiny_folder), "demo": continue_all(DEMO_MODEL)}


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "block_size", "chunk", "stagger"),
    [
        ("tiny", 1, 1, 0),
        ("tiny", 1, 16, 2),
        ("tiny", 4, 7, 1),
        ("tiny", 4, 1, 3),
        ("tiny", 16, 16, 2),
        ("tiny", 16, 1000, 0),
        ("demo", 4, 7, 2),
        ("demo", 16, 16, 1),
        ("demo", 16, 1000, 0),
    ],
)
def test_eight_at_once_are_continued_as_transformers_continues_each_alone(
    make_runner: MakeRunner, expected: Continuations, model: str, block_size: int, chunk: int, stagger: int
) -> None:
    driver = PlanDriver(make_runner(model, block_size=block_size, num_blocks=512))
    assert driver.generate(prompts_of(), num_tokens=NUM_TOKENS, chunk=chunk, stagger=stagger) == expected[model]


@pytest.mark.parametrize("model", ["tiny", "demo"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prompt_alone_is_continued_as_by_transformers(make_runner: MakeRunner, expected: Continuations, model: str, chunk: int) -> None:
    driver = PlanDriver(make_runner(model, block_size=16))
    for index in (0, 3):
        assert driver.generate([prompts_of()[index]], num_tokens=NUM_TOKENS, chunk=chunk) == [expected[model][index]]


def test_seeded_sampling_gives_the_same_tokens_alone_and_in_a_crowd(make_runner: MakeRunner) -> None:
    prompts = prompts_of()
    states = [
        SamplingState(
            temperature=0.8 + 0.1 * (i % 3),
            top_k=(0, 20)[i % 2],
            top_p=(1.0, 0.9)[i // 4],
            min_p=(0.0, 0.01)[i % 3 == 2],
            seed=2**64 - 1 - i,
        )
        for i in range(len(prompts))
    ]
    driver = PlanDriver(make_runner(block_size=4))
    crowd = driver.generate(prompts, num_tokens=12, chunk=7, sampling=states, stagger=1)
    for index, prompt in enumerate(prompts):
        alone = PlanDriver(make_runner(block_size=16), seed=1).generate([prompt], num_tokens=12, chunk=100, sampling=[states[index]])
        assert alone == [crowd[index]]
    assert len({tuple(tokens) for tokens in crowd}) == len(prompts)


def test_a_token_is_drawn_with_the_noise_of_the_place_that_it_takes(make_runner: MakeRunner, models: dict[str, TransformersModel]) -> None:
    prompt = prompts_of()[1]
    state = SamplingState(temperature=1.0, seed=9, sequence_index=2)
    tokens = PlanDriver(make_runner()).generate([prompt], num_tokens=4, chunk=7, sampling=[state])[0]
    for offset, token_id in enumerate(tokens):
        position = len(prompt) + offset
        ones = torch.ones(1)
        inputs = SamplingInputs(
            torch.tensor([0]), ones, ones, ones, ones, ones, torch.tensor([9]), torch.tensor([2]), torch.tensor([position])
        )
        logits = models["tiny"].own_logits(torch.tensor(prompt + tokens[:offset]))[-1:]
        assert int((logits + gumbel_noise(4096, inputs, purpose=DrawPurpose.TARGET)).argmax()) == token_id


def test_a_resumed_row_draws_what_it_would_have_drawn(make_runner: MakeRunner) -> None:
    prompt = prompts_of()[3]
    state = SamplingState(temperature=1.0, top_p=0.95, seed=5)
    whole = PlanDriver(make_runner()).generate([prompt], num_tokens=12, chunk=16, sampling=[state])[0]
    driver = PlanDriver(make_runner())
    resumed = prompt + whole[:5]
    added = RowAdd(3, tuple(resumed), len(prompt), 0, driver.blocks(len(prompt) + 12), 0, state)
    tokens = list(driver.step(add_rows=(added,), chunks=(Chunk(3, 0, len(resumed), True),), samples=((3, 3),)).token_ids)
    while len(tokens) < 7:
        tokens += driver.step().token_ids
    assert tokens == whole[5:]


def test_a_prefix_that_is_already_computed_is_not_computed_again(make_runner: MakeRunner, expected: Continuations) -> None:
    driver = PlanDriver(make_runner(block_size=4))
    prompt = prompts_of()[3]
    first = driver.add(0, prompt, room=NUM_TOKENS)
    driver.step(add_rows=(first,), chunks=(Chunk(0, 0, len(prompt), True),), samples=((0, 0),))
    own = driver.blocks(1 + NUM_TOKENS)
    second = RowAdd(1, tuple(prompt), len(prompt), 32, first.block_ids[:8] + own, 0, GREEDY)
    result = driver.step(remove_rows=(0,), add_rows=(second,), chunks=(Chunk(1, 32, 1, True),), samples=((1, 1),))
    tokens = list(result.token_ids)
    while len(tokens) < NUM_TOKENS:
        tokens += driver.step().token_ids
    assert tokens == expected["tiny"][3]


def test_results_come_samples_first_then_sticky_rows_ascending(make_runner: MakeRunner, expected: Continuations) -> None:
    driver = PlanDriver(make_runner())
    prompts = prompts_of()
    adds = [driver.add(row, prompts[index], room=4) for row, index in ((9, 1), (2, 2))]
    result = driver.step(add_rows=tuple(adds), chunks=(Chunk(9, 0, 7, True), Chunk(2, 0, 16, True)), samples=((9, 9), (2, 2)))
    assert result.token_ids == (expected["tiny"][1][0], expected["tiny"][2][0])
    third = driver.add(5, prompts[6], room=4)
    result = driver.step(add_rows=(third,), chunks=(Chunk(5, 0, 5, True),), samples=((5, 5),))
    assert result.token_ids == (expected["tiny"][6][0], expected["tiny"][2][1], expected["tiny"][1][1])


# -- forks, copy-on-write, holds --------------------------------------------------------------------------------------


def test_samples_of_one_prompt_share_blocks_until_they_write_and_draw_as_if_alone(make_runner: MakeRunner) -> None:
    prompt = prompts_of()[1]  # 7 tokens in blocks of 4: the second block is shared and not full
    states = [SamplingState(temperature=1.0, seed=9, sequence_index=i) for i in range(3)]
    alone = [PlanDriver(make_runner()).generate([prompt], num_tokens=8, chunk=16, sampling=[state])[0] for state in states]
    assert len({tuple(tokens) for tokens in alone}) == 3

    driver = PlanDriver(make_runner())
    added = driver.add(4, prompt, states[0])
    shared = added.block_ids[1]
    result = driver.step(add_rows=(added,), forks=((4, 1, 1), (4, 7, 2)), chunks=(Chunk(4, 0, 7, True),), samples=((4, 4), (4, 1), (4, 7)))
    drawn = {4: [result.token_ids[0]], 1: [result.token_ids[1]], 7: [result.token_ids[2]]}
    rows = driver.runner.batch.rows
    assert rows[4].block_ids == rows[1].block_ids == rows[7].block_ids

    copies = driver.blocks(8)
    for step in range(7):
        grows = driver.blocks(3 * 4) if step in (1, 5) else ()
        result = driver.step(
            cow=((1, shared, copies[0]), (4, shared, copies[1])) if step == 0 else (),
            grow_rows=(1, 4, 7) if grows else (),
            grow_block_ids=grows,
        )
        for row, token_id in zip((1, 4, 7), result.token_ids, strict=True):
            drawn[row].append(token_id)
    # The last holder writes in place.
    assert [rows[row].block_ids[1] for row in (1, 4, 7)] == [copies[0], copies[1], shared]
    assert [drawn[4], drawn[1], drawn[7]] == alone


def test_a_held_row_waits_and_goes_on_where_it_stood(make_runner: MakeRunner, expected: Continuations) -> None:
    driver = PlanDriver(make_runner())
    prompts = prompts_of()
    adds = tuple(driver.add(row, prompts[row], room=NUM_TOKENS) for row in (0, 1))
    chunks = tuple(Chunk(row, 0, len(prompts[row]), True) for row in (0, 1))
    drawn: dict[int, list[int]] = {0: [], 1: []}

    def note(result: StepResult, *rows: int) -> None:
        for row, token_id in zip(rows, result.token_ids, strict=True):
            drawn[row].append(token_id)

    note(driver.step(add_rows=adds, chunks=chunks, samples=((0, 0), (1, 1))), 0, 1)
    note(driver.step(hold_rows=(0,)), 1)
    note(driver.step(), 1)
    note(driver.step(hold_rows=(~0, 1)), 0)
    note(driver.step(hold_rows=(~1,)), 0, 1)
    assert drawn == {0: expected["tiny"][0][:3], 1: expected["tiny"][1][:4]}


# -- swaps ------------------------------------------------------------------------------------------------------------


def acked(driver: PlanDriver) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert driver.last_ack is not None
    return driver.last_ack.copies_done, driver.last_ack.copies_failed


@pytest.mark.parametrize("sampling", [GREEDY, SamplingState(temperature=1.0, seed=3, presence_penalty=0.5)], ids=["greedy", "drawn"])
def test_a_swapped_sequence_goes_on_in_other_blocks_as_if_it_had_stayed(make_runner: MakeRunner, sampling: SamplingState) -> None:
    prompt = prompts_of()[1]
    whole = PlanDriver(make_runner()).generate([prompt], num_tokens=NUM_TOKENS, chunk=100, sampling=[sampling])[0]
    driver = PlanDriver(make_runner(num_cpu_blocks=8))
    pool = driver.runner.kv_cache.blocks
    added = driver.add(0, prompt, sampling, room=4)
    tokens = list(driver.step(add_rows=(added,), chunks=(Chunk(0, 0, len(prompt), True),), samples=((0, 0),)).token_ids)
    # The block is read behind the forward pass of its own plan, so it has the key of the token that this step computes.
    tokens += driver.step(swap_out=((10, added.block_ids[0], 7), (11, added.block_ids[1], 2))).token_ids
    assert acked(driver) == ((10, 11), ())
    before = pool[list(added.block_ids[:2])].clone()
    driver.step(remove_rows=(0,))
    assert acked(driver) == ((), ())
    pool[list(added.block_ids)] = float("nan")

    blocks = driver.blocks(len(prompt) + NUM_TOKENS)
    resumed = RowAdd(3, (*prompt, *tokens), len(prompt), len(prompt) + 1, blocks, 0, sampling)
    result = driver.step(
        add_rows=(resumed,),
        swap_in=((12, blocks[0], 7), (13, blocks[1], 2)),
        wait_copies=(12, 13),
        chunks=(Chunk(3, len(prompt) + 1, 1, True),),
        samples=((3, 3),),
    )
    assert acked(driver) == ((12, 13), ())
    tokens += result.token_ids
    # What the last step wrote lies in a third block, so the two came back as they were.
    assert torch.equal(pool[list(blocks[:2])].view(torch.uint8), before.view(torch.uint8))
    while len(tokens) < NUM_TOKENS:
        tokens += driver.step().token_ids
    assert tokens == whole


def test_a_copy_that_is_not_waited_for_ends_behind_the_forward_pass(make_runner: MakeRunner) -> None:
    """So that a plan that forgets to wait is wrong on every machine."""
    driver = PlanDriver(make_runner(num_cpu_blocks=1))
    prompt = prompts_of()[6][:4]
    added = driver.add(0, prompt)
    free = driver.step(add_rows=(added,), chunks=(Chunk(0, 0, 4, True),), samples=((0, 0),)).token_ids
    driver.step(remove_rows=(0,), swap_out=((0, added.block_ids[0], 0),))
    tokens = {}
    for row, waits in ((1, ()), (2, (2,))):
        blocks = driver.blocks(8)
        driver.runner.kv_cache.blocks[list(blocks)] = 0.0
        resumed = RowAdd(row, (*prompt, *free), 4, 4, blocks, 0, GREEDY)
        result = driver.step(
            add_rows=(resumed,), swap_in=((row, blocks[0], 0),), wait_copies=waits, chunks=(Chunk(row, 4, 1, True),), samples=((row, row),)
        )
        assert acked(driver) == ((row,), ())
        driver.step(hold_rows=(row,), wait_copies=(row,))
        assert acked(driver) == ((), ()), "a copy is reported once"
        tokens[row] = result.token_ids
    (expected,) = PlanDriver(make_runner()).generate([prompt], num_tokens=2, chunk=4)
    assert tokens[2] == (expected[1],)
    assert tokens[1] != tokens[2]


def test_a_copy_that_fails_is_told_and_the_rank_goes_on(
    make_runner: MakeRunner, expected: Continuations, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = PlanDriver(make_runner(num_cpu_blocks=2))
    prompt = prompts_of()[1]
    added = driver.add(0, prompt, room=4)
    driver.step(add_rows=(added,), chunks=(Chunk(0, 0, 7, True),), samples=((0, 0),))

    copy_any = torch.Tensor.copy_

    def copy_but_no_block(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if target.shape == driver.runner.kv_cache.blocks.shape[1:]:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return copy_any(target, source)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_but_no_block)
        result = driver.step(swap_out=((5, added.block_ids[0], 0), (6, added.block_ids[1], 1)))
    assert acked(driver) == ((), (5, 6))
    assert result.token_ids == (expected["tiny"][1][1],)
    assert driver.step(swap_out=((7, added.block_ids[0], 0),)).token_ids == (expected["tiny"][1][2],)
    assert acked(driver) == ((7,), ())


def test_a_new_term_hears_nothing_of_the_copies_of_the_old_one(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner(num_cpu_blocks=2))
    driver.runner.swap_pool.start_out(((5, 0, 0), (6, 1, 1)))
    driver.runner.swap_pool.wait((5,))
    driver.runner.clear()
    driver.step()
    assert acked(driver) == ((), ())


def test_a_plan_of_copies_alone_is_performed(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner(num_cpu_blocks=1))
    pool = driver.runner.kv_cache.blocks
    pool[4], pool[9] = 1.5, 2.5
    driver.step(swap_out=((0, 4, 0),))
    driver.step(swap_in=((1, 9, 0),))
    assert acked(driver) == ((1,), ())
    assert (pool[9] == 1.5).all()


# -- sampling state ---------------------------------------------------------------------------------------------------


def test_min_tokens_forbids_stop_tokens_until_it_is_reached(make_runner: MakeRunner, expected: Continuations) -> None:
    prompt, free = prompts_of()[3], expected["tiny"][3]
    state = SamplingState(temperature=0.0, min_tokens=3, stop_ids=(free[0], free[1]))
    tokens = PlanDriver(make_runner()).generate([prompt], num_tokens=NUM_TOKENS, chunk=16, sampling=[state])[0]
    assert not {free[0], free[1]}.intersection(tokens[:3])
    unbound = SamplingState(temperature=0.0, min_tokens=0, stop_ids=(free[0], free[1]))
    assert PlanDriver(make_runner()).generate([prompt], num_tokens=NUM_TOKENS, chunk=16, sampling=[unbound])[0] == free


def test_a_row_whose_every_token_is_forbidden_fails_alone(make_runner: MakeRunner, expected: Continuations) -> None:
    driver = PlanDriver(make_runner())
    prompts = prompts_of()
    closed = SamplingState(temperature=1.0, min_tokens=5, stop_ids=tuple(range(4096)))
    adds = (driver.add(0, prompts[1], closed, room=1), driver.add(1, prompts[3], room=1))
    result = driver.step(add_rows=adds, chunks=(Chunk(0, 0, 7, True), Chunk(1, 0, 33, True)), samples=((0, 0), (1, 1)))
    assert result.row_errors == ((0, RowErrorCode.NO_ALLOWED_TOKEN),)
    assert (result.counts, result.token_ids) == ((0, 1), (expected["tiny"][3][0],))


def test_a_row_with_nan_fails_alone_and_may_decode_once_more_before_it_is_removed(
    make_runner: MakeRunner, models: dict[str, TransformersModel], expected: Continuations
) -> None:
    poisoned = 7
    weights = models["tiny"].module.get_input_embeddings().weight
    before = weights[poisoned].clone()
    weights[poisoned] = float("nan")
    try:
        driver = PlanDriver(make_runner())
        prompts = prompts_of()
        bad = [5, poisoned, 9]
        adds = (driver.add(0, bad, room=4), driver.add(1, prompts[3], room=8), driver.add(2, bad, SamplingState(top_p=0.9), room=4))
        chunks = (Chunk(0, 0, 3, True), Chunk(1, 0, 33, True), Chunk(2, 0, 3, True))
        result = driver.step(add_rows=adds, chunks=chunks, samples=((0, 0), (1, 1), (2, 2)))
        assert result.row_errors == ((0, RowErrorCode.NOT_FINITE), (2, RowErrorCode.NOT_FINITE))
        assert (result.counts, result.token_ids) == ((0, 1, 0), (expected["tiny"][3][0],))
        result = driver.step()
        assert (result.counts, result.token_ids) == ((0, 1, 0), (expected["tiny"][3][1],))
        result = driver.step(remove_rows=(0, 2))
        assert (result.counts, result.token_ids, result.row_errors) == ((1,), (expected["tiny"][3][2],), ())
        # The blocks that it leaves hold NaN; whoever gets them next is not touched by it.
        again = RowAdd(0, tuple(prompts[0]), 1, 0, adds[0].block_ids, 0, GREEDY)
        result = driver.step(add_rows=(again,), chunks=(Chunk(0, 0, 1, True),), samples=((0, 0),))
        assert result.token_ids[0] == expected["tiny"][0][0]
        assert driver.step().token_ids[0] == expected["tiny"][0][1]
    finally:
        weights[poisoned] = before


# -- plans ------------------------------------------------------------------------------------------------------------


def test_an_empty_plan_is_a_heartbeat(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    result = driver.step()
    assert (result.counts, result.device_s) == ((), 0.0)
    assert driver.last_ack is not None
    assert driver.last_ack.error == ""


def test_a_step_without_a_last_chunk_gives_no_token(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    result = driver.step(add_rows=(driver.add(0, prompts_of()[3]),), chunks=(Chunk(0, 0, 5, False),))
    assert result.counts == result.token_ids == ()


def test_checksums_follow_lengths_and_blocks_not_tokens(make_runner: MakeRunner) -> None:
    def checksums(seed: int, room: int) -> tuple[int, int]:
        driver = PlanDriver(make_runner())
        added = driver.add(0, prompts_of(seed=seed)[1], room=room)
        driver.step(add_rows=(added,), chunks=(Chunk(0, 0, 7, True),), samples=((0, 0),), debug_checksum=True)
        first = driver.last_ack
        driver.step(debug_checksum=True)
        second = driver.last_ack
        assert first is not None
        assert second is not None
        return first.checksum, second.checksum

    assert checksums(0, 2) == checksums(1, 2)
    assert checksums(0, 2)[0] != checksums(0, 2)[1]
    assert checksums(0, 2)[0] != checksums(0, 9)[0]


def test_a_checksum_is_that_of_the_lengths_and_tables_that_the_plans_made(make_runner: MakeRunner) -> None:
    def crc(*rows: tuple[int, int, Sequence[int]]) -> int:
        words = [word for row, length, block_ids in rows for word in (row, length, len(block_ids), *block_ids)]
        return zlib.crc32(struct.pack(f"<{len(words)}i", *words))

    def checksum_after(**fields: Any) -> int:
        driver.step(**fields, debug_checksum=True)
        assert driver.last_ack is not None
        return driver.last_ack.checksum

    driver = PlanDriver(make_runner(num_cpu_blocks=2))
    first = RowAdd(6, (5, 6, 7, 8, 9), 5, 0, (3, 1), 0, GREEDY)
    beam = SamplingState(num_beam_candidates=2)
    second = RowAdd(2, (5, 6), 2, 0, (9,), 0, beam)
    chunks = (Chunk(6, 0, 5, True), Chunk(2, 0, 2, True))
    assert checksum_after(add_rows=(first, second), chunks=chunks, samples=((6, 6), (2, 2))) == crc((2, 2, (9,)), (6, 6, (3, 1)))
    changed = checksum_after(
        forks=((2, 4, 1), (4, 0, 2)),
        append_rows=(2, 4),
        append_ids=(7, 8),
        grow_rows=(6, 6),
        grow_block_ids=(20, 21),
        cow=((2, 9, 30), (0, 9, 31)),
        swap_out=((0, 3, 1),),
    )
    assert changed == crc((0, 2, (31,)), (2, 3, (30,)), (4, 3, (9,)), (6, 7, (3, 1, 20, 21)))
    assert checksum_after(remove_rows=(4, 6)) == crc((0, 2, (31,)), (2, 3, (30,)))
    driver.runner.clear()
    assert checksum_after() == 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"draft_rows": (0,), "draft_ids": ((1,),)}, "draft_rows"),
        ({"grammars": ((0, Grammar("json", "")),)}, "grammars"),
        ({"forget_grammars": (0,)}, "forget_grammars"),
    ],
)
def test_a_plan_that_asks_for_what_is_not_there_is_refused_by_field(make_runner: MakeRunner, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(NotSupported, match=f"StepPlan.{name} "):
        make_runner().execute(StepPlan(1, 0, **fields))


def test_a_sampling_state_that_asks_for_what_is_not_there_is_refused_by_field(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner())
    with pytest.raises(NotSupported, match=r"SamplingState.grammar_id = 0 is not supported"):
        driver.step(add_rows=(driver.add(0, [1, 2], SamplingState(grammar_id=0)),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remove_rows": (3,)}, "row 3 is not in the batch"),
        ({"add_rows": (RowAdd(0, (1,), 1, 0, (0,), 0, GREEDY),)}, "row 0 is in use"),
        ({"add_rows": (RowAdd(10, (1,), 1, 0, (0,), 0, GREEDY),)}, "outside the batch"),
        ({"add_rows": (RowAdd(1, (4096,), 1, 0, (0,), 0, GREEDY),)}, "ids are below 4096"),
        ({"add_rows": (RowAdd(1, (1,) * 201, 201, 0, (0,), 0, GREEDY),)}, "200 fit"),
        ({"add_rows": (RowAdd(1, (1,), 1, 0, (256,), 0, GREEDY),)}, "ids are below 256"),
        ({"add_rows": (RowAdd(1, (1,), 1, 0, (0,), 7, GREEDY),)}, "adapter 7"),
        ({"grow_rows": (0,), "grow_block_ids": (-1,)}, "row 0 has 2 blocks and gets"),
        ({"chunks": (Chunk(0, 1, 3, False),)}, "row 0 is to compute tokens 1 to 3"),
        ({"chunks": (Chunk(0, 0, 8, False),)}, "row 0 is to compute tokens 0 to 7"),
        ({"chunks": (Chunk(0, 0, 7, True),)}, "not at all after its last chunk"),
        ({"chunks": (Chunk(0, 0, 3, True),), "samples": ((0, 0),)}, "3 of 7 tokens computed"),
        ({"chunks": (Chunk(0, 0, 7, True),), "samples": ((0, 0), (0, 0))}, "samples a row twice"),
        ({"chunks": (Chunk(0, 0, 7, True),), "samples": ((0, 0), (1, 1))}, "computes only"),
        ({"samples": ((0, 0),)}, "computes none"),
        ({"cow": ((0, 200, 1),)}, "row 0 does not hold block 200, which is to be copied to 1"),
        ({"cow": ((5, 0, 1),)}, "row 5 is not in the batch"),
        ({"cow": ((0, 7, 9), (0, 8, 9))}, "copies two blocks into one"),
        ({"forks": ((0, 0, 1),)}, "row 0 is in use"),
        ({"forks": ((5, 1, 1),)}, "row 5 is not in the batch"),
        ({"add_rows": (RowAdd(1, (1,), 2, 0, (9,), 0, GREEDY),)}, "row 1 has 1 tokens, 2 of them are its prompt"),
        ({"add_rows": (RowAdd(1, (1,), 1, 2, (9,), 0, GREEDY),)}, "row 1 has 2 computed tokens of 1 in 1 blocks"),
        ({"swap_out": ((4, 0, 0),)}, "copy 4 is between block 0 of 256 on the device and block 0 of 0 in CPU memory"),
        ({"hold_rows": (~5,)}, "row 5 is not in the batch"),
    ],
)
def test_a_plan_that_contradicts_the_batch_is_an_error_with_the_values(
    make_runner: MakeRunner, fields: dict[str, Any], message: str
) -> None:
    driver = PlanDriver(make_runner())
    driver.free_blocks.remove(0)
    driver.step(add_rows=(driver.add(0, prompts_of()[1]),))
    with pytest.raises(InternalError, match=message):
        driver.step(**fields)


def test_a_row_without_a_slot_for_its_token_is_an_error(make_runner: MakeRunner) -> None:
    driver = PlanDriver(make_runner(block_size=1))
    driver.step(add_rows=(driver.add(0, [5, 6]),), chunks=(Chunk(0, 0, 2, True),), samples=((0, 0),))
    with pytest.raises(InternalError, match="slots for 2"):
        driver.step()
