import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES
from tiny_models import save_tiny_llama, save_tiny_model
from transformers import AutoModelForCausalLM

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker.models import checkpoint as checkpoint_file
from quire.worker.models.checkpoint import Checkpoint
from quire.worker.models.transformers_model import load_part, load_transformers_model

TOKEN_IDS = torch.arange(3, 20)


def test_a_model_in_several_files_is_the_model_in_one(tmp_path: Path) -> None:
    one = read_model_folder(save_tiny_llama(tmp_path / "one"))
    AutoModelForCausalLM.from_pretrained(one.path).save_pretrained(tmp_path / "one", max_shard_size="300KB")
    (tmp_path / "one" / "model.safetensors").unlink(missing_ok=True)
    many = read_model_folder(tmp_path / "one")
    again = read_model_folder(save_tiny_llama(tmp_path / "two"))
    assert len(many.weight_files) > 2
    with torch.inference_mode():
        logits = [load_transformers_model(folder, dtype="float32", device="cpu").own_logits(TOKEN_IDS) for folder in (many, again)]
    assert torch.equal(*logits)


def test_tied_embeddings_are_one_tensor_also_when_split(tmp_path: Path) -> None:
    family, config = FAMILIES["tied"]
    folder = read_model_folder(save_tiny_model(tmp_path, family, **config))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for rank, size in ((0, 1), (1, 2)):
        module = load_part(folder, dtype="float32", device="cpu", rank=rank, size=size).module
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert len(module.lm_head.weight) in (513, 257)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_to_the_dtype_that_is_asked_for(tmp_path: Path, saved: torch.dtype, asked: str) -> None:
    save_tiny_llama(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=saved).save_pretrained(tmp_path)
    folder = read_model_folder(tmp_path)
    assert folder.dtype == str(saved).removeprefix("torch.")
    model = load_part(folder, dtype=asked, device="cpu", rank=0, size=1)
    assert {str(parameter.dtype) for parameter in model.module.parameters()} == {f"torch.{asked}"}


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_rank_reads_its_part_of_each_file_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    family, config = FAMILIES[name]
    folder = read_model_folder(save_tiny_model(tmp_path, family, **config))
    made: list[Checkpoint] = []

    def make(folder: ModelFolder) -> Checkpoint:
        made.append(Checkpoint(folder))
        return made[-1]

    monkeypatch.setattr("quire.worker.models.transformers_model.Checkpoint", make)
    models = [load_part(folder, dtype="float32", device="cpu", rank=rank, size=size) for rank, size in ((0, 1), (0, 2), (1, 2))]
    for checkpoint, model in zip(made, models, strict=True):
        assert checkpoint.num_bytes_read == sum(parameter.nbytes for parameter in model.module.parameters())
    assert made[1].num_bytes_read < 0.6 * made[0].num_bytes_read


def test_reading_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(checkpoint_file, "PROGRESS_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    folder = read_model_folder(save_tiny_llama(tmp_path))
    load_transformers_model(folder, dtype="float32", device="cpu")
    lines = [record.message for record in caplog.records if "GiB of weights" in record.message]
    assert len(lines) == 21, "one per tensor"


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read: .*; get the folder again"):
        Checkpoint(read_model_folder(tmp_path))
