"""Clusters that several tests share: each takes about ten seconds to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ServeProcess
from tiny_models import DEMO_MODEL, save_tiny_llama


@pytest.fixture(scope="package")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that serves the built-in model."""
    with ServeProcess(tmp_path_factory.mktemp("built-in")) as serve:
        yield serve.wait_ready()


@pytest.fixture(scope="package")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[str]:
    """The address of a cluster that serves a random tiny Llama by transformers' modules, in blocks of 4 tokens, steps of at most 24."""
    arguments = [str(tiny_llama), "--model-backend", "transformers"]
    arguments += ["--block-size", "4", "--max-batched-tokens", "24", "--max-sequences", "8"]
    with ServeProcess(tmp_path_factory.mktemp("tiny"), *arguments) as serve:
        yield serve.wait_ready()


@pytest.fixture(scope="package")
def demo_model() -> Path:
    return DEMO_MODEL
