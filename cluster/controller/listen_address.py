"""The address of the edge, checked before anything starts."""

import ipaddress
import socket
from typing import Final

from quire.common.errors import ConfigError

MAX_PORT: Final = 65535
# Free ports whose next one may be taken.
MAX_PORT_TRIES: Final = 20


def split_address(address: str) -> tuple[str, int]:
    """'127.0.0.1:50051' or '[::1]:50051' as host and port.

    Raises:
        ConfigError: it is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise ConfigError(f"{address!r} is no address; it takes HOST:PORT, such as 127.0.0.1:50051")
    return host.strip("[]"), int(port)


def check_scheduler_address(address: str) -> None:
    """Refuse what the hosts of a cluster cannot connect to, or what is no address of this host.

    Raises:
        ConfigError: with what to do.
    """
    host, port = split_address(address)
    try:
        resolved = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"scheduler_listen is {address!r}; it takes an IP address of this host, not a name") from None
    if resolved.is_unspecified:
        raise ConfigError(
            f"scheduler_listen is {address!r}, to which nobody can connect; give the address by which other hosts reach this one"
        )
    if port == MAX_PORT:
        raise ConfigError(f"scheduler_listen is {address!r}; ranks connect to the next port, and there is none")
    try:
        free_port_pair(host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address} and the next port: {error.strerror}; choose another scheduler_listen") from None


def free_port_pair(host: str, port: int = 0) -> int:
    """A port that is free together with the next one: `port` itself if it is not 0.

    Raises:
        OSError: there is none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in range(MAX_PORT_TRIES):
        with socket.socket(family, socket.SOCK_STREAM) as first, socket.socket(family, socket.SOCK_STREAM) as second:
            for probe in (first, second):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            first.bind((host, port))
            found = int(first.getsockname()[1])
            try:
                second.bind((host, found + 1))
            except (OSError, OverflowError):
                if port or attempt + 1 == MAX_PORT_TRIES:
                    raise
                continue
            return found
    raise AssertionError("the last try returns or raises")


def check_listen_address(address: str, *, insecure: bool, has_tls: bool = False, has_tokens: bool = False) -> None:
    """Refuse an address that others reach without credentials, or that is taken.

    Raises:
        ConfigError: with what to do.
    """
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"listen address {host!r} is not known on this machine: {error.strerror}") from None
    # gRPC listens at every address that a name has.
    is_local = all(ipaddress.ip_address(resolved[0]).is_loopback for *_, resolved in found)
    if not is_local and not (has_tls and has_tokens) and not insecure:
        raise ConfigError(
            f"listen address {host} is reachable from other hosts and this server {_missing(has_tls, has_tokens)}; give --tls-cert, "
            "--tls-key and --token-file, listen on 127.0.0.1, or pass --insecure if the network is trusted"
        )
    family, _, _, _, resolved = found[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(resolved[:2])
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --listen") from None


def _missing(has_tls: bool, has_tokens: bool) -> str:
    words = ([] if has_tls else ["encrypts nothing"]) + ([] if has_tokens else ["asks for no credentials"])
    return " and ".join(words)
