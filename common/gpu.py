"""What is to be known of GPUs without importing torch: whether there is one, and which of them a rank sees."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_ASK_TIMEOUT_S: Final = 60.0


def torch_sees_gpu(*, driver: Path = Path("/dev/nvidiactl")) -> bool:
    """Asked in a process of its own, because importing torch takes seconds that ours need not wait for elsewhere, and only where
    a driver is. "Don't know" is no."""
    if not driver.exists():
        return False
    try:
        code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
        return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=_ASK_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def visible_gpus(gpus: Sequence[str], *, rank: int) -> str:
    """CUDA_VISIBLE_DEVICES of a rank: the GPUs of all its group's ranks on this host, as CUDA names them, since it reads their memory.

    gpus: of each rank, in rank order

    Its own is the first, which is the one that CUDA takes where none is named, in every thread.
    """
    return ",".join([gpus[rank], *(gpu for other, gpu in enumerate(gpus) if other != rank)])
