"""The machine code once more, by the version of Triton that PyTorch for CUDA 13 brings: the one here is newer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "3.6.0"
INSTALL_TIMEOUT_S = 300
TEST_TIMEOUT_S = 600


@pytest.fixture(scope="module")
def triton_folder() -> Path:
    """Where that version lies, beside the environment's own; downloaded when it is first asked for."""
    folder = Path(sys.prefix) / f"triton-{VERSION}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), f"triton=={VERSION}"]
        subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
        partial.rename(folder)
    return folder


@pytest.mark.slow
def test_the_tests_of_machine_code_pass_with_it(triton_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(triton_folder), os.environ.get("PYTHONPATH", "")])}
    asked = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(asked, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    assert found.strip() == VERSION
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_compiled.py"))]
    result = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TEST_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
