"""A model over two ranks, through the whole path."""

import asyncio
from pathlib import Path

from serving import ServeProcess, generate_reference
from tiny_families import FAMILIES
from tiny_models import save_tiny_model

from quire.client import AsyncClient, Client

MAX_TOKENS = 20


def test_two_ranks_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    family, config = FAMILIES["qwen3"]
    folder = save_tiny_model(tmp_path / "qwen3", family, **{**config, "vocab_size": 4096})
    prompts = [[(7 * i + j) % 4000 + 3 for j in range(5 + 11 * i)] for i in range(6)]
    expected = generate_reference(folder, prompts, max_tokens=MAX_TOKENS)

    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            generations = await asyncio.gather(*(client.generate(prompt, temperature=0, max_tokens=MAX_TOKENS) for prompt in prompts))
            return [list(generation.token_ids) for generation in generations]

    arguments = [str(folder), "--tensor-parallel-size", "2", "--max-batched-tokens", "24", "--max-sequences", "4"]
    with ServeProcess(tmp_path, *arguments) as serve:
        address = serve.wait_ready()
        assert sum("-m quire.worker.rank_process" in command for command in serve.processes().values()) == 2
        assert asyncio.run(run(address)) == expected
        with Client(address) as client:
            assert client.cluster.groups()[0].detail == ""


def test_the_status_says_what_the_ranks_of_a_family_do_not_share_out(tmp_path: Path) -> None:
    family, config = FAMILIES["phi3"]
    folder = save_tiny_model(tmp_path / "phi3", family, **{**config, "vocab_size": 4096})
    prompts = [[5, 6, 7, 8, 9, 10, 11]]
    expected = generate_reference(folder, prompts, max_tokens=MAX_TOKENS)
    with ServeProcess(tmp_path, str(folder), "--tensor-parallel-size", "2") as serve, Client(serve.wait_ready()) as client:
        (group,) = client.cluster.groups()
        assert "each rank holds all 2 key and value heads: the plan of family 'phi3' does not split them" in group.detail
        assert [list(client.generate(prompts[0], temperature=0, max_tokens=MAX_TOKENS).token_ids)] == expected
