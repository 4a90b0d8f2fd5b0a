"""Take the checkout off sys.path: our folders are quire.client, quire.kernels, ...; bare `kernels` and `proto` are other people's."""

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]
