"""A small HTTP/1.1 server for pages that processes show of themselves: GET alone, one page per connection, everything bounded."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

log = logging.getLogger("quire.http")

# Longest head of a request; a browser's has about 1 KiB.
MAX_HEAD_BYTES: Final = 16 * 1024
# How long a peer may take to send its head, and to take its page.
READ_TIMEOUT_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 10.0
# How long a page may take to be made.
PAGE_TIMEOUT_S: Final = 10.0
# Connections at once; further ones are closed at once.
MAX_CONNECTIONS: Final = 64

_REASONS: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}


@dataclass(frozen=True, slots=True)
class Page:
    """What is answered with."""

    body: bytes
    content_type: str


Make = Callable[[Mapping[str, str]], Awaitable[Page]]  # takes the request's headers, by their names in lower case


class HttpPages:
    """Serves `pages`, by path. Nothing in a request but its path and headers is looked at."""

    def __init__(self, pages: Mapping[str, Make]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, address: str, *, may_move: bool = False) -> str:
        """Bind "host:port", port 0 for a free one; the address. may_move: take a free port if this one is taken.

        Raises:
            OSError: it cannot be bound.
        """
        host, _, port = address.rpartition(":")
        bare = host.strip("[]")
        try:
            self._server = await asyncio.start_server(self._serve, bare, int(port), limit=MAX_HEAD_BYTES)
        except OSError as error:
            if not may_move or error.errno != errno.EADDRINUSE:
                raise
            log.warning("port %s is taken; a free one is used for pages", port)
            self._server = await asyncio.start_server(self._serve, bare, 0, limit=MAX_HEAD_BYTES)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Close the socket and what is open."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._connections) < MAX_CONNECTIONS:
                self._connections.add(task)
                await self._answer(reader, writer)
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a peer that is gone, slow, or says too much, gets nothing
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(READ_TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
        status, page, has_body = await self._respond(head.decode("latin-1"))
        lines = [
            f"HTTP/1.1 {status} {_REASONS[status]}",
            f"Content-Type: {page.content_type}",
            f"Content-Length: {len(page.body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (page.body if has_body else b""))
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await writer.drain()

    async def _respond(self, head: str) -> tuple[int, Page, bool]:
        """The status, the page, and whether its body is wanted."""
        request_line, *header_lines = head.split("\r\n")
        words = request_line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return 400, _text("this is no HTTP/1.1 request"), True
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return 405, _text("only GET is answered here"), True
        make = self._pages.get(target.partition("?")[0])
        if make is None:
            return 404, _text(f"there is: {' '.join(sorted(self._pages))}"), method == "GET"
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in header_lines if line)}
        try:
            async with asyncio.timeout(PAGE_TIMEOUT_S):
                return 200, await make(headers), method == "GET"
        except Exception:
            log.exception("the page %s cannot be made", target.partition("?")[0])
            return 500, _text("the page cannot be made; the process's log says why"), method == "GET"


def _text(message: str) -> Page:
    return Page(f"{message}\n".encode(), "text/plain; charset=utf-8")
