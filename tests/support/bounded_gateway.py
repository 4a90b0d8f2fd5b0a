"""The gateway process with bounds that a test chooses; started by tests through common/child_process.py."""

import asyncio
import sys

from quire.cluster.gateway.main import GatewayBounds, GatewayConfig, raise_file_limit, run
from quire.common.child_process import enter_child

if __name__ == "__main__":
    spec = enter_child()
    bounds = GatewayBounds(**spec.pop("bounds"))
    raise_file_limit()
    sys.exit(asyncio.run(run(GatewayConfig(**spec), bounds=bounds)))
