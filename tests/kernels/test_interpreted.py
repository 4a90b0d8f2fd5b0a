import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TIMEOUT_S = 800
FOLDER = Path(__file__).parent
WORKER = FOLDER.parent / "worker"
# Two at once: the second has the tests whose ranks are processes themselves.
PARTS = (
    (FOLDER, f"--ignore={FOLDER / 'test_vocab_shards.py'}", f"--ignore={FOLDER / 'test_all_reduce.py'}"),
    (FOLDER / "test_vocab_shards.py", FOLDER / "test_all_reduce.py", WORKER / "test_kernel_attention.py", WORKER / "test_peer_sums.py"),
)


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the same tests run the compiled kernels")
def test_kernels_are_right_when_interpreted() -> None:
    """The tests marked `kernel`, in processes of their own: Triton reads the variable when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernel", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    running = [
        subprocess.Popen(
            [*command, *map(str, part)],
            env=environment,
            cwd=FOLDER.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in PARTS
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-8000:]
        assert " passed" in output
