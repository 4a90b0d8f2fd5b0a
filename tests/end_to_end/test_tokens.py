"""The whole path through real processes: what comes out of gRPC is what transformers generates."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import generate_reference, wait_for
from tokenizers import Tokenizer

from quire.client import AsyncClient, Client
from quire.common.errors import InvalidRequest, NotSupported

MAX_TOKENS = 40
STORIES = [
    "Once upon a time",
    "The old king had three sons, and",
    "In the middle of the forest there stood a little house",
    "“Who are you?” asked the fox.",
    "Snow fell",
    "A long time ago, when wishes still came true, a tailor who was poor but merry set out to see the world with nothing but",
    "It was night. The wolf",
    "你好 🦊",
]


def random_prompts(*, seed: int, vocab_size: int, max_len: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(rng.randint(1, max_len))] for _ in range(8)]


def greedy_alone(address: str, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
    with Client(address) as client:
        return [list(client.generate(prompt, temperature=0, max_tokens=max_tokens).token_ids) for prompt in prompts]


def greedy_together(address: str, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with AsyncClient(address) as client:
            generations = await asyncio.gather(*(client.generate(prompt, temperature=0, max_tokens=max_tokens) for prompt in prompts))
            return [list(generation.token_ids) for generation in generations]

    return asyncio.run(run())


def test_the_built_in_model_gives_the_tokens_of_transformers_alone_and_8_at_once(built_in: str, demo_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    prompts = [tokenizer.encode(story).ids for story in STORIES]
    expected = generate_reference(demo_model, prompts, max_tokens=MAX_TOKENS)
    assert greedy_alone(built_in, prompts, max_tokens=MAX_TOKENS) == expected
    assert greedy_together(built_in, prompts, max_tokens=MAX_TOKENS) == expected


def test_a_random_llama_gives_the_tokens_of_transformers_alone_and_8_at_once(tiny: str, tiny_llama: Path) -> None:
    prompts = random_prompts(seed=1, vocab_size=4096, max_len=70)
    expected = generate_reference(tiny_llama, prompts, max_tokens=MAX_TOKENS)
    assert greedy_together(tiny, prompts, max_tokens=MAX_TOKENS) == expected  # first, so that nothing is in the prefix cache
    assert greedy_alone(tiny, prompts, max_tokens=MAX_TOKENS) == expected


def test_a_prompt_found_in_the_prefix_cache_gives_the_same_tokens(tiny: str) -> None:
    (prompt,) = random_prompts(seed=2, vocab_size=4096, max_len=70)[:1]
    prompt = (prompt * 10)[:32]
    with Client(tiny) as client:
        first = client.generate(prompt, temperature=0, max_tokens=20)
        second = client.generate(prompt, temperature=0, max_tokens=20)
        apart = client.generate(prompt, temperature=0, max_tokens=20, cache_salt="mine")
    assert (first.usage.num_cached_tokens, second.usage.num_cached_tokens, apart.usage.num_cached_tokens) == (0, 28, 0)
    assert first.token_ids == second.token_ids == apart.token_ids


def test_a_seed_draws_the_same_tokens_alone_and_in_a_crowd(built_in: str) -> None:
    with Client(built_in) as client:
        alone = [client.generate(story, seed=seed, max_tokens=MAX_TOKENS) for seed, story in enumerate(STORIES)]
        unseeded = client.generate(STORIES[0], max_tokens=MAX_TOKENS)
        again = client.generate(STORIES[0], max_tokens=MAX_TOKENS, seed=unseeded.seed)

    async def crowd() -> list[tuple[int, ...]]:
        async with AsyncClient(built_in) as client:
            calls = (client.generate(story, seed=seed, max_tokens=MAX_TOKENS) for seed, story in enumerate(STORIES))
            return [generation.token_ids for generation in await asyncio.gather(*calls)]

    assert asyncio.run(crowd()) == [generation.token_ids for generation in alone]
    assert unseeded.token_ids == again.token_ids
    assert len({generation.token_ids for generation in alone}) == len(STORIES)


def test_streamed_text_is_the_decoded_text_and_usage_counts_its_tokens(built_in: str, demo_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    with Client(built_in) as client:
        deltas = list(client.stream("Once upon a time", max_tokens=60, seed=7, ignore_eos=True))
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert len(token_ids) == 60
    assert len(deltas) > 10, "tokens come as they are made, not at the end"
    last = deltas[-1]
    assert last.usage is not None
    assert last.timings is not None
    assert (last.finish_reason, last.usage.num_completion_tokens, last.seed) == ("length", 60, 7)
    assert 0 < last.timings.time_to_first_token_s <= last.timings.total_s


def test_a_stop_string_ends_the_text_in_front_of_it(built_in: str) -> None:
    with Client(built_in) as client:
        free = client.generate("Once upon a time", seed=3, max_tokens=60, ignore_eos=True)
        stop = free.text[20:26]
        stopped = client.generate("Once upon a time", seed=3, max_tokens=60, ignore_eos=True, stop=stop)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.choices[0].stopped_by) == ("stop", stop)
    assert stopped.usage.num_completion_tokens == len(stopped.token_ids)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_are_found_across_the_borders_of_tokens_in_each_of_n_sequences(built_in: str, include: bool) -> None:
    options: dict[str, Any] = {"seed": 5, "temperature": 1.0, "max_tokens": 48, "ignore_eos": True, "n": 3}
    with Client(built_in) as client:
        free = client.generate("Once upon a time", **options)
        spans = [client.detokenize([token_id]) for token_id in free.choices[1].token_ids]
        # From the middle of one token to the middle of the next but one.
        first = next(i for i in range(8, 40) if all(len(span) > 2 for span in spans[i : i + 3]))
        stop = spans[first][1:] + spans[first + 1] + spans[first + 2][:2]
        whole = client.generate("Once upon a time", **options, stop=[stop, "never\x00said"], include_stop_string=include)
        deltas = list(client.stream("Once upon a time", **options, stop=[stop, "never\x00said"], include_stop_string=include))
    assert stop in free.choices[1].text
    for choice, free_choice in zip(whole.choices, free.choices, strict=True):
        place = free_choice.text.find(stop)
        expected = free_choice.text if place < 0 else free_choice.text[: place + (len(stop) if include else 0)]
        assert (choice.text, choice.stopped_by) == (expected, None if place < 0 else stop)
        assert choice.token_ids == free_choice.token_ids[: len(choice.token_ids)]
        assert "".join(delta.text for delta in deltas if delta.index == choice.index) == choice.text
        assert tuple(i for delta in deltas if delta.index == choice.index for i in delta.token_ids) == choice.token_ids
    assert len(whole.choices[1].token_ids) < 48
    assert whole.usage.num_completion_tokens == sum(len(choice.token_ids) for choice in whole.choices)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.num_completion_tokens == whole.usage.num_completion_tokens


def test_timings_are_parts_of_the_whole(built_in: str) -> None:
    with Client(built_in) as client:
        timings = client.generate("Once upon a time", max_tokens=8, ignore_eos=True).timings
    assert min(timings.queue_s, timings.prefill_s, timings.decode_s) >= 0
    assert 0 < timings.time_to_first_token_s <= timings.total_s
    assert timings.queue_s + timings.prefill_s + timings.decode_s + timings.preempted_s <= timings.total_s


def test_a_chat_tells_a_story_and_ends_by_itself(built_in: str) -> None:
    with Client(built_in) as client:
        reply = client.chat([{"role": "user", "content": "Tell me a story about a fox and a lantern."}], seed=1, max_tokens=400)
    assert "fox" in reply.text
    assert reply.finish_reason == "stop"
    assert "<|" not in reply.text


def test_a_cancelled_stream_gives_its_blocks_back(tiny: str) -> None:
    with Client(tiny) as client:
        with client.stream([5, 6, 7], temperature=0, max_tokens=240, ignore_eos=True) as stream:
            next(iter(stream))
            assert client.cluster.groups()[0].gpu_blocks.num_held > 0
            stream.cancel()
        wait_for(lambda: client.cluster.groups()[0].gpu_blocks.num_held == 0, timeout_s=10)
        (blocks,) = client.cluster.blocks()
        assert set(blocks.gpu_ref_counts) == {0}
        assert client.cluster.queue().num_waiting_requests == 0


@pytest.mark.parametrize("transport", ["generate", "stream"])
def test_a_bad_request_is_refused_with_its_numbers_and_nothing_is_lost(tiny: str, transport: str) -> None:
    with Client(tiny) as client:
        call = client.generate if transport == "generate" else lambda *args, **options: list(client.stream(*args, **options))
        with pytest.raises(InvalidRequest, match="300"):
            call([5] * 300, max_tokens=1)
        with pytest.raises(InvalidRequest, match="n is 9; it takes 1 to 8"):
            call([5], max_tokens=1, n=9)
        with pytest.raises(NotSupported, match="structured_output"):
            call([5], max_tokens=1, regex="a")
        assert client.cluster.groups()[0].gpu_blocks.num_held == 0
        assert len(client.generate([5], max_tokens=3, ignore_eos=True).token_ids) == 3
