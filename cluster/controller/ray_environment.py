"""The environment that Ray reads when it is imported. Imports no Ray itself, so that it can come first."""

import os
import secrets

from quire.common.child_process import SECRET_VARIABLES


def prepare_local_ray() -> None:
    """Set what a Ray of our own on this machine needs. Call before anything imports ray: it reads its auth mode only then."""
    # Ray hands this environment to all that it starts. Whatever we needed of it has been used by now.
    for name in SECRET_VARIABLES:
        os.environ.pop(name, None)
    # Ray's daemons listen on all interfaces: nobody without this run's token may talk to them.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray kills actors when the machine's memory runs full; a rank that dies so would take its whole group along.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
