from collections.abc import Iterator

import pytest
from fake_inference_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server
