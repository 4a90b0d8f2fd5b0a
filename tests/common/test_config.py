"""Settings: where they come from, what is refused, and with which words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quire.common.config import ModelConfig, ServeConfig, config_as_dict, parse_bytes, plan_model, resolve_config
from quire.common.errors import ConfigError, QuireError
from quire.common.gpu import torch_sees_gpu
from quire.common.model_folder import read_model_folder


def test_flags_go_before_environment_before_file_before_defaults() -> None:
    file = {"listen": "127.0.0.1:1", "log_level": "debug", "models": [{"block_size": 4, "max_sequences": 5, "gpu_blocks": 6}]}
    environ = {"QUIRE_LISTEN": "127.0.0.1:2", "QUIRE_BLOCK_SIZE": "8", "QUIRE_MAX_SEQUENCES": "7"}
    config = resolve_config({"listen": "127.0.0.1:3", "block_size": "32"}, environ=environ, file=file)
    model = config.models[0]
    assert (config.listen, config.log_level, config.request_timeout_s) == ("127.0.0.1:3", "debug", 600.0)
    assert (model.block_size, model.max_sequences, model.gpu_blocks, model.preemption) == (32, 7, 6, "auto")


@pytest.mark.parametrize(
    ("text", "expected"), [("2Gi", 2**31), ("500M", 500_000_000), (4096, 4096), ("1.5ki", 1536), ("64MiB", 2**26), ("7", 7)]
)
def test_bytes_are_read_with_their_unit(text: Any, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tensor_parallel_size": "3"}, "8 query heads cannot be split over 3 ranks; use 1, 2, 4 or 8"),
        ({"max_model_len": "4096"}, "max_model_len 4096 is more than the 2048 positions of the model"),
        ({"block_size": "12"}, "block_size is 12; it must be a power of two"),
        ({"gpu_blocks": "0"}, "gpu_blocks is 0; it must be at least 1"),
        ({"gpu_blocks": "9", "kv_cache_memory": "1Gi"}, "gpu_blocks 9 and kv_cache_memory 1073741824 say the same thing twice"),
        ({"kv_cache_memory": "1k"}, "kv_cache_memory 1000 holds no block; one takes 131072 bytes"),
        ({"swap_memory": "1k"}, "swap_memory 1000 holds no block; one takes 131072 bytes"),
        ({"preemption": "swap", "swap_memory": 0}, "preemption = swap needs memory to swap to, and swap_memory is 0"),
        ({"swap_memory": "inf"}, "--swap-memory: swap_memory is 'inf'; it takes bytes"),
        ({"swap_memory": "1e999"}, "--swap-memory: swap_memory is '1e999'; it takes bytes"),
        ({"kv_cache_memory": "lots"}, "--kv-cache-memory: kv_cache_memory is 'lots'; it takes bytes, such as 2Gi or 500M"),
        ({"max_sequences": "x"}, "--max-sequences: max_sequences is 'x'; it takes a whole number"),
        ({"device": "tpu"}, "--device: device is 'tpu'; it takes auto, cpu, cuda"),
        ({"max_batched_tokens": "65536"}, "max_batched_tokens is 65536; a step takes at most 65535"),
        ({"max_sequences": "64", "max_batched_tokens": "32"}, "max_sequences 64 is more than max_batched_tokens 32"),
        ({"request_timeout_s": "0"}, "request_timeout_s is 0.0; it must be above 0"),
        ({"model": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_its_numbers(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_model(resolve_config(flags, environ={}).models[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_setting_in_the_file_is_named_with_a_guess() -> None:
    with pytest.raises(ConfigError, match="'max_model_length' that does not exist; did you mean 'max_model_len'"):
        resolve_config({}, environ={}, file={"models": [{"max_model_length": 3}]})


def test_two_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="a list of one mapping"):
        resolve_config({}, environ={}, file={"models": [{}, {}]})


def test_the_built_in_model_is_served_when_none_is_named() -> None:
    plan = plan_model(ModelConfig())
    assert (plan.name, plan.dtype, plan.device, plan.max_model_len) == ("quire-tales", "float32", "cpu", 2048)
    assert plan.block_bytes == 16 * 2 * 8 * 4 * 32 * 4  # tokens, keys and values, layers, KV heads, head size, bytes


def changed_model(folder: Path, **changes: Any) -> Path:
    """A copy of the built-in model whose config says something else."""
    shutil.copytree(plan_model(ModelConfig()).folder.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_key_heads_are_shared_out_over_ranks_and_replicated_when_fewer(size: int, kv_heads: int) -> None:
    plan = plan_model(ModelConfig(tensor_parallel_size=size))
    assert plan.block_bytes == 16 * 2 * 8 * kv_heads * 32 * 4
    assert plan.whole_on_each_rank == ""


def test_the_swap_pool_is_as_large_as_the_kv_cache_within_limits_unless_told() -> None:
    assert plan_model(ModelConfig(gpu_blocks=7)).num_cpu_blocks == 7
    assert plan_model(ModelConfig(gpu_blocks=10_000)).num_cpu_blocks == 2**28 // 131072
    assert plan_model(ModelConfig(gpu_blocks=7, preemption="recompute")).num_cpu_blocks == 0
    assert plan_model(ModelConfig(gpu_blocks=7, swap_memory=0)).num_cpu_blocks == 0


def test_on_a_gpu_the_kv_cache_takes_what_is_free_unless_told() -> None:
    plan = plan_model(ModelConfig(device="cuda"))
    assert (plan.device, plan.dtype, plan.num_gpu_blocks) == ("cuda", plan.folder.dtype, None)
    assert plan.num_cpu_blocks == 2**32 // plan.block_bytes
    assert (plan.max_sequences, plan.max_batched_tokens) == (256, 8192)
    assert "gpu_blocks" not in config_as_dict(ServeConfig(models=(ModelConfig(device="cuda"),)), plan)["models"][0]
    assert plan_model(ModelConfig(device="cuda", gpu_blocks=7)).num_gpu_blocks == 7
    assert plan_model(ModelConfig(device="cuda", kv_cache_memory=5 * plan.block_bytes + 1)).num_gpu_blocks == 5


def test_without_a_driver_nobody_asks_torch_for_a_gpu(tmp_path: Path) -> None:
    assert not torch_sees_gpu(driver=tmp_path / "nvidiactl")


def test_swap_memory_is_counted_in_blocks_of_each_rank() -> None:
    assert plan_model(ModelConfig(swap_memory=10 * 131072 + 1, preemption="swap")).num_cpu_blocks == 10
    assert plan_model(ModelConfig(swap_memory=10 * 131072 + 1, tensor_parallel_size=2)).num_cpu_blocks == 20


def test_a_family_whose_plan_splits_no_keys_holds_them_all_on_each_rank(tmp_path: Path) -> None:
    folder = changed_model(tmp_path / "model", model_type="phi3")
    plan = plan_model(ModelConfig(model=str(folder), tensor_parallel_size=2))
    assert plan.block_bytes == 16 * 2 * 8 * 4 * 32 * 4
    assert plan.whole_on_each_rank == "all 4 key and value heads: the plan of family 'phi3' does not split them"


def test_key_heads_that_cannot_be_split_evenly_are_refused(tmp_path: Path) -> None:
    folder = changed_model(tmp_path / "model", num_attention_heads=12, num_key_value_heads=6, head_dim=32)
    with pytest.raises(ConfigError, match="6 key heads cannot be split over 4 ranks"):
        plan_model(ModelConfig(model=str(folder), tensor_parallel_size=4))


def test_the_files_of_the_index_are_read_and_no_others(tmp_path: Path) -> None:
    folder = changed_model(tmp_path / "model")
    assert read_model_folder(folder).weight_files == ("model.safetensors",)
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert read_model_folder(folder).weight_files == ("model.safetensors",)
    (folder / "model-1.safetensors").touch()
    (folder / "model-2.safetensors").touch()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}))
    assert read_model_folder(folder).weight_files == ("model-1.safetensors", "model-2.safetensors")
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model-2.safetensors, which its index lists"):
        read_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ConfigError, match="has no weight_map of tensor names to file names"):
        read_model_folder(folder)


def test_a_pool_smaller_than_the_model_length_is_allowed() -> None:
    assert plan_model(ModelConfig(gpu_blocks=4)).num_gpu_blocks == 4


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", r"has no tokenizer.json; make one with: .*python.* -c"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no \\*.safetensors"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_with_what_to_do(tmp_path: Path, missing: str, message: str) -> None:
    source = plan_model(ModelConfig()).folder.path
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=message):
        read_model_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": None},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"hidden_size": -4},
        {"vocab_size": "many"},
        {"num_key_value_heads": 2.5},
        {"head_dim": [1]},
    ],
)
def test_a_config_that_lies_about_sizes_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plan_model(ModelConfig()).folder.path, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config.pop(key)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuireError, match=r"config\.json (says|does not say)"):
        read_model_folder(folder)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"top_k": "x"}, "says top_k = 'x'"),
        ({"temperature": []}, "says temperature = \\[\\]"),
        ({"eos_token_id": -1}, "says eos_token_id = -1"),
    ],
)
def test_a_generation_config_that_is_no_number_is_refused(tmp_path: Path, generation: dict[str, Any], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plan_model(ModelConfig()).folder.path, folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ConfigError, match=message):
        read_model_folder(folder)


def test_a_generation_config_is_read_without_what_it_leaves_open(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plan_model(ModelConfig()).folder.path, folder)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": -1, "top_p": None, "eos_token_id": [0, 5]}))
    model = read_model_folder(folder)
    assert dict(model.generation) == {"top_k": 0, "eos_token_id": [0, 5]}
    assert model.eos_token_ids == (0, 5)
