"""Models by id, from a hub on loopback and from the cache that it fills."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import COMMIT, FakeHub
from quire_command import QUIRE, environment
from tiny_models import DEMO_MODEL

from quire.common.model_hub import is_hub_id

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


def print_config(model: str, cache: Path, endpoint: str, **extra: str) -> "subprocess.CompletedProcess[str]":
    """`quire serve --print-config`, which plans a model and starts nothing."""
    variables = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **extra}
    command = [*QUIRE, "serve", model, "--print-config"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(extra=variables), cwd="/", check=False)


def model_entry(output: str) -> dict[str, Any]:
    entry: dict[str, Any] = yaml.safe_load(output)["models"][0]
    return entry


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The built-in model beside files that serving has no use for."""
    folder = tmp_path / "repository"
    shutil.copytree(DEMO_MODEL, folder)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py", "tf_model.h5", "README.md"):
        (folder / name).write_text("not needed")
    return folder


def test_an_id_is_fetched_from_the_hub_without_what_is_not_needed_and_found_in_the_cache_later(repository: Path, tmp_path: Path) -> None:
    with FakeHub(repository, "tellers/tales") as hub:
        first = print_config("tellers/tales", tmp_path / "cache", hub.endpoint)
        assert first.returncode == 0, first.stderr
        needed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
        assert set(hub.fetched) == needed | ({"chat_template.jinja"} & {file.name for file in repository.iterdir()})
        entry = model_entry(first.stdout)
        assert (entry["name"], Path(entry["model"]).name) == ("tellers/tales", COMMIT)
        hub.fetched.clear()
        assert print_config(f"tellers/tales@{COMMIT}", tmp_path / "cache", hub.endpoint).returncode == 0
        assert hub.fetched == [], "the cache has it"
    without_hub = print_config("tellers/tales", tmp_path / "cache", NOBODY)
    assert model_entry(without_hub.stdout) == entry


@pytest.mark.parametrize("extra", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_an_id_without_a_hub_in_reach_is_refused_at_once(tmp_path: Path, extra: dict[str, str]) -> None:
    refused = print_config("tellers/tales", tmp_path / "cache", NOBODY, **extra)
    assert refused.returncode == 1
    assert "tellers/tales is no folder here, and the hub cannot be reached" in refused.stderr
    assert "hf download tellers/tales" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_an_id_that_the_hub_does_not_know_is_named(repository: Path, tmp_path: Path) -> None:
    with FakeHub(repository, "tellers/tales") as hub:
        refused = print_config("tellers/sagas", tmp_path / "cache", hub.endpoint)
    assert refused.returncode == 1
    assert "tellers/sagas is neither a folder here nor a model on the hub" in refused.stderr


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tellers/tales", True),
        ("tellers/tales-1.5@main", True),
        ("/models/tales", False),
        ("./tellers/tales", False),
        ("~/tales", False),
        ("tales", False),
        ("a/b/c", False),
    ],
)
def test_what_can_only_be_a_path_is_no_id(model: str, expected: bool) -> None:
    assert is_hub_id(model) == expected


def test_a_folder_goes_before_an_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tellers" / "tales").mkdir(parents=True)
    assert not is_hub_id("tellers/tales")
