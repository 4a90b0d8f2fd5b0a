"""The environment that Ray reads when it is imported. Imports no Ray itself, so that it can come first."""

import os
import secrets

from quire.common.child_process import SECRET_VARIABLES
from quire.common.errors import ConfigError


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
    # Ray gives its workers, and so the scheduler and the ranks, a niceness of 15: on a busy machine everything else came before them.
    os.environ.setdefault("RAY_worker_niceness", "0")


def prepare_joined_ray() -> None:
    """Set what joining somebody's Ray needs. Call before anything imports ray.

    Raises:
        ConfigError: nobody said how that Ray knows its friends.
    """
    if os.environ.get("RAY_AUTH_MODE") not in ("token", "disabled"):
        raise ConfigError(
            "RAY_AUTH_MODE is not set; set it as that Ray was started: to token, with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or to "
            "disabled if only you reach its ports",
            reason="NO_RAY_AUTH_MODE",
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
