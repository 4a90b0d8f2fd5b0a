import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the same tests run the compiled kernels")
def test_kernels_are_right_when_interpreted() -> None:
    """The tests marked `kernel`, in a process of its own: Triton reads the variable when a kernel is defined."""
    folder = Path(__file__).parent
    folders = [folder, folder.parent / "worker/test_kernel_attention.py", folder.parent / "worker/test_peer_sums.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernel", "-p", "no:cacheprovider", *map(str, folders)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command,
        env=environment,
        cwd=folder.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:]
