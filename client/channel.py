"""How the SDK sets up its gRPC channels. Edge."""

from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from quire.client.results import ServingStatus
from quire.client.settings import ClientSettings, is_loopback

# A prompt of a million token ids with log probabilities fits; gRPC's own limit for what is received is 4 MiB.
MAX_MESSAGE_BYTES: Final = 64 * 2**20
# While calls run, a silent server is asked for a sign of life this often, and is lost when none comes in time. The gateway
# permits a ping every 5 s; gRPC's own servers end connections that send more than one in 5 min.
KEEPALIVE_TIME_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 20_000
# After a refused connection: a server that starts is found soon.
FIRST_RECONNECT_MS: Final = 200
MAX_RECONNECT_MS: Final = 5_000

# grpc.health.v1.Health/Check. Its two messages have the form of protobuf's wrappers (field 1: a string; field 1: an enum),
# which saves the base install grpcio-health-checking.
_HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
_SERVING_STATUSES: Final[dict[int, ServingStatus]] = {1: "SERVING", 2: "NOT_SERVING"}


def open_channel(settings: ClientSettings) -> grpc.Channel:
    """A channel that connects at its first call."""
    if settings.secure:
        return grpc.secure_channel(settings.address, _credentials(settings), _options(settings))
    return grpc.insecure_channel(settings.address, _options(settings))


def open_aio_channel(settings: ClientSettings) -> grpc.aio.Channel:
    """As `open_channel`, for the running event loop."""
    if settings.secure:
        return grpc.aio.secure_channel(settings.address, _credentials(settings), _options(settings))
    return grpc.aio.insecure_channel(settings.address, _options(settings))


def health_method(channel: grpc.Channel) -> "grpc.UnaryUnaryMultiCallable[StringValue, Int32Value]":
    return channel.unary_unary(_HEALTH_CHECK, request_serializer=StringValue.SerializeToString, response_deserializer=Int32Value.FromString)


def aio_health_method(channel: grpc.aio.Channel) -> "grpc.aio.UnaryUnaryMultiCallable[StringValue, Int32Value]":
    return channel.unary_unary(_HEALTH_CHECK, request_serializer=StringValue.SerializeToString, response_deserializer=Int32Value.FromString)


def serving_status(response: Int32Value) -> ServingStatus:
    return _SERVING_STATUSES.get(response.value, "UNKNOWN")


def _credentials(settings: ClientSettings) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(settings.tls_ca_pem, settings.tls_key_pem, settings.tls_cert_pem)


def _options(settings: ClientSettings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),  # a request may wait in the queue for minutes
        ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
        ("grpc.min_reconnect_backoff_ms", FIRST_RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
        # http_proxy is for other machines.
        ("grpc.enable_http_proxy", 0 if is_loopback(settings.address) else 1),
    ]
