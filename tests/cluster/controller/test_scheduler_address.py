"""The address of a scheduler that other hosts reach: its port and the next one."""

import socket

import pytest

from quire.cluster.controller.listen_address import check_scheduler_address, free_port_pair
from quire.common.errors import ConfigError
from quire.worker.collectives import interface_of


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("somewhere:7000", "it takes an IP address of this host, not a name"),
        ("0.0.0.0:7000", "to which nobody can connect"),
        ("[::]:7000", "to which nobody can connect"),
        ("127.0.0.1:65535", "ranks connect to the next port, and there is none"),
        ("127.0.0.1", "is no address"),
        ("192.0.2.1:7000", "cannot listen on 192.0.2.1:7000 and the next port: Cannot assign"),
    ],
)
def test_what_hosts_cannot_connect_to_is_refused(address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=r".*") as caught:
        check_scheduler_address(address)
    assert why in caught.value.message


def test_both_ports_must_be_free() -> None:
    port = free_port_pair("127.0.0.1")
    check_scheduler_address(f"127.0.0.1:{port}")
    check_scheduler_address("127.0.0.1:0")
    with socket.create_server(("127.0.0.1", port + 1)), pytest.raises(ConfigError, match="and the next port: Address already in use"):
        check_scheduler_address(f"127.0.0.1:{port}")


def test_an_interface_is_known_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(Exception, match=r"no network interface of this host has the address 192\.0\.2\.1"):
        interface_of("192.0.2.1")
