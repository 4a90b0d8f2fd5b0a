"""`quire serve --print-config`: what is in force, from all sources, in a form that can be given back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def serve(folder: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "quire.cli.main", "serve", "--print-config", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env={**os.environ, **environ}, check=False)


def printed(result: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    values = yaml.safe_load(result.stdout)
    assert isinstance(values, dict)
    return values


def test_what_is_in_force_has_everything_decided_and_can_be_given_back(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text("listen: 127.0.0.1:7\nmodels:\n  - {block_size: 32, max_sequences: 4}\n")
    first = printed(serve(tmp_path, "--config", "given.yaml", "--max-model-len", "1024", QUIRE_MAX_SEQUENCES="5"))
    model = first["models"][0]
    assert first["listen"] == "127.0.0.1:7"
    assert {name: model[name] for name in ("name", "device", "dtype", "block_size", "max_sequences", "max_model_len", "gpu_blocks")} == {
        "name": "quire-tales",
        "device": "cpu",
        "dtype": "float32",
        "block_size": 32,
        "max_sequences": 5,
        "max_model_len": 1024,
        "gpu_blocks": 5 * 32,
    }
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first))
    assert printed(serve(tmp_path, QUIRE_CONFIG="again.yaml")) == first


def test_a_file_that_is_no_mapping_or_no_yaml_is_one_line(tmp_path: Path) -> None:
    for text, message in (("- 1", "must hold a mapping"), ("{", "is not YAML"), ("models: 3", "must be a list of one mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        result = serve(tmp_path, "--config", "bad.yaml")
        assert result.returncode == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_misspelt_variable_is_named_and_a_foreign_one_is_left_alone(tmp_path: Path) -> None:
    result = serve(tmp_path, QUIRE_MAX_MODEL_LENGTH="512")
    assert result.returncode == 1
    assert "QUIRE_MAX_MODEL_LENGTH, which is no setting; did you mean QUIRE_MAX_MODEL_LEN?" in result.stderr
    printed(serve(tmp_path, QUIRE_PORT="tcp://10.0.0.1:50051", QUIRE_SERVICE_HOST="10.0.0.1"))


def test_dummy_weights_need_a_tokenizer_for_the_gateway_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 128, **sizes}))
    model = printed(serve(tmp_path, str(tmp_path), "--dummy-weights"))["models"][0]
    assert (model["dummy_weights"], model["max_model_len"]) == (True, 128)
    command = [sys.executable, "-P", "-m", "quire.cli.main", "serve", str(tmp_path), "--dummy-weights", "--listen", "127.0.0.1:0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "has no tokenizer.json, which the gateway needs even for dummy weights" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
