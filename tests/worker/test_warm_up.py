"""First steps of ranks that compute together: whatever one of them has room or time for, all do the same ones."""

from pathlib import Path

import pytest
import torch
from native_models import NATIVE_MODELS
from thread_ranks import ThreadRanks
from tiny_models import save_tiny_model

from quire.common.model_folder import read_model_folder
from quire.worker import warm_up
from quire.worker.collectives import Collective, least
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import load_llama_model
from quire.worker.runner import Runner
from quire.worker.warm_up import measure_prefill, touch_libraries


@pytest.mark.parametrize(("num_blocks", "lengths"), [((16, 15), [16, 64]), ((15, 16), [16, 64]), ((16, 16), [16, 64, 256]), ((4, 0), [])])
def test_ranks_with_other_pools_time_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: tuple[int, int], lengths: list[int]
) -> None:
    monkeypatch.setitem(warm_up._BUDGET_S, "cpu", 60.0)
    family, config = NATIVE_MODELS["llama"]
    folder = read_model_folder(save_tiny_model(tmp_path, family, **{**config, "max_position_embeddings": 512}))

    def time_prompts(collective: Collective) -> list[int]:
        model = load_llama_model(folder, dtype="float32", device="cpu", collective=collective)
        kv_cache = KvCache(
            num_blocks=num_blocks[collective.rank], num_layers=folder.num_layers, num_kv_heads=model.num_kv_heads, block_size=16,
            head_dim=folder.head_dim, dtype=torch.float32, device="cpu",
        )  # fmt: skip
        runner = Runner(model, kv_cache, rank=collective.rank, max_rows=2, max_model_len=300, max_batched_tokens=300, device="cpu")
        return [length for length, _ in measure_prefill(runner, max_tokens=299, collective=collective)]

    assert ThreadRanks(2).run(time_prompts) == [lengths, lengths]


def test_ranks_take_the_smallest_number_of_any() -> None:
    assert ThreadRanks(3).run(lambda collective: least(collective, 100_000_000_001 - collective.rank)) == [99_999_999_999] * 3
    assert least(None, 7) == 7


@pytest.mark.parametrize("name", NATIVE_MODELS)
def test_touching_libraries_goes_through_every_product_and_changes_nothing(tmp_path: Path, name: str) -> None:
    family, config = NATIVE_MODELS[name]
    model = load_llama_model(read_model_folder(save_tiny_model(tmp_path, family, **config)), dtype="float32", device="cpu")
    product, seen = model.weights.product, set()
    before = [layer.down.clone() for layer in model.weights.layers]

    def seen_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.add(weight.data_ptr())
        return product(rows, weight)

    model.weights.product = seen_product
    touch_libraries(model, max_tokens=8192)
    layer = model.weights.layers[0]
    used = (layer.qkv, layer.output, layer.gate_up, layer.down, model.weights.head)
    assert seen == {weight.data_ptr() for weight in used}
    assert all(torch.equal(layer.down, old) for layer, old in zip(model.weights.layers, before, strict=True))
