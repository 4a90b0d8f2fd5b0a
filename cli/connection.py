"""The flags by which a command finds its server."""

import argparse
import os
from typing import TypedDict

DEFAULT_HINT = "else QUIRE_ADDRESS, else 127.0.0.1:50051"


class ConnectionOptions(TypedDict):
    """As `Client` and `AsyncClient` take them."""

    address: str | None
    secure: bool
    tls_ca: str | os.PathLike[str] | None


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection", "An API key is taken from QUIRE_API_KEY.")
    group.add_argument("--address", metavar="HOST:PORT", help=f"the server; {DEFAULT_HINT}")
    group.add_argument("--secure", action="store_true", help="use TLS")
    group.add_argument("--tls-ca", metavar="FILE", help="use TLS, trusting the certificate authorities in this PEM file")


def connection_options(args: argparse.Namespace) -> ConnectionOptions:
    return {"address": args.address, "secure": args.secure, "tls_ca": args.tls_ca}
