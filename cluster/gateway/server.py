"""The gRPC server: its limits, its services, its health."""

import asyncio
import logging
from typing import Final

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from quire.cluster.gateway import health_service
from quire.cluster.gateway.access import Access
from quire.cluster.gateway.cluster_service import ClusterService
from quire.cluster.gateway.health_service import HealthService
from quire.cluster.gateway.request_reader import RequestReader
from quire.cluster.gateway.service import InferenceService
from quire.cluster.gateway.tls import Certificates
from quire.v1 import cluster_pb2, inference_pb2
from quire.v1.cluster_pb2_grpc import add_ClusterServiceServicer_to_server
from quire.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server

log = logging.getLogger("quire.gateway")

INFERENCE_SERVICE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CLUSTER_SERVICE: Final = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name

# Of an answer: gRPC's clients take as much by default.
MAX_ANSWER_BYTES: Final = 4 * 2**20
MAX_METADATA_BYTES: Final = 8 * 2**10
# Streams beyond this are refused, not queued, when a client opens them before it has read our settings: 88 of 900 at 128
# (measured on a 2-core x86 machine, 2026-11-21). So it is above what one client keeps open, while one connection still cannot
# take the whole gateway (rapid reset).
MAX_STREAMS_PER_CONNECTION: Final = 1024
# gRPC drops calls at random between these two, as a bare CANCELLED; its own 1000 and 3000 are below an honest burst.
MAX_PENDING_CALLS: Final = 8192
MAX_PENDING_CALLS_HARD: Final = 16384
MAX_CONNECTIONS: Final = 1024
# A client that is gone without a word (frozen, cut off) is noticed within ten seconds. ping_timeout is the one that counts:
# with gRPC's 60 s the other two changed nothing in 45 s (measured on a 2-core x86 machine, 2026-11-21).
KEEPALIVE_TIME_MS: Final = 5_000
KEEPALIVE_TIMEOUT_MS: Final = 3_000
PING_TIMEOUT_MS: Final = 5_000
# A connection that has not said that it speaks HTTP/2, or agreed on TLS, by then is closed; gRPC's own 120 s let a thousand silent
# ones keep everybody else out for as long.
HANDSHAKE_TIMEOUT_S: Final = 10.0
# Clients may ping this often, calls or not; gRPC's own five minutes ends connections of clients that only look after theirs.
MIN_CLIENT_PING_INTERVAL_MS: Final = 5_000
MAX_CONNECTION_IDLE_MS: Final = 300_000
# A connection is closed in good order after this (new calls take another one) and by force when its calls have had their time
# besides. This alone ends calls of a client that answers pings and takes nothing: an answer that waits for room in the client's
# window, of Generate say, or the status behind it. Until then they hold a stream and some kilobytes each, but no place in the
# CallGate, and MAX_CONNECTIONS times MAX_STREAMS_PER_CONNECTION bounds them. A call whose request never comes ends much earlier
# (RequestReader); only one whose headers never end lasts as long as its connection.
MAX_CONNECTION_AGE_S: Final = 3600.0
CONNECTION_GRACE_S: Final = 60.0  # beside the longest call: for its last writes
# What gRPC may take to close its sockets after it has cancelled every call; it never needed this.
STOP_TIMEOUT_S: Final = 5.0

_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS_HARD),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_INTERVAL_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_connection_idle_ms", MAX_CONNECTION_IDLE_MS),
)


class Server:
    """The services on one port."""

    def __init__(
        self,
        inference: InferenceService,
        cluster: ClusterService,
        *,
        health: HealthService,
        access: Access,
        reader: RequestReader,
        max_call_s: float,
        max_request_bytes: int,
        shares_port: bool = False,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        max_connection_age_s: float = MAX_CONNECTION_AGE_S,
        connection_grace_s: float = CONNECTION_GRACE_S,
    ) -> None:
        """
        max_call_s: what the longest call may take; one that runs when its connection ages is not cut off
        shares_port: other servers of this user may have the same port; else a second one fails
        """
        own = (
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.so_reuseport", int(shares_port)),
            ("grpc.server_handshake_timeout_ms", round(handshake_timeout_s * 1000)),
            ("grpc.max_connection_age_ms", round(max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", round((max_call_s + connection_grace_s) * 1000)),
        )
        self._server = grpc.aio.server(options=(*_OPTIONS, *own), interceptors=(access, reader))
        add_InferenceServiceServicer_to_server(inference, self._server)
        add_ClusterServiceServicer_to_server(cluster, self._server)
        add_HealthServicer_to_server(health, self._server)
        names = (INFERENCE_SERVICE, CLUSTER_SERVICE, health_service.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, listen: str, certificates: Certificates | None = None) -> int:
        """Serve on "host:port", with TLS if there are certificates; the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        if certificates is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, certificates.credentials())
        await self._server.start()
        return port

    async def stop(self, *, grace_s: float) -> None:
        """End what still runs after grace_s."""
        try:
            async with asyncio.timeout(grace_s + STOP_TIMEOUT_S):
                await self._server.stop(grace_s)
        except TimeoutError:
            log.warning("the gRPC server did not stop within %g s and is left to the end of the process", grace_s + STOP_TIMEOUT_S)
