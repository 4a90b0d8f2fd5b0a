"""The gateway's channel to the controller, on this machine or on another."""

from typing import Any

import grpc

from quire.common.cluster_tls import CLUSTER_NAME, is_local
from quire.common.errors import ConfigError


def discovery_channel(address: str, certificates: dict[str, str] | None, options: tuple[tuple[str, Any], ...] = ()) -> grpc.aio.Channel:
    """A channel to a controller's discovery, with TLS where others could listen in.

    Raises:
        ConfigError: it would need certificates, and there are none.
    """
    if is_local(address):
        return grpc.aio.insecure_channel(address, options=options)
    if certificates is None:
        raise ConfigError(
            f"discovery at {address} is reached over a network, which takes the cluster's key; give --cluster-key FILE, the client_key of "
            "`quire key new` or of the controller's run folder",
            reason="NO_CLUSTER_KEY",
        )
    credentials = grpc.ssl_channel_credentials(
        certificates["server_certificate"].encode(), certificates["client_key"].encode(), certificates["client_certificate"].encode()
    )
    return grpc.aio.secure_channel(address, credentials, options=(*options, ("grpc.ssl_target_name_override", CLUSTER_NAME)))
