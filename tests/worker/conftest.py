from functools import cache
from pathlib import Path

import pytest
import torch
from plan_driver import MakeRunner
from reference_models import LoadReference, ReferenceModel, load_reference
from tiny_models import DEMO_MODEL, save_tiny_llama

from quire.common.model_folder import read_model_folder
from quire.worker.kv_cache import KvCache
from quire.worker.models.transformers_model import TransformersModel, load_transformers_model
from quire.worker.runner import Runner


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def models(tiny_folder: Path) -> dict[str, TransformersModel]:
    """The models that tests run plans on, by name; nothing of a test stays in them."""
    folders = {"tiny": tiny_folder, "demo": DEMO_MODEL}
    return {name: load_transformers_model(read_model_folder(folder), dtype="float32", device="cpu") for name, folder in folders.items()}


@pytest.fixture
def make_runner(models: dict[str, TransformersModel]) -> MakeRunner:
    """A Runner with a cache and a batch of its own."""

    def make(
        model: str | TransformersModel = "tiny",
        *,
        block_size: int = 4,
        num_blocks: int = 256,
        max_rows: int = 10,
        max_model_len: int = 200,
        num_cpu_blocks: int = 0,
    ) -> Runner:
        loaded = models[model] if isinstance(model, str) else model
        folder = loaded.folder
        kv_cache = KvCache(
            num_blocks=num_blocks,
            num_layers=folder.num_layers,
            num_kv_heads=folder.num_kv_heads,
            block_size=block_size,
            head_dim=folder.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        return Runner(loaded, kv_cache, rank=0, max_rows=max_rows, max_model_len=max_model_len, device="cpu", num_cpu_blocks=num_cpu_blocks)

    return make


@pytest.fixture(scope="session")
def load_model(tmp_path_factory: pytest.TempPathFactory) -> LoadReference:
    """Reference models by name, each made once."""

    @cache
    def load(name: str) -> ReferenceModel:
        return load_reference(name, tmp_path_factory.mktemp)

    return load
