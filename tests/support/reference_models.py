"""Tiny models of many families, whole and split, the built-in one natively, and what transformers' generate says after some prompts."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import torch
from thread_ranks import ThreadRanks
from tiny_families import FAMILIES
from tiny_models import DEMO_MODEL, save_tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.common.model_folder import read_model_folder
from quire.worker.models.llama import LlamaModel
from quire.worker.models.load_model import load_model
from quire.worker.models.transformers_model import TransformersModel

MODELS: Final = ("llama", "qwen3", "mixtral", "gemma2", "gpt2", "opt", "gpt_oss", "demo")
NUM_TOKENS: Final = 8
PROMPT_LENGTHS: Final = (1, 7, 16, 33, 2, 48, 5, 17, 64, 3, 11, 15, 31, 32, 8, 20)


@dataclass(frozen=True)
class ReferenceModel:
    """One model, and its completions of NUM_TOKENS tokens, greedy in float32."""

    ranks: dict[int, ThreadRanks]  # by number of ranks
    parts: Mapping[int, Sequence[LlamaModel | TransformersModel]]
    prompts: list[list[int]]  # of PROMPT_LENGTHS
    expected: list[list[int]]


LoadReference: TypeAlias = Callable[[str], ReferenceModel]


def load_reference(name: str, folder_for: Callable[[str], Path]) -> ReferenceModel:
    """A model, split over 1, 2 and 4 ranks, and what it should say. folder_for: makes an empty folder."""
    path = DEMO_MODEL
    if name != "demo":
        family, config = FAMILIES[name]
        path = save_tiny_model(folder_for(name), family, **config)
    folder = read_model_folder(path)
    chance = random.Random(name)
    prompts = [[chance.randrange(3, folder.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
    ranks = {size: ThreadRanks(size) for size in (2, 4)}
    backend = "native" if name == "demo" else "transformers"
    load = partial(load_model, folder, dtype="float32", device="cpu", backend=backend)
    parts = {size: [load(collective=collective) for collective in ranks[size].collectives] for size in ranks}
    parts[1] = [load()]
    return ReferenceModel(ranks, parts, prompts, _generate(path, prompts))


def _generate(path: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0)
    outputs = [model.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in prompts]
    return [output[len(prompt) :] for output, prompt in zip(outputs, prompts, strict=True)]
