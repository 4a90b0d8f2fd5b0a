"""Greedy tokens in float32 are those that transformers' own generate gives, whatever the batch, the chunks, the blocks and the ranks."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from plan_driver import PlanDriver
from thread_ranks import ThreadRanks, load_parts
from tiny_families import FAMILIES
from tiny_models import DEMO_MODEL, save_tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.common.model_folder import read_model_folder
from quire.worker.collectives import Collective
from quire.worker.kv_cache import KvCache
from quire.worker.models.transformers_model import TransformersModel, load_transformers_model
from quire.worker.runner import Runner

MODELS = ("llama", "qwen3", "mixtral", "gemma2", "gpt2", "opt", "gpt_oss", "demo")
NUM_TOKENS = 8
PROMPT_LENGTHS = (1, 7, 16, 33, 2, 48, 5, 17, 64, 3, 11, 15, 31, 32, 8, 20)


@dataclass(frozen=True)
class Model:
    ranks: dict[int, ThreadRanks]  # by number of ranks
    parts: dict[int, Sequence[TransformersModel]]
    prompts: list[list[int]]
    expected: list[list[int]]


LoadModel = Callable[[str], Model]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> LoadModel:
    """A model, split over 1, 2 and 4 ranks, and what it should say; made once."""

    @cache
    def load_named(name: str) -> Model:
        path = DEMO_MODEL
        if name != "demo":
            family, config = FAMILIES[name]
            path = save_tiny_model(tmp_path_factory.mktemp(name), family, **config)
        folder = read_model_folder(path)
        chance = random.Random(name)
        prompts = [[chance.randrange(3, folder.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
        ranks = {size: ThreadRanks(size) for size in (2, 4)}
        parts = {size: load_parts(folder, ranks[size]) for size in ranks}
        parts[1] = [load_transformers_model(folder, dtype="float32", device="cpu")]
        return Model(ranks, parts, prompts, _generate(path, prompts))

    return load_named


def _generate(path: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0)
    outputs = [model.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in prompts]
    return [output[len(prompt) :] for output, prompt in zip(outputs, prompts, strict=True)]


def generate(model: Model, size: int, prompts: Sequence[Sequence[int]], *, block_size: int, chunk: int, stagger: int) -> list[list[int]]:
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
def test_sixteen_in_one_batch(load: LoadModel, name: str, block_size: int, chunk: int, stagger: int, size: int) -> None:
    model = load(name)
    assert generate(model, size, model.prompts, block_size=block_size, chunk=chunk, stagger=stagger) == model.expected


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("index", "block_size", "chunk"), [(0, 64, 1), (3, 16, 7), (8, 1, 16)])
@pytest.mark.parametrize("name", MODELS)
def test_alone(load: LoadModel, name: str, index: int, block_size: int, chunk: int, size: int) -> None:
    model = load(name)
    assert generate(model, size, [model.prompts[index]], block_size=block_size, chunk=chunk, stagger=0) == [model.expected[index]]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_combination(load: LoadModel, name: str, block_size: int, chunk: int, size: int) -> None:
    model = load(name)
    assert generate(model, size, model.prompts, block_size=block_size, chunk=chunk, stagger=2) == model.expected
    for index in (0, 3, 8):
        assert generate(model, size, [model.prompts[index]], block_size=block_size, chunk=chunk, stagger=0) == [model.expected[index]]
