"""The gateway process with bounds that a test chooses; started by tests through common/child_process.py."""

import asyncio
import resource
import sys
from typing import Final

from quire.cluster.gateway.main import GatewayBounds, GatewayConfig, raise_file_limit, run
from quire.common.child_process import enter_child

# As many open files as a careless system lets the gateway have.
INHERITED_FILE_LIMIT: Final = 256

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (INHERITED_FILE_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    spec = enter_child()
    bounds = GatewayBounds(**spec.pop("bounds"))
    raise_file_limit()
    sys.exit(asyncio.run(run(GatewayConfig(**spec), bounds=bounds)))
