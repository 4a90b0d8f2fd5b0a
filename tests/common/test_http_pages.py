"""The server of metrics and status pages, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from quire.common import http_pages
from quire.common.http_pages import HttpPages, Page


async def _hello(headers: Mapping[str, str]) -> Page:
    return Page(f"hello {headers.get('accept', 'nobody')}".encode(), "text/plain")


async def _broken(headers: Mapping[str, str]) -> Page:
    raise ValueError("a secret")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    pages = HttpPages({"/hello": _hello, "/broken": _broken})
    yield await pages.start("127.0.0.1:0")
    await pages.stop()


async def _send(address: str, request: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_page_is_made_from_the_headers(address: str) -> None:
    head, _, body = (await _send(address, b"GET /hello?x=1 HTTP/1.1\r\nAccept: text/plain\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"Content-Length: 16" in head
    assert body == b"hello text/plain"


async def test_head_gives_no_body(address: str) -> None:
    head, _, body = (await _send(address, b"HEAD /hello HTTP/1.1\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


@pytest.mark.parametrize(
    ("request_line", "status", "says"),
    [
        (b"GET /nothing HTTP/1.1", b"404", b"/broken /hello"),
        (b"POST /hello HTTP/1.1", b"405", b"only GET"),
        (b"nonsense", b"400", b"no HTTP"),
    ],
)
async def test_what_is_not_served_is_said(address: str, request_line: bytes, status: bytes, says: bytes) -> None:
    answer = await _send(address, request_line + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert says in answer


async def test_an_error_stays_inside(address: str) -> None:
    answer = await _send(address, b"GET /broken HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500")
    assert b"secret" not in answer


async def test_a_head_without_end_is_cut_off(address: str) -> None:
    assert await _send(address, b"GET /hello HTTP/1.1\r\n" + b"a" * (http_pages.MAX_HEAD_BYTES + 1)) == b""


async def test_a_peer_that_says_nothing_is_cut_off(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pages, "READ_TIMEOUT_S", 0.05)
    assert await _send(address, b"GET") == b""


async def test_connections_beyond_the_bound_are_closed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pages, "MAX_CONNECTIONS", 1)
    host, _, port = address.rpartition(":")
    _, first = await asyncio.open_connection(host, int(port))
    try:
        answers = [await _send(address, b"GET /hello HTTP/1.1\r\n\r\n") for _ in range(5)]  # it may not have taken the first one yet
        assert answers[-1] == b""
    finally:
        first.close()


async def test_a_taken_port_is_refused_or_left_as_told(address: str) -> None:
    other = HttpPages({})
    with pytest.raises(OSError, match="address already in use"):
        await other.start(address)
    moved = await other.start(address, may_move=True)
    await other.stop()
    assert moved != address
