import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, SIZES
from tiny_models import DEMO_MODEL, save_tiny_llama, save_tiny_model

from quire.common.errors import ConfigError
from quire.common.model_folder import read_model_folder
from quire.worker.models.self_check import check_model
from quire.worker.models.transformers_model import load_transformers_model


def check(folder: Path, dtype: str = "float32", max_model_len: int = 256) -> None:
    model = load_transformers_model(read_model_folder(folder), dtype=dtype, device="cpu")
    check_model(model, dtype=dtype, device="cpu", max_model_len=max_model_len)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_built_in_model_passes_its_check(dtype: str) -> None:
    check(DEMO_MODEL, dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_use_the_attention_they_are_given_pass(tmp_path: Path, name: str) -> None:
    family, config = FAMILIES[name]
    check(save_tiny_model(tmp_path, family, **config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gpt2", "gpt_oss"])
def test_families_pass_in_16_bits(tmp_path: Path, name: str, dtype: str) -> None:
    family, config = FAMILIES[name]
    check(save_tiny_model(tmp_path, family, **config), dtype)


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        (
            "falcon",
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2},
            "0 of its 2 layers use the attention",
        ),
        (
            "bloom",
            {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "seq_length": 256, "bos_token_id": 1, "eos_token_id": 2},
            "0 of its 2 layers use the attention",
        ),
        (
            "mamba",
            {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2},
            "config.json does not say num_attention_heads",
        ),
        (
            "gptj",
            {
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 4,
                "vocab_size": 256,
                "n_positions": 256,
                "rotary_dim": 8,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "0 of its 2 layers use the attention",
        ),
        (
            "llama4_text",
            {**SIZES, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 128, "attention_chunk_size": 16},
            "layers of kind chunked_attention",
        ),
        (
            "llama",
            {
                **SIZES,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
            },
            "set max_model_len to 64 or less",
        ),
    ],
)
def test_families_that_would_give_wrong_tokens_are_refused_by_name_and_reason(
    tmp_path: Path, family: str, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=f"model family '{family}' cannot be served: .*{why}") as caught:
        check(save_tiny_model(tmp_path, family, **config))
    assert caught.value.reason == "FAMILY_NOT_SUPPORTED"


def test_a_cache_that_the_keys_do_not_fit_is_named(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = load_transformers_model(read_model_folder(tmp_path), dtype="float32", device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    model.folder = read_model_folder(tmp_path)
    with pytest.raises(ConfigError, match="keys have 2 heads of 16, the cache holds 4 of 16"):
        check_model(model, dtype="float32", device="cpu", max_model_len=256)


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        check(tmp_path)


def test_a_family_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nobody_knows"}))
    with pytest.raises(ConfigError, match="model family 'nobody_knows' cannot be loaded"):
        check(tmp_path)
