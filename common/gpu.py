"""Whether this machine has a GPU that torch can use, asked without importing torch."""

import subprocess
import sys
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
