"""Native ranks that sum through peer memory, as processes with interpreted kernels: the same tokens as one rank alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import NATIVE_MODELS
from peer_ranks import draw_by_native_model, run_ranks
from plan_driver import PlanDriver
from tiny_models import save_tiny_model

from quire.common.messages import SamplingState
from quire.common.model_folder import read_model_folder
from quire.kernels.backend import IS_INTERPRETED
from quire.worker.collectives_cuda import peer_bytes
from quire.worker.gpu_memory import draw_bytes
from quire.worker.kv_cache import KvCache
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
    model = load_llama_model(folder, dtype="float32", device="cpu")
    kv_cache = KvCache(
        num_blocks=64, num_layers=folder.num_layers, num_kv_heads=folder.num_kv_heads, block_size=4, head_dim=folder.head_dim,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    with torch.inference_mode():
        runner = Runner(model, kv_cache, rank=0, max_rows=4, max_model_len=40, max_batched_tokens=64, device="cpu", has_static_steps=True)
        expected = PlanDriver(runner).generate(PROMPTS, num_tokens=NUM_TOKENS, chunk=5, stagger=1, sampling=sampling)
    arguments: tuple[Any, ...] = (str(path), PROMPTS, NUM_TOKENS, AREA_BYTES, sampling, in_two_shots)
    num_bytes = peer_bytes(AREA_BYTES, draw_bytes(folder, dtype="float32", num_ranks=size, max_rows=4))
    of_ranks = run_ranks(draw_by_native_model, size, *arguments, area_bytes=num_bytes)
    assert of_ranks == [expected] * size
