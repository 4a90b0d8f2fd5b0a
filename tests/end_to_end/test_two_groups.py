"""Two groups of two ranks with far too few blocks, under 64 streams of which half are given up in their midst."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from serving import ServeProcess, wait_for

from quire.client import AsyncClient, Client

pytestmark = pytest.mark.slow

NUM_STREAMS = 64
NUM_TOKENS = 40
# Of 16 tokens each: a story takes four, so that a pool holds the ends of four stories, and more than that run at once.
NUM_BLOCKS = 18


def request(index: int) -> dict[str, Any]:
    """Every other one greedy, the others seeded."""
    chance = {"temperature": 0.0} if index % 2 else {"seed": 100 + index, "temperature": 0.9}
    return {"prompt": f"Once upon a time there were {index} small", "max_tokens": NUM_TOKENS, "ignore_eos": True, **chance}


async def run_streams(address: str, *, num_wanted: list[int]) -> tuple[list[list[int]], int]:
    """Of each stream its first num_wanted tokens, whereupon it is given up; and the preemptions of those that were not."""
    num_preemptions = 0

    async def read(index: int) -> list[int]:
        nonlocal num_preemptions
        token_ids: list[int] = []
        async with client.stream(**request(index)) as stream:
            async for delta in stream:
                token_ids += delta.token_ids
                num_preemptions += 0 if delta.timings is None else delta.timings.num_preemptions
                if len(token_ids) >= num_wanted[index] < NUM_TOKENS:
                    return token_ids
        return token_ids

    async with AsyncClient(address) as client:
        tokens = await asyncio.gather(*(read(index) for index in range(NUM_STREAMS)))
    return list(tokens), num_preemptions


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_whoever_is_not_given_up_gets_the_tokens_of_a_large_pool(tmp_path: Path, preemption: str) -> None:
    whole = [NUM_TOKENS] * NUM_STREAMS
    large = tmp_path / "large"
    large.mkdir()
    with ServeProcess(large) as serve:
        expected, num_preemptions = asyncio.run(run_streams(serve.wait_ready(), num_wanted=whole))
    assert num_preemptions == 0
    chance = random.Random(preemption)
    num_wanted = list(whole)
    for index in chance.sample(range(NUM_STREAMS), NUM_STREAMS // 2):
        num_wanted[index] = chance.randrange(1, NUM_TOKENS)
    settings = ["--groups", "2", "--tensor-parallel-size", "2", "--gpu-blocks", str(NUM_BLOCKS), "--preemption", preemption]
    with ServeProcess(tmp_path, *settings) as serve:
        address = serve.wait_ready()
        actual, num_preemptions = asyncio.run(run_streams(address, num_wanted=num_wanted))
        assert num_preemptions > 0, "the pools were large enough for all"
        for index in range(NUM_STREAMS):
            assert actual[index][: num_wanted[index]] == expected[index][: num_wanted[index]], index
        with Client(address) as client:

            def has_freed_all() -> bool:
                return all(pool.num_held == 0 for group in client.cluster.groups() for pool in (group.gpu_blocks, group.cpu_blocks))

            wait_for(has_freed_all, timeout_s=20)
