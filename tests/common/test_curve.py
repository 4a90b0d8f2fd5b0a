"""CURVE keys: where they are asked for, how they are kept, and what passes without them."""

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from quire.common.curve import CLIENT_KEY, CLUSTER_KEY, CurveKeys, Doorman, keys_for, secure_client, secure_server
from quire.common.errors import ConfigError

# How long nothing must come, where nothing may.
SILENCE_MS = 500
TIMEOUT_MS = 10_000


@pytest.mark.parametrize(
    ("address", "asks"),
    [
        ("ipc:///run/x", False),
        ("tcp://127.0.0.1:5000", False),
        ("tcp://[::1]:5000", False),
        ("tcp://localhost:5000", False),
        ("tcp://0.0.0.0:5000", True),
        ("tcp://*:5000", True),
        ("tcp://10.0.0.7:5000", True),
        ("tcp://[2001:db8::1]:5000", True),
        ("tcp://scheduler.example:5000", True),
    ],
)
def test_an_address_that_a_network_reaches_asks_for_keys(address: str, asks: bool) -> None:
    keys = CurveKeys.new()
    assert keys_for(address, keys) == (None if address.startswith("ipc") else keys)
    if asks:
        with pytest.raises(ConfigError, match="has no cluster key; give one"):
            keys_for(address, None)
    else:
        assert keys_for(address, None) is None


def test_a_clusters_keys_are_made_once_and_its_users_alone(tmp_path: Path) -> None:
    keys = CurveKeys.of_folder(tmp_path)
    assert CurveKeys.of_folder(tmp_path) == keys
    clients = CurveKeys.read(tmp_path / CLIENT_KEY)
    assert clients == keys.of_clients()
    assert keys.server_secret is not None
    assert keys.server_secret not in (tmp_path / CLIENT_KEY).read_text()
    for name in (CLUSTER_KEY, CLIENT_KEY):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    for secret in (keys.server_secret, keys.client_secret):
        assert secret not in repr(keys)
    assert CurveKeys.of_spec(keys.as_spec()) == keys


@pytest.mark.parametrize("content", ["", "MarkedKey", '{"MarkedKey": 1}', "[]"])
def test_a_file_that_holds_no_keys_is_refused_without_repeating_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is no cluster key; take the file client_key") as caught:
        CurveKeys.read(path)
    assert "MarkedKey" not in caught.value.message
    with pytest.raises(ConfigError, match="cannot be read"):
        CurveKeys.read(tmp_path / "nowhere")


@contextlib.contextmanager
def server(keys: CurveKeys) -> "Iterator[tuple[zmq.Socket[bytes], Doorman, str]]":
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    doorman = Doorman(context, keys)
    socket = context.socket(zmq.ROUTER)
    secure_server(socket, keys)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    try:
        yield socket, doorman, f"tcp://127.0.0.1:{port}"
    finally:
        context.destroy(linger=0)


@contextlib.contextmanager
def client(address: str, keys: CurveKeys | None) -> "Iterator[zmq.Socket[bytes]]":
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    if keys is not None:
        secure_client(socket, keys)
    socket.connect(address)
    try:
        yield socket
    finally:
        context.destroy(linger=0)


def arrives(socket: "zmq.Socket[bytes]", doorman: Doorman, *, timeout_ms: int) -> list[bytes] | None:
    """The next message, while the doorman does his work; None if none comes."""
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(doorman.socket, zmq.POLLIN)
    while events := dict(poller.poll(timeout_ms)):
        if doorman.socket in events:
            doorman.answer()
        if socket in events:
            return socket.recv_multipart()
    return None


def test_who_has_the_keys_is_heard() -> None:
    keys = CurveKeys.new()
    with server(keys) as (socket, doorman, address), client(address, keys.of_clients()) as sender:
        sender.send(b"hello")
        message = arrives(socket, doorman, timeout_ms=TIMEOUT_MS)
        assert message is not None
        assert message[1] == b"hello"
        socket.send_multipart([message[0], b"welcome"])
        assert sender.poll(TIMEOUT_MS)
        assert sender.recv() == b"welcome"


def strangers(keys: CurveKeys) -> dict[str, CurveKeys | None]:
    other = CurveKeys.new()
    return {
        "no keys": None,
        "keys of another cluster": other,
        "the server's public key alone": CurveKeys(keys.server_public, other.client_public, other.client_secret),
        "both public keys": CurveKeys(keys.server_public, keys.client_public, other.client_secret),
    }


@pytest.mark.parametrize("kind", list(strangers(CurveKeys.new())))
def test_nothing_of_a_stranger_gets_through(kind: str) -> None:
    keys = CurveKeys.new()
    with server(keys) as (socket, doorman, address), client(address, strangers(keys)[kind]) as stranger:
        stranger.send(b"hello")
        assert arrives(socket, doorman, timeout_ms=SILENCE_MS) is None
        assert stranger.poll(0) == 0
        with client(address, keys.of_clients()) as sender:  # and it is in nobody's way
            sender.send(b"hello")
            assert arrives(socket, doorman, timeout_ms=TIMEOUT_MS) is not None
