"""Greedy tokens in float32 are those that transformers' own generate gives, whatever the batch, the chunks, the blocks and the ranks."""

from collections.abc import Sequence

import pytest
import torch
from plan_driver import PlanDriver
from reference_models import MODELS, NUM_TOKENS, LoadReference, ReferenceModel

from quire.worker.collectives import Collective
from quire.worker.kv_cache import KvCache
from quire.worker.runner import Runner


def generate(
    model: ReferenceModel, size: int, prompts: Sequence[Sequence[int]], *, block_size: int, chunk: int, stagger: int
) -> list[list[int]]:
    """What the ranks draw, which must be the same on each."""

    def work(collective: Collective | None) -> list[list[int]]:
        part = model.parts[size][0 if collective is None else collective.rank]
        folder = part.folder
        num_blocks = sum(-(-(len(prompt) + NUM_TOKENS) // block_size) + 1 for prompt in prompts)
        kv_cache = KvCache(
            num_blocks=num_blocks,
            num_layers=folder.num_layers,
            num_kv_heads=part.num_kv_heads,
            block_size=block_size,
            head_dim=folder.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        runner = Runner(part, kv_cache, rank=0, max_rows=len(prompts), max_model_len=128, device="cpu")
        return PlanDriver(runner).generate(prompts, num_tokens=NUM_TOKENS, chunk=chunk, stagger=stagger)

    if size == 1:
        return work(None)
    first, *others = model.ranks[size].run(work)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("block_size", "chunk", "stagger"), [(1, 7, 1), (16, 1, 0), (64, 16, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_in_one_batch(load_model: LoadReference, name: str, block_size: int, chunk: int, stagger: int, size: int) -> None:
    model = load_model(name)
    assert generate(model, size, model.prompts, block_size=block_size, chunk=chunk, stagger=stagger) == model.expected


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("index", "block_size", "chunk"), [(0, 64, 1), (3, 16, 7), (8, 1, 16)])
@pytest.mark.parametrize("name", MODELS)
def test_alone(load_model: LoadReference, name: str, index: int, block_size: int, chunk: int, size: int) -> None:
    model = load_model(name)
    assert generate(model, size, [model.prompts[index]], block_size=block_size, chunk=chunk, stagger=0) == [model.expected[index]]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_combination(load_model: LoadReference, name: str, block_size: int, chunk: int, size: int) -> None:
    model = load_model(name)
    assert generate(model, size, model.prompts, block_size=block_size, chunk=chunk, stagger=2) == model.expected
    for index in (0, 3, 8):
        assert generate(model, size, [model.prompts[index]], block_size=block_size, chunk=chunk, stagger=0) == [model.expected[index]]
