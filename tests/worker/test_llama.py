"""The native Llama family beside transformers' own modules: logits, greedy tokens, parts of it over ranks."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_models import NATIVE_MODELS
from plan_driver import PlanDriver
from safetensors.torch import load_file
from thread_ranks import ThreadRanks, load_parts
from tiny_families import FAMILIES, SIZES
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from quire.common.errors import ConfigError
from quire.common.messages import Chunk, SamplingState, StepPlan
from quire.common.model_folder import read_model_folder
from quire.kernels.linear_tiles import LinearTile
from quire.worker.collectives import Collective
from quire.worker.kv_cache import KvCache
from quire.worker.models import llama, packed_weight
from quire.worker.models.llama import LlamaLayer, LlamaModel, LlamaShare, read_llama_config
from quire.worker.models.llama_weights import empty_weights, fill_at_random, fill_from_files
from quire.worker.models.load_model import load_llama_model, load_model
from quire.worker.models.packed_weight import packed_product
from quire.worker.models.transformers_model import TransformersModel, load_transformers_model
from quire.worker.runner import Runner

VOCAB_SIZE = SIZES["vocab_size"]
NUM_TOKENS = 10


def prompts_of(*lengths: int) -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module", params=NATIVE_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, config = NATIVE_MODELS[request.param]
    return save_tiny_model(tmp_path_factory.mktemp(request.param), family, seed=3, **config)


def runner_of(model: LlamaModel, *, block_size: int = 4, max_rows: int = 10, has_static_steps: bool = True) -> Runner:
    """has_static_steps: as on a GPU"""
    folder = model.folder
    kv_cache = KvCache(
        num_blocks=256,
        num_layers=folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        head_dim=folder.head_dim,
        dtype=torch.float32,
        device="cpu",
    )
    return Runner(
        model,
        kv_cache,
        rank=0,
        max_rows=max_rows,
        max_model_len=200,
        max_batched_tokens=64,
        device="cpu",
        has_static_steps=has_static_steps,
    )


def load_native(folder: Path) -> LlamaModel:
    """As a rank on a CPU loads it."""
    model = load_model(read_model_folder(folder), dtype="float32", device="cpu", backend="native")
    assert isinstance(model, LlamaModel)
    return model


def continued(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers' greedy generate says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **options)[0].tolist()[len(prompt) :] for prompt in prompts]


@pytest.mark.parametrize(("block_size", "chunk", "stagger"), [(4, 7, 1), (16, 100, 0), (1, 1, 2)])
def test_a_crowd_is_continued_as_transformers_continues_each_alone(folder: Path, block_size: int, chunk: int, stagger: int) -> None:
    prompts = prompts_of(1, 7, 16, 33, 2, 5)
    model = load_llama_model(read_model_folder(folder), dtype="float32", device="cpu")
    driver = PlanDriver(runner_of(model, block_size=block_size))
    assert driver.generate(prompts, num_tokens=NUM_TOKENS, chunk=chunk, stagger=stagger) == continued(folder, prompts)


@pytest.mark.parametrize(("block_size", "chunk", "stagger"), [(4, 7, 1), (16, 100, 0), (1, 1, 2)])
def test_a_crowd_on_a_cpu_is_continued_as_transformers_would(folder: Path, block_size: int, chunk: int, stagger: int) -> None:
    prompts = prompts_of(1, 7, 16, 33, 2, 5)
    driver = PlanDriver(runner_of(load_native(folder), block_size=block_size, has_static_steps=False))
    assert driver.generate(prompts, num_tokens=NUM_TOKENS, chunk=chunk, stagger=stagger) == continued(folder, prompts)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_model_continue_as_transformers_does(folder: Path, size: int) -> None:
    """Four ranks are more than the two KV heads, which are then held twice each; a vocabulary of 513 is not divided evenly."""
    prompts = prompts_of(1, 7, 33, 2)
    parts = read_model_folder(folder)
    ranks = ThreadRanks(size)

    def generate(collective: Collective, *, has_static_steps: bool) -> list[list[int]]:
        load = load_llama_model if has_static_steps else partial(load_model, backend="native")
        model = load(parts, dtype="float32", device="cpu", collective=collective)
        assert isinstance(model, LlamaModel)
        assert model.num_kv_heads == max(1, 2 // size)
        assert model.num_heads == 4 // size
        driver = PlanDriver(runner_of(model, has_static_steps=has_static_steps))
        return driver.generate(prompts, num_tokens=NUM_TOKENS, chunk=7, stagger=1)

    first, *others = ranks.run(partial(generate, has_static_steps=True)) + ranks.run(partial(generate, has_static_steps=False))
    assert first == continued(folder, prompts)
    assert all(other == first for other in others)


def test_what_asks_for_more_than_a_draw_gets_it_beside_those_who_do_not(folder: Path) -> None:
    """Penalties, rules and log probabilities leave the graphs for their step; the rows beside them draw what they would have drawn."""
    prompts = prompts_of(9, 7, 16)
    model = load_llama_model(read_model_folder(folder), dtype="float32", device="cpu")
    plain = [SamplingState(temperature=0.0), SamplingState(seed=5, top_p=0.9), SamplingState(seed=6, top_k=20)]
    expected = PlanDriver(runner_of(model)).generate(prompts, num_tokens=NUM_TOKENS, chunk=8, sampling=plain)
    asking = [SamplingState(temperature=0.0, num_logprobs=2), plain[1], SamplingState(seed=6, top_k=20, bad_ids=(0,))]
    driver = PlanDriver(runner_of(model))
    actual = driver.generate(prompts, num_tokens=NUM_TOKENS, chunk=8, sampling=asking)
    assert actual[:2] == expected[:2]
    if 0 not in expected[2]:
        assert actual[2] == expected[2]


def test_prompt_logprobs_of_chunks_are_those_of_the_whole(folder: Path) -> None:
    prompt = prompts_of(33)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    driver = PlanDriver(runner_of(load_llama_model(read_model_folder(folder), dtype="float32", device="cpu")))
    state = SamplingState(temperature=0.0, num_prompt_logprobs=1)
    seen: list[float] = []
    added = driver.add(0, prompt, state)
    for start in range(0, 33, 11):
        chunk = Chunk(0, start, 11, start == 22)
        result = driver.step(add_rows=(added,) if start == 0 else (), chunks=(chunk,), samples=((0, 0),) if chunk.is_last else ())
        seen += [value for _, columns in result.prompt_logprobs for value in columns.logprobs]
    torch.testing.assert_close(torch.tensor(seen), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"mlp_bias": True}, "its MLP has biases"),
        ({"attention_bias": True}, "its attention's output has a bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "its rotary positions are of kind yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
        ({"model_type": "gemma2"}, "the families are llama, mistral, qwen2, qwen3"),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = save_tiny_model(tmp_path, "llama", **SIZES)
    config = {**json.loads((path / "config.json").read_text()), **change}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=why):
        read_llama_config(read_model_folder(path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "llama", **SIZES)
    config = {**json.loads((path / "config.json").read_text()), "num_hidden_layers": 3}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lack 9 weights of the 'llama' family, model\.layers\.2\.input_layernorm\.weight first"):
        load_llama_model(read_model_folder(path), dtype="float32", device="cpu")


def test_random_weights_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    folder = read_model_folder(save_tiny_model(tmp_path, "llama", **SIZES))
    share = LlamaShare(read_llama_config(folder))
    first, second = (empty_weights(share, dtype=torch.float32, device="cpu") for _ in range(2))
    fill_at_random(first, share)
    fill_at_random(second, share)
    assert torch.equal(first.layers[1].down, second.layers[1].down)
    assert 0.015 < float(first.head.std()) < 0.025
    assert torch.equal(first.final_norm, torch.ones(64))


def test_eight_ranks_share_four_kv_heads(tmp_path: Path) -> None:
    """Each KV head is held by two ranks, by our modules and by transformers' own."""
    sizes = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    path = save_tiny_model(tmp_path, "llama", seed=3, **sizes)
    prompts = prompts_of(1, 7, 33)
    expected = continued(path, prompts)
    parts = read_model_folder(path)
    ranks = ThreadRanks(8)

    def generate(collective: Collective) -> list[list[int]]:
        model = load_llama_model(parts, dtype="float32", device="cpu", collective=collective)
        assert (model.num_heads, model.num_kv_heads) == (1, 1)
        return PlanDriver(runner_of(model)).generate(prompts, num_tokens=NUM_TOKENS, chunk=7, stagger=1)

    assert ranks.run(generate) == [expected] * 8
    token_ids = torch.tensor(prompts[2])
    whole = load_transformers_model(parts, dtype="float32", device="cpu").own_logits(token_ids)
    split = load_parts(parts, ranks)
    for logits in ranks.run(lambda collective: split[collective.rank].own_logits(token_ids)):
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_products_of_many_rows_that_add_to_the_residual_stream_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "MIN_ROWS_ADDED_BY_PRODUCTS", 8)
    prompts = prompts_of(40, 3, 17)
    runner = runner_of(load_llama_model(read_model_folder(folder), dtype="float32", device="cpu"))
    assert PlanDriver(runner).generate(prompts, num_tokens=NUM_TOKENS, chunk=64) == continued(folder, prompts)


def test_products_of_few_rows_that_have_a_tile_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU: qkv without a bias, attention's output and the MLP's down, padded rows counted; never the gates."""
    asked: set[tuple[int, int, int]] = set()

    def few_rows_tile(*, num_rows: int, num_columns: int, num_inputs: int) -> LinearTile | None:
        asked.add((num_rows, num_columns, num_inputs))
        return LinearTile(16, 32, 2, 3, has_weights_left=True) if num_rows <= 8 else None

    monkeypatch.setattr(llama, "few_rows_tile", few_rows_tile)
    prompts = prompts_of(40, 3, 17)
    model = load_llama_model(read_model_folder(folder), dtype="float32", device="cpu")
    model._has_few_rows_tiles = True
    assert PlanDriver(runner_of(model)).generate(prompts, num_tokens=NUM_TOKENS, chunk=64) == continued(folder, prompts)
    layer = model.weights.layers[0]
    weights = (layer.output, layer.down) if model.config.has_qkv_bias else (layer.qkv, layer.output, layer.down)
    assert {(num_columns, num_inputs) for _, num_columns, num_inputs in asked} == {tuple(weight.shape) for weight in weights}
    assert {num_rows for num_rows, *_ in asked} == {4, 10, 64}, "three rows decode as four; a step of prompts ends in ten"


def test_a_draw_that_is_read_too_late_is_refused(folder: Path) -> None:
    """Its buffer serves another by then."""
    driver = PlanDriver(runner_of(load_llama_model(read_model_folder(folder), dtype="float32", device="cpu")))
    driver.step(add_rows=(driver.add(0, [1, 2, 3], room=NUM_TOKENS),), chunks=(Chunk(0, 0, 3, True),), samples=((0, 0),))
    launched = [driver.runner.launch(StepPlan(1, step)) for step in range(1, 6)]
    with pytest.raises(AssertionError, match="4 steps were launched before"):
        launched[0].finish()
    assert [len(step.finish()[0].token_ids) for step in launched[1:]] == [1] * 4


def test_weights_on_a_cpu_are_laid_out_for_it_and_held_once(folder: Path) -> None:
    weights = load_native(folder).weights
    assert weights.product is packed_product
    for layer in weights.layers:
        assert [tensor.is_mkldnn for tensor in (layer.qkv, layer.output, layer.gate_up, layer.down)] == [True] * 4
    assert weights.head.is_mkldnn == (weights.head is not weights.embedding)
    assert not weights.embedding.is_mkldnn


def test_weights_for_which_onednn_is_wrong_keep_their_layout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_weight, "packed_product", lambda rows, weight: 2 * F.linear(rows, weight.to_dense()))
    model = load_native(folder)
    assert model.weights.product is F.linear
    assert not any(tensor.is_mkldnn for layer in model.weights.layers for tensor in _tensors(layer))
    assert "oneDNN computes a product with" in caplog.text
    prompts = prompts_of(5, 17)
    driver = PlanDriver(runner_of(model, has_static_steps=False))
    assert driver.generate(prompts, num_tokens=NUM_TOKENS, chunk=8) == continued(folder, prompts)


@pytest.mark.parametrize(("family", "kind"), [("llama", LlamaModel), ("tied", LlamaModel), ("gpt2", TransformersModel)])
def test_our_own_modules_run_what_they_can(tmp_path: Path, family: str, kind: type) -> None:
    name, config = FAMILIES[family]
    folder = read_model_folder(save_tiny_model(tmp_path, name, **config))
    assert type(load_model(folder, dtype="float32", device="cpu", backend="auto")) is kind
    assert type(load_model(folder, dtype="float32", device="cpu", backend="transformers")) is TransformersModel
    if kind is TransformersModel:
        with pytest.raises(ConfigError, match="model_backend native does not run this model"):
            load_model(folder, dtype="float32", device="cpu", backend="native")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_read_their_own_part_of_the_files_and_no_more(folder: Path, size: int) -> None:
    model = read_model_folder(folder)
    config = read_llama_config(model)
    read = []
    own = []
    for rank in range(size):
        share = LlamaShare(config, rank, size)
        weights = empty_weights(share, dtype=torch.float32, device="cpu")
        read.append(fill_from_files(weights, share, model))
        tensors = {id(tensor): tensor for layer in weights.layers for tensor in _tensors(layer)}
        tensors |= {id(tensor): tensor for tensor in (weights.embedding, weights.head, weights.final_norm)}
        own.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert read == own
    whole = sum(tensor.nbytes for path in model.weight_files for tensor in load_file(folder / path).values())
    if size == 1:
        assert read == [whole]
    # Norms, and keys and values of fewer heads than ranks, are read by several; all else is split.
    assert max(read) < 1.35 * whole / size


def _tensors(layer: LlamaLayer) -> list[torch.Tensor]:
    return [tensor for name in LlamaLayer.__slots__ if (tensor := getattr(layer, name)) is not None]
