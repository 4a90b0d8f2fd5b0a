"""A client of HTTP/2 that keeps no rule: gRPC's own clients would not do what attackers do."""

import asyncio
import contextlib
from collections import Counter
from types import TracebackType
from typing import Final, Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
ACK = END_STREAM = 1
END_HEADERS = 4
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES: Final = 16384
NO_WINDOW: Final = b"\x00\x04\x00\x00\x00\x00"  # as settings: there is no room for a single byte of an answer


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def header_block(path: str, more: dict[str, str] | None = None) -> bytes:
    """The headers of a gRPC call, as literals."""
    names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "content-type": "application/grpc", "te": "trailers"}
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in {**names, **(more or {})}.items())


def grpc_message(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4) + message


def _text(value: str) -> bytes:
    size, length = len(value), b""
    if size < 127:
        return bytes([size]) + value.encode()
    length, size = b"\x7f", size - 127
    while size >= 128:
        length, size = length + bytes([size % 128 + 128]), size // 128
    return length + bytes([size]) + value.encode()


class Attacker:
    """One connection. Once it has greeted it answers settings and pings, so that only what it does beside that can be held against it."""

    def __init__(self, address: str, *, settings: bytes = b"") -> None:
        self._address = address
        self._settings = settings
        self._has_greeted = False
        self.received: Counter[int] = Counter()  # frames by kind
        self.is_closed = asyncio.Event()  # by the server
        self.is_greeted = asyncio.Event()  # the server has acknowledged our settings

    async def __aenter__(self) -> Self:
        host, _, port = self._address.rpartition(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        self._task = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.transport.abort()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def greet(self) -> None:
        self._has_greeted = True
        self.send(PREFACE + frame(SETTINGS, 0, 0, self._settings))

    def send(self, content: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(content)

    async def drain(self) -> None:
        """Wait until the kernel took what was sent; nothing if the server has closed."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def _answer(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                kind = head[3]
                self.received[kind] += 1
                if kind == SETTINGS and head[4] & ACK:
                    self.is_greeted.set()
                if kind in (SETTINGS, PING) and not head[4] & ACK and self._has_greeted:
                    self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_closed.set()
