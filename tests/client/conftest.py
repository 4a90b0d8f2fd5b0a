from collections.abc import Iterator

import pytest
from fake_inference_server import FakeServer

from quire.client import Client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.delenv("QUIRE_ADDRESS", raising=False)
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
