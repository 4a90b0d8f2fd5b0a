"""`quire health`: asks a server whether it serves, as probes do that speak no gRPC over TLS."""

import argparse
import os
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from quire.cli.connection import DEFAULT_HINT
from quire.cli.exit_codes import EXIT_FAILED
from quire.client.settings import DEFAULT_ADDRESS
from quire.common.errors import ConfigError, Unavailable

DEFAULT_TIMEOUT_S: Final = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Exit with 0 if the server, or one service of it, is SERVING; else with 1. It asks once and needs no token."
    parser.add_argument("--service", default="", metavar="NAME", help="as in grpc.health.v1; the whole server when not given")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="S", help="seconds (default: %(default)s)")
    address = os.environ.get("QUIRE_ADDRESS", DEFAULT_ADDRESS)
    parser.add_argument("--address", default=address, metavar="HOST:PORT", help=f"the server; {DEFAULT_HINT}")
    parser.add_argument("--tls-ca", metavar="FILE", help="use TLS, trusting the certificate authorities in this PEM file")
    parser.add_argument("--tls-cert", metavar="FILE", help="show this certificate (PEM) to a server that asks for one")
    parser.add_argument("--tls-key", metavar="FILE", help="the key of that certificate (PEM)")
    parser.add_argument("--tls-server-name", metavar="NAME", help="the name in the server's certificate, where the address is another")


def run(args: argparse.Namespace) -> int:
    with _channel(args) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(service=args.service), timeout=args.timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            raise Unavailable(f"{args.address} does not tell its health: {error.code().name}: {error.details()}") from error
    status = HealthCheckResponse.ServingStatus.Name(answer.status)
    print(status)
    return 0 if answer.status == HealthCheckResponse.SERVING else EXIT_FAILED


def _channel(args: argparse.Namespace) -> grpc.Channel:
    if args.tls_ca is None:
        return grpc.insecure_channel(args.address)
    credentials = grpc.ssl_channel_credentials(_read(args.tls_ca), _read(args.tls_key), _read(args.tls_cert))
    options = (("grpc.ssl_target_name_override", args.tls_server_name),) if args.tls_server_name else ()
    return grpc.secure_channel(args.address, credentials, options=options)


def _read(path: str | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
