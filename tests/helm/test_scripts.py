"""The small programs inside the chart, run as a pod would run them."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fake_hub import COMMIT, FakeHub
from helm_chart import pod_templates, render, value_sets

CASES = value_sets()


def init_container(name: str, case: dict[str, Any]) -> dict[str, Any]:
    (found,) = [item for item in pod_templates(render(case))["head"]["spec"]["initContainers"] if item["name"] == name]
    return dict(found)


def waiting_for_redis(address: str, *, seconds: int) -> list[str]:
    ray = {"gcsFaultTolerance": {"enabled": True, "redisAddress": address, "waitTimeoutSeconds": seconds}}
    command: list[str] = init_container("wait-for-redis", CASES["gpu"] | {"ray": ray})["command"]
    return command


def test_a_head_starts_once_redis_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(waiting_for_redis(address, seconds=20), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, f"Redis answers at {address}\n")


def test_a_head_without_redis_says_so_after_its_time() -> None:
    started_s = time.monotonic()
    done = subprocess.run(waiting_for_redis("redis://127.0.0.1:1", seconds=2), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "no Redis at 127.0.0.1:1 within 2 s; check ray.gcsFaultTolerance.redisAddress" in done.stderr
    assert time.monotonic() - started_s >= 2


def test_a_pod_fetches_its_model_to_where_the_program_looks(tmp_path: Path) -> None:
    """The init container's own command and environment, its volume at another place, against a hub on loopback."""
    demo = Path(__file__).parents[2] / "src" / "quire" / "demo_model"
    repository = tmp_path / "repository"
    shutil.copytree(demo, repository)
    with FakeHub(repository, "tellers/tales") as hub:
        model = CASES["hub"]["models"][0] | {"uri": f"hf://tellers/tales@{COMMIT}"}
        case = CASES["hub"] | {"models": [model], "huggingFace": {"endpoint": hub.endpoint}}
        fetch = init_container("fetch-model", case)
        environ = {entry["name"]: entry["value"] for entry in fetch["env"]}
        assert environ["HF_HOME"] in {mount["mountPath"] for mount in fetch["volumeMounts"]}
        # Here Quire comes from this checkout, and the volume is a folder of the test.
        environ = os.environ | environ | {"HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path)}
        environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        assert fetch["command"][:2] == ["python", "-P"]
        done = subprocess.run([sys.executable, *fetch["command"][1:]], capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.parts[-2:] == ("snapshots", COMMIT), "every pod that fetches one commit has it at one path"
    assert folder.is_relative_to(tmp_path / "hub")
    assert (folder / "model.safetensors").read_bytes() == (demo / "model.safetensors").read_bytes()
    assert not (folder / "README.md").exists()
