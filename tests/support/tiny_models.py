"""Models small enough to make in a test: random weights, real shapes, the built-in model's tokenizer."""

import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

DEMO_MODEL: Final = Path(__file__).resolve().parents[2] / "src/quire/demo_model"

_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def save_tiny_llama(folder: Path, **config: Any) -> Path:
    """A random Llama of 2 layers that knows 4096 tokens and 256 positions."""
    return save_tiny_model(folder, "llama", **{**_SIZES, "tie_word_embeddings": False, **config})


def save_tiny_model(folder: Path, family: str, *, seed: int = 0, **config: Any) -> Path:
    """A random model of any family that transformers knows, in float32, with a tokenizer; returns its folder.

    Matrices are three times what the family would draw: logits of a fresh model hardly vary, and wrong ones would pass.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    return folder
