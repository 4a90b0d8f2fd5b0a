"""The real scheduler over real ranks: prefix hits, forced swaps and recomputes, and forks change no token (float32)."""

from collections.abc import Callable

import msgspec
import pytest
import torch
from reference_models import MODELS, NUM_TOKENS, LoadReference, ReferenceModel
from scheduled_rank import Outcome, run_scheduled

from quire.common.messages import SamplingState
from quire.worker.collectives import Collective
from quire.worker.kv_cache import KvCache
from quire.worker.runner import Runner

# Prompts of 2, 5 and 3 tokens, twice, then of 8 and 11: each begins in few blocks and grows by two or three more.
SHORT = (4, 6, 9, 4, 6, 9, 14, 10)
# Of 4 tokens: any of these requests fits, all of them need four times as many.
SCARCE_BLOCKS = 7


def on_ranks(model: ReferenceModel, size: int, work: Callable[[Runner], Outcome], *, num_blocks: int, block_size: int = 4) -> Outcome:
    """What every one of `size` ranks gives, which must be the same."""

    def work_on(collective: Collective | None) -> Outcome:
        part = model.parts[size][0 if collective is None else collective.rank]
        kv_cache = KvCache(
            num_blocks=num_blocks,
            num_layers=part.folder.num_layers,
            num_kv_heads=part.num_kv_heads,
            block_size=block_size,
            head_dim=part.folder.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        return work(Runner(part, kv_cache, rank=0, max_rows=8, max_model_len=128, device="cpu", num_cpu_blocks=2 * num_blocks))

    if size == 1:
        return work_on(None)
    first, *others = model.ranks[size].run(work_on)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("name", MODELS)
def test_requests_preempted_many_times_give_the_tokens_of_transformers(
    load_model: LoadReference, name: str, preemption: str, size: int
) -> None:
    model = load_model(name)
    prompts = [model.prompts[index] for index in SHORT]
    outcome = on_ranks(
        model, size, lambda runner: run_scheduled(runner, prompts, num_tokens=NUM_TOKENS, preemption=preemption), num_blocks=SCARCE_BLOCKS
    )
    assert [completions[0] for completions in outcome.completions] == [model.expected[index] for index in SHORT]
    assert outcome.num_preemptions > 3
    assert (outcome.num_copies["out"] > 0) == (preemption == "swap")
    assert outcome.num_copies["in"] <= outcome.num_copies["out"]


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_found_in_part_or_whole_gives_the_tokens_of_transformers(load_model: LoadReference, name: str, block_size: int) -> None:
    model = load_model(name)
    # 33 tokens, again, then its first 32, which fill two blocks of 16 exactly; and 64 tokens twice.
    whole, long = model.prompts[3], model.prompts[8]
    prompts = [whole, whole, whole[:32], long, long]
    outcome = on_ranks(
        model,
        1,
        lambda runner: run_scheduled(runner, prompts, num_tokens=NUM_TOKENS, one_by_one=True),
        num_blocks=256 // block_size,
        block_size=block_size,
    )
    first, second, part, long_first, long_second = (completions[0] for completions in outcome.completions)
    assert first == second == model.expected[3]
    assert long_first == long_second == model.expected[8]
    alone = on_ranks(model, 1, lambda runner: run_scheduled(runner, [whole[:32]], num_tokens=NUM_TOKENS), num_blocks=64, block_size=4)
    assert part == alone.completions[0][0]
    # The last token of a prompt is always computed, so of a whole prompt the last block is not found.
    assert outcome.num_cached_tokens == ([0, 32, 31, 0, 63] if block_size == 1 else [0, 32, 16, 0, 48])


def test_a_seed_draws_the_same_alone_in_a_crowd_after_swaps_after_recomputes_and_on_two_ranks(load_model: LoadReference) -> None:
    model = load_model("llama")
    prompts = [model.prompts[index] for index in SHORT]
    states = [SamplingState(temperature=0.9, top_k=50, top_p=0.95, seed=100 + index) for index in range(len(prompts))]

    def crowd(size: int, preemption: str, num_blocks: int) -> Outcome:
        return on_ranks(
            model,
            size,
            lambda runner: run_scheduled(runner, prompts, num_tokens=NUM_TOKENS, sampling=states, preemption=preemption),
            num_blocks=num_blocks,
        )

    alone = [
        on_ranks(
            model,
            1,
            lambda runner, index=index: run_scheduled(runner, [prompts[index]], num_tokens=NUM_TOKENS, sampling=states[index]),  # type: ignore[misc]
            num_blocks=64,
        ).completions[0]
        for index in range(len(prompts))
    ]
    plenty = crowd(1, "auto", 64)
    assert plenty.num_preemptions == 0
    assert plenty.completions == alone
    for size in (1, 2):
        for preemption in ("swap", "recompute"):
            scarce = crowd(size, preemption, SCARCE_BLOCKS)
            assert scarce.num_preemptions > 0
            assert scarce.completions == alone
    assert len({tuple(completion[0]) for completion in alone}) == len(prompts)


@pytest.mark.parametrize(("preemption", "num_blocks"), [("auto", 64), ("swap", 16), ("recompute", 16)])
def test_four_sequences_share_their_prompts_blocks_and_draw_as_four_requests_would(
    load_model: LoadReference, preemption: str, num_blocks: int
) -> None:
    model = load_model("llama")
    prompts = [model.prompts[10], model.prompts[4]]
    state = SamplingState(temperature=1.0, seed=7)
    together = on_ranks(
        model,
        1,
        lambda runner: run_scheduled(runner, prompts, num_tokens=NUM_TOKENS, sampling=state, num_sequences=4, preemption=preemption),
        num_blocks=num_blocks,
    )
    assert (together.num_preemptions > 0) == (num_blocks == 16)
    # The 11 tokens of the first prompt fill two blocks of 4 and part of a third; until the copies on write all three are shared.
    assert together.most_shared_blocks >= 3
    assert together.num_copies["on write"] >= 3
    for request, prompt in enumerate(prompts):
        for index in range(4):
            single = msgspec.structs.replace(state, sequence_index=index)
            alone = on_ranks(
                model,
                1,
                lambda runner, prompt=prompt, single=single: run_scheduled(  # type: ignore[misc]
                    runner, [prompt], num_tokens=NUM_TOKENS, sampling=[single]
                ),
                num_blocks=64,
            )
            assert together.completions[request][index] == alone.completions[0][0], index
    assert len({tuple(completion) for completion in together.completions[0]}) == 4
