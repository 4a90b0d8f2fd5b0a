"""A pool too small for those who run: preempted by swap or by recompute, every request ends with its own tokens."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ServeProcess, generate_reference, wait_for
from tokenizers import Tokenizer

from quire.bench.story_prompts import STORY_PROMPTS
from quire.client import AsyncClient, Client
from quire.client.results import Generation

MAX_TOKENS = 48
# Of 16 tokens each. Any one story fits; the eight together would take three times as many.
NUM_BLOCKS = 10


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted_requests_end_with_the_tokens_of_transformers(mode: str, demo_model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    prompts = [tokenizer.encode(story).ids for story in STORY_PROMPTS]
    expected = generate_reference(demo_model, prompts, max_tokens=MAX_TOKENS)
    journal = tmp_path / "journal"
    settings = ["--gpu-blocks", str(NUM_BLOCKS), "--preemption", mode, "--scheduler-journal", str(journal)]
    settings += ["--swap-memory", "64Mi"] if mode == "swap" else []
    with ServeProcess(tmp_path, *settings) as serve:
        address = serve.wait_ready()

        async def crowd() -> list[Generation]:
            async with AsyncClient(address) as client:
                calls = [client.generate(prompt, temperature=0, max_tokens=MAX_TOKENS) for prompt in prompts]
                return list(await asyncio.gather(*calls))

        generations = asyncio.run(crowd())
        assert [list(generation.token_ids) for generation in generations] == expected
        num_preemptions = sum(generation.timings.num_preemptions for generation in generations)
        assert num_preemptions > 0, "the pool was large enough for all"
        preempted = [generation.timings for generation in generations if generation.timings.num_preemptions]
        assert all(0 < timings.preempted_s < timings.total_s for timings in preempted)
        with Client(address) as client:
            wait_for(lambda: client.cluster.groups()[0].gpu_blocks.num_held == 0, timeout_s=10)
            wait_for(lambda: client.cluster.groups()[0].cpu_blocks.num_held == 0, timeout_s=10)

    replay = [sys.executable, "-P", "-m", "quire.cli.main", "debug", "replay", str(journal)]
    summary = subprocess.run(replay, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "gave the same" in summary
    rows = [line.split() for line in summary.splitlines() if line.endswith("tokens")]
    assert len(rows) == len(prompts)
    assert sum(int(row[3]) for row in rows) == num_preemptions
    victims = [row[0] for row in rows if int(row[3])]
    stories = [
        subprocess.run([*replay, "--request", victim], capture_output=True, text=True, timeout=60, check=True).stdout for victim in victims
    ]
    assert all("joins quire-tales-0" in story for story in stories)
    # Who is preempted before anything of it is computed has nothing to swap.
    expected_kind = "swapped out to make room for" if mode == "swap" else "preempted for recompute to make room for"
    assert any(expected_kind in story for story in stories)
    assert mode == "swap" or not any("swapped out" in story for story in stories)
