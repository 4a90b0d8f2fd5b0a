"""What a client is told once: where the server is, who calls, how long to try."""

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from quire.common.errors import ConfigError, InvalidRequest

DEFAULT_PORT: Final = 50051
DEFAULT_ADDRESS: Final = f"127.0.0.1:{DEFAULT_PORT}"
# gRPC's own clock overflows far above this, and then a call fails at once.
MAX_TIMEOUT_S: Final = 1e8
DEFAULT_TIMEOUT_S: Final = 600.0
DEFAULT_MAX_RETRIES: Final = 2


@dataclass(frozen=True, slots=True)
class ClientSettings:
    address: str  # as gRPC takes it: host:port, [v6]:port, unix:path
    secure: bool  # TLS
    tls_ca_pem: bytes | None  # who may sign the server's certificate; None takes the system's list
    api_key: str | None = field(repr=False)  # Invariant: None unless `secure` or the address is this machine
    tls_cert_pem: bytes | None  # shown to a server that asks for one
    tls_key_pem: bytes | None = field(repr=False)  # Invariant: there if and only if tls_cert_pem is
    timeout_s: float  # of each call, retries included; infinity for none
    max_retries: int

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s is {self.timeout_s}; it takes seconds above 0, or float('inf') for no limit")
        if self.max_retries < 0:
            raise ConfigError(f"max_retries is {self.max_retries}; it takes 0 or more")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


def resolve_settings(
    address: str | None,
    *,
    api_key: str | None,
    secure: bool,
    tls_ca: str | os.PathLike[str] | None,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    api_key_file: str | os.PathLike[str] | None = None,
    timeout_s: float,
    max_retries: int,
    environ: Mapping[str, str] = os.environ,
) -> ClientSettings:
    """Fill in from QUIRE_ADDRESS, QUIRE_API_KEY and QUIRE_API_KEY_FILE what was not given.

    Raises:
        ConfigError: the API key would travel unencrypted to another machine, a file cannot be read, or a number is out of range.
    """
    address = _with_port(address or environ.get("QUIRE_ADDRESS") or DEFAULT_ADDRESS)
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError(f"tls_cert is {tls_cert} and tls_key is {tls_key}; give both or neither")
    api_key = api_key or _api_key(api_key_file, environ)
    secure = secure or tls_ca is not None or tls_cert is not None
    if api_key and not secure and not is_loopback(address):
        raise ConfigError(f"the API key would travel unencrypted to {address}; give secure=True or tls_ca=..., or no key")
    return ClientSettings(
        address=address,
        secure=secure,
        tls_ca_pem=None if tls_ca is None else _read(tls_ca, what="tls_ca"),
        tls_cert_pem=None if tls_cert is None else _read(tls_cert, what="tls_cert"),
        tls_key_pem=None if tls_key is None else _read(tls_key, what="tls_key"),
        api_key=api_key,
        timeout_s=timeout_s,
        max_retries=max_retries,
    )


def changed(settings: ClientSettings, *, timeout_s: float | None, max_retries: int | None) -> ClientSettings:
    """The settings with other limits; None keeps one. Raises as ClientSettings does."""
    return replace(
        settings,
        timeout_s=settings.timeout_s if timeout_s is None else timeout_s,
        max_retries=settings.max_retries if max_retries is None else max_retries,
    )


def call_timeout_s(settings: ClientSettings, timeout_s: float | None) -> float:
    """The time that one call has: its own, else the client's.

    Raises:
        InvalidRequest: it is not above 0.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidRequest(f"timeout_s is {timeout_s}; it takes seconds above 0", field="timeout_s")
    limit_s = settings.timeout_s if timeout_s is None else timeout_s
    return limit_s if math.isinf(limit_s) else min(limit_s, MAX_TIMEOUT_S)


def is_loopback(address: str) -> bool:
    """Whether an address cannot be another machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _with_port(address: str) -> str:
    """gRPC would take 443 for a host without a port; we take our own."""
    if address.startswith("unix:") or "://" in address:
        return address
    name = address.rpartition("]")[2] if address.startswith("[") else address
    return address if ":" in name else f"{address}:{DEFAULT_PORT}"


def _api_key(api_key_file: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> str | None:
    """From the file that is given, else from the environment."""
    if api_key_file is None and environ.get("QUIRE_API_KEY"):
        return environ["QUIRE_API_KEY"]
    path = api_key_file or environ.get("QUIRE_API_KEY_FILE")
    if not path:
        return None
    try:
        key = _read(path, what="api_key_file").decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"the file of api_key_file, {path}, must hold one API key and nothing else")
    return key


def _read(path: str | os.PathLike[str], *, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"the file of {what}, {path}, cannot be read: {error.strerror}") from error
