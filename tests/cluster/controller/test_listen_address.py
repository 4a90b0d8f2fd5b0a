"""Where the edge may listen."""

import socket

import pytest

from quire.cluster.controller.listen_address import check_listen_address, split_address
from quire.common.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1:50051", ("127.0.0.1", 50051)), ("[::1]:1", ("::1", 1)), ("localhost:0", ("localhost", 0))]
)
def test_an_address_is_host_and_port(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["", "50051", ":50051", "host:", "host:x", "host:70000", "host:-1"])
def test_anything_else_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match=r"it takes HOST:PORT, such as 127\.0\.0\.1:50051"):
        split_address(address)


def test_only_loopback_goes_without_credentials() -> None:
    check_listen_address("127.0.0.1:0", insecure=False)
    check_listen_address("[::1]:0", insecure=False)
    with pytest.raises(ConfigError, match="reachable from other hosts"):
        check_listen_address("0.0.0.0:0", insecure=False)
    check_listen_address("0.0.0.0:0", insecure=True)
    check_listen_address("0.0.0.0:0", insecure=False, has_tls=True, has_tokens=True)
    with pytest.raises(ConfigError, match="this server encrypts nothing; give"):
        check_listen_address("0.0.0.0:0", insecure=False, has_tokens=True)
    with pytest.raises(ConfigError, match="this server asks for no credentials; give"):
        check_listen_address("0.0.0.0:0", insecure=False, has_tls=True)


def test_a_name_is_local_only_if_all_its_addresses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ConfigError, match="reachable from other hosts"):
        check_listen_address("mixed:0", insecure=False)


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="Address already in use; choose another with --listen"):
            check_listen_address(f"127.0.0.1:{other.getsockname()[1]}", insecure=False)


def test_an_unknown_host_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'no-such-host\.invalid' is not known"):
        check_listen_address("no-such-host.invalid:1", insecure=False)
