"""Native ranks that sum through peer memory, as processes with interpreted kernels: the same tokens as one rank alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import NATIVE_MODELS
from peer_ranks import HostPeers, draw_by_native_model, run_ranks
from plan_driver import PlanDriver
from tiny_models import save_tiny_model
from torch import Tensor

from quire.common.messages import SamplingState
from quire.common.model_folder import read_model_folder
from quire.kernels.all_reduce import MAX_PROGRAMS, Peers
from quire.kernels.backend import IS_INTERPRETED
from quire.kernels.linear_tiles import LinearTile
from quire.kernels.skinny_linear import skinny_linear
from quire.worker.collectives_cuda import peer_bytes
from quire.worker.gpu_memory import draw_bytes
from quire.worker.kv_cache import KvCache
from quire.worker.models import llama
from quire.worker.models.llama import LlamaModel
from quire.worker.models.load_model import load_llama_model
from quire.worker.runner import Runner

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not IS_INTERPRETED, reason="tests/kernels/test_interpreted.py runs these")]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
NUM_TOKENS = 4
AREA_BYTES = 64 * 1024


SAMPLING = [SamplingState(temperature=0.9, seed=1), SamplingState(temperature=1.2, top_k=20, seed=2), SamplingState(top_p=0.8, seed=3)]


@pytest.mark.parametrize(
    ("name", "size", "sampling", "in_two_shots"),
    [
        ("llama", 2, None, False),
        ("qwen3", 2, SAMPLING, False),
        ("qwen2", 4, None, False),
        ("llama", 2, None, True),
        ("qwen2", 4, None, True),
    ],
)
def test_ranks_draw_what_one_rank_draws(
    tmp_path: Path, name: str, size: int, sampling: list[SamplingState] | None, in_two_shots: bool
) -> None:
    family, config = NATIVE_MODELS[name]
    path = save_tiny_model(tmp_path, family, **config)
    folder = read_model_folder(path)
    expected = drawn(load_llama_model(folder, dtype="float32", device="cpu"), sampling)
    arguments: tuple[Any, ...] = (str(path), PROMPTS, NUM_TOKENS, AREA_BYTES, sampling, in_two_shots)
    num_bytes = peer_bytes(AREA_BYTES, draw_bytes(folder, dtype="float32", num_ranks=size, max_rows=4))
    of_ranks = run_ranks(draw_by_native_model, size, *arguments, area_bytes=num_bytes)
    assert of_ranks == [expected] * size


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_products_of_few_rows_go_to_peer_memory_by_our_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A group of one, so that it is this process; its sums are its own parts."""
    family, config = NATIVE_MODELS[name]
    folder = read_model_folder(save_tiny_model(tmp_path, family, **config))
    expected = drawn(load_llama_model(folder, dtype="float32", device="cpu"))
    num_draw_bytes = draw_bytes(folder, dtype="float32", num_ranks=1, max_rows=4)
    flags = torch.zeros(MAX_PROGRAMS, dtype=torch.int32)
    area = torch.zeros(peer_bytes(AREA_BYTES, num_draw_bytes), dtype=torch.uint8)
    addresses = [torch.tensor([memory.data_ptr()]) for memory in (flags, area)]
    peers = Peers(0, 1, flags=addresses[0], areas=addresses[1], meetings=torch.zeros(MAX_PROGRAMS, dtype=torch.int32))
    collective = HostPeers(peers, area_bytes=AREA_BYTES, draw_bytes=num_draw_bytes, in_two_shots=False)
    model = load_llama_model(folder, dtype="float32", device="cpu", collective=collective)
    model._has_few_rows_tiles = True
    seen = set()

    def recorded(rows: Tensor, weight: Tensor, *, tile: LinearTile, output: Tensor | None) -> Tensor:
        seen.add((tuple(weight.shape), output is not None and area.data_ptr() <= output.data_ptr() < area.data_ptr() + 3 * AREA_BYTES))
        return skinny_linear(rows, weight, tile=tile, output=output)

    monkeypatch.setattr(llama, "few_rows_tile", lambda **_: LinearTile(16, 32, 2, 3, has_weights_left=True))
    monkeypatch.setattr(llama, "skinny_linear", recorded)
    assert drawn(model) == expected
    layer = model.weights.layers[0]
    qkv = set() if model.config.has_qkv_bias else {(tuple(layer.qkv.shape), False)}
    assert seen == {(tuple(layer.output.shape), True), (tuple(layer.down.shape), True), *qkv}


def drawn(model: LlamaModel, sampling: list[SamplingState] | None = None) -> list[list[int]]:
    """What a rank of this process draws."""
    folder = model.folder
    kv_cache = KvCache(
        num_blocks=64, num_layers=folder.num_layers, num_kv_heads=folder.num_kv_heads, block_size=4, head_dim=folder.head_dim,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    with torch.inference_mode():
        runner = Runner(model, kv_cache, rank=0, max_rows=4, max_model_len=40, max_batched_tokens=64, device="cpu", has_static_steps=True)
        return PlanDriver(runner).generate(PROMPTS, num_tokens=NUM_TOKENS, chunk=5, stagger=1, sampling=sampling)
