"""What a user gets from `pip install quire`: a wheel with everything in it, and a client SDK without the server's packages."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Final

import pytest

CHECKOUT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("bench", "cli", "client", "cluster", "common", "kernels", "worker", "v1", "internal/v1")
# Of the server extra; none may come with `import quire.client`.
SERVER_ONLY: Final = ("jinja2", "msgspec", "numpy", "ray", "safetensors", "tokenizers", "torch", "transformers", "triton", "yaml", "zmq")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("packaging")]  # distributions are built once


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run as a user would: without the settings of the test run, away from the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "QUIRE_", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it.

    Built from a copy: the list of files that an editable install leaves in the checkout would hide what package-data forgets.
    """
    folder = tmp_path_factory.mktemp("dist")
    leave_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "node_modules", "build", "dist")
    shutil.copytree(CHECKOUT, folder / "checkout", symlinks=True, ignore=leave_out)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "checkout", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    [path] = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def client_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel and its base dependencies alone."""
    folder = tmp_path_factory.mktemp("client-only")
    venv.create(folder / "venv", with_pip=True)
    bin_folder = folder / "venv" / "bin"
    run(bin_folder / "pip", "install", "--quiet", "--constraint", CHECKOUT / "deploy/constraints.txt", wheel, cwd=folder)
    return bin_folder


def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        [entry_points] = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    package = CHECKOUT / "src/quire"
    sources = {
        f"quire/{folder}/{path.relative_to(package / folder).as_posix()}"
        for folder in PACKAGES
        for pattern in ("*.py", "*.pyi", "py.typed")
        for path in (package / folder).rglob(pattern)
    }
    model = {f"quire/demo_model/{path.name}" for path in (package / "demo_model").iterdir() if path.is_file()}
    data = {
        f"quire/bench/{path.relative_to(package / 'bench').as_posix()}"
        for pattern in ("data/*", "model_configs/*/config.json")
        for path in (package / "bench").glob(pattern)
    }
    assert data, "the benchmarks have files of their own"
    assert sources | model | data <= names, sorted((sources | model | data) - names)
    assert {f"quire/{folder}/py.typed" for folder in PACKAGES} <= names
    assert sizes["quire/demo_model/model.safetensors"] == (package / "demo_model/model.safetensors").stat().st_size
    assert "quire = quire.cli.main:main" in entry_points
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    # Nothing lands beside quire: bare `kernels` and `proto` are other people's packages.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"quire"}


def test_importing_the_client_loads_nothing_of_the_server(client_only: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from quire.client import AsyncClient, Client
print(sorted(set(sys.modules) & set({SERVER_ONLY!r})))
"""
    assert run(client_only / "python", "-c", program, cwd=tmp_path).stdout.strip() == "[]"


def test_the_base_install_brings_nothing_of_the_server(client_only: Path, tmp_path: Path) -> None:
    program = f"import importlib.util; print([name for name in {SERVER_ONLY!r} if importlib.util.find_spec(name)])"
    assert run(client_only / "python", "-c", program, cwd=tmp_path).stdout.strip() == "[]"


def test_quire_tells_its_version(client_only: Path, wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.split("-")[1] in run(client_only / "quire", "--version", cwd=tmp_path).stdout


def test_quire_serve_without_the_server_extra_says_what_to_install(client_only: Path, tmp_path: Path) -> None:
    refused = run(client_only / "quire", "serve", cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert 'quire serve needs the server extra; install it with: pip install "quire[server]"' in refused.stderr
    assert "Traceback" not in refused.stderr
