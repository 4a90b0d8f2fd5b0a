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
    tls_cert: str | os.PathLike[str] | None
    tls_key: str | os.PathLike[str] | None
    api_key_file: str | os.PathLike[str] | None


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "connection", "An API key is taken from QUIRE_API_KEY, or from the file that --api-key-file or QUIRE_API_KEY_FILE names."
    )
    group.add_argument("--address", metavar="HOST:PORT", help=f"the server; {DEFAULT_HINT}")
    group.add_argument("--secure", action="store_true", help="use TLS")
    group.add_argument("--tls-ca", metavar="FILE", help="use TLS, trusting the certificate authorities in this PEM file")
    group.add_argument("--tls-cert", metavar="FILE", help="use TLS, and show this certificate (PEM) to a server that asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="the key of that certificate (PEM)")
    group.add_argument("--api-key-file", metavar="FILE", help="file with the API key; else QUIRE_API_KEY, else QUIRE_API_KEY_FILE")


def connection_options(args: argparse.Namespace) -> ConnectionOptions:
    return {
        "address": args.address,
        "secure": args.secure,
        "tls_ca": args.tls_ca,
        "tls_cert": args.tls_cert,
        "tls_key": args.tls_key,
        "api_key_file": args.api_key_file,
    }
