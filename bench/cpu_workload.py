"""What `quire bench cpu` computes: a random Llama that fits any machine, and requests of mixed lengths."""

import importlib.resources
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# 58 M parameters.
MODEL_CONFIG: Final[dict[str, Any]] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
PROMPT_TOKENS: Final = (16, 256)
OUTPUT_TOKENS: Final = (16, 128)

Requests: TypeAlias = Sequence[tuple[Sequence[int], int]]  # (prompt, tokens to generate)


def make_requests(num_requests: int, *, seed: int = 1) -> list[tuple[list[int], int]]:
    """Prompts of random tokens; lengths of both kinds are uniform."""
    chance = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        prompt = [chance.randrange(3, MODEL_CONFIG["vocab_size"] - 1) for _ in range(chance.randint(*PROMPT_TOKENS))]
        requests.append((prompt, chance.randint(*OUTPUT_TOKENS)))
    return requests


def save_model(folder: Path, *, seed: int = 0) -> None:
    """A model of random weights in float32, with the built-in model's tokenizer, which nothing here uses."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**MODEL_CONFIG)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(str(importlib.resources.files("quire.demo_model") / name), folder / name)
