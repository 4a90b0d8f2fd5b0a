import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.common.errors import ConfigError
from quire.common.model_folder import read_model_folder
from quire.worker.gpu_memory import weight_bytes
from quire.worker.models.dummy_weights import count_built_parameters
from quire.worker.models.self_check import check_model
from quire.worker.models.transformers_model import load_part, load_transformers_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3 with biases": {"attention_bias": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {},  # not counted from its config
}


def config_folder(folder: Path, family: str) -> Path:
    """A folder with a config.json alone."""
    (folder / "config.json").write_text(json.dumps({"model_type": family.split()[0], **SIZES, **FAMILIES[family]}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_they_are_built(family: str, tmp_path: Path) -> None:
    folder = read_model_folder(config_folder(tmp_path, family), needs_weights=False)
    built = count_built_parameters(folder)
    assert folder.num_parameters == (None if family == "gemma2" else built)
    assert weight_bytes(folder, dtype="bfloat16", num_ranks=2) == built


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_dummy_weights_passes_the_check_at_load(family: str, dtype: str, tmp_path: Path) -> None:
    torch.set_grad_enabled(False)
    folder = read_model_folder(config_folder(tmp_path, family), needs_weights=False)
    model = load_transformers_model(folder, dtype=dtype, device="cpu", dummy_weights=True)
    check_model(model, dtype=dtype, device="cpu", max_model_len=128)


def test_dummy_weights_are_the_same_each_time_and_spread_as_said(tmp_path: Path) -> None:
    folder = read_model_folder(config_folder(tmp_path, "llama"), needs_weights=False)
    first, second = (load_part(folder, dtype="float32", device="cpu", rank=0, size=1, dummy_weights=True).module for _ in range(2))
    weights, others = dict(first.named_parameters()), dict(second.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((weights["model.norm.weight"] == 1).all())
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_a_rank_makes_its_part_alone_and_what_ranks_hold_whole_is_equal(tmp_path: Path) -> None:
    folder = read_model_folder(config_folder(tmp_path, "llama"), needs_weights=False)
    parts = [load_part(folder, dtype="float32", device="cpu", rank=rank, size=2, dummy_weights=True).module for rank in range(2)]
    for part in parts:
        assert part.model.layers[0].self_attn.k_proj.weight.shape == (16, 64)
        assert part.model.embed_tokens.weight.shape == (250, 64)
    assert torch.equal(parts[0].model.norm.weight, parts[1].model.norm.weight)


def test_weights_that_are_there_are_left_alone(tmp_path: Path) -> None:
    (config_folder(tmp_path, "llama") / "model.safetensors").write_text("no such thing")
    folder = read_model_folder(tmp_path, needs_weights=False)
    assert folder.weight_files == ()
    load_transformers_model(folder, dtype="float32", device="cpu", dummy_weights=True)


def test_without_dummy_weights_a_config_alone_is_refused(tmp_path: Path) -> None:
    (config_folder(tmp_path, "llama") / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no .*safetensors.* or serve it with --dummy-weights"):
        read_model_folder(tmp_path)
