from functools import cache
from pathlib import Path

import pytest
import torch
from plan_driver import MakeRunner
from reference_models import LoadReference, ReferenceModel, load_reference
from tiny_models import DEMO_MODEL, save_tiny_llama

from quire.common.model_folder import read_model_folder
from quire.worker.kv_cache import KvCache
from quire.worker.models.llama import LlamaModel
from quire.worker.models.load_model import load_model as load_by_backend
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
    return {"tiny": load_transformers_model(read_model_folder(tiny_folder), dtype="float32", device="cpu")}


@pytest.fixture(scope="session")
def native_demo() -> LlamaModel | TransformersModel:
    """The built-in model by our own modules, as a rank on a CPU loads it."""
    return load_by_backend(read_model_folder(DEMO_MODEL), dtype="float32", device="cpu", backend="native")


@pytest.fixture
def make_runner(models: dict[str, TransformersModel], native_demo: LlamaModel) -> MakeRunner:
    """A Runner with a cache and a batch of its own; of "tiny", "demo", or a model."""

    def make(
        model: str | TransformersModel = "tiny",
        *,
        block_size: int = 4,
        num_blocks: int = 256,
        max_rows: int = 10,
        max_model_len: int = 200,
        num_cpu_blocks: int = 0,
    ) -> Runner:
        by_name: dict[str, LlamaModel | TransformersModel] = {**models, "demo": native_demo}
        loaded = by_name[model] if isinstance(model, str) else model
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
