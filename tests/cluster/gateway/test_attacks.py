"""Clients that mean harm, over real sockets. An honest one is answered all the while."""

import asyncio
import contextlib
import resource
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from attacked_gateway import CANARY, attacked_gateway
from fake_scheduler import Script
from gateway_parts import refusal, until
from http2_attacker import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    MAX_FRAME_BYTES,
    NO_WINDOW,
    PREFACE,
    RST_STREAM,
    Attacker,
    frame,
    grpc_message,
    header_block,
)

from quire.cluster.gateway.server import MAX_CONNECTIONS
from quire.v1.inference_pb2 import GenerateRequest, StoppingParams
from quire.v1.inference_pb2_grpc import InferenceServiceStub

GENERATE_STREAM = "/quire.v1.InferenceService/GenerateStream"
MIB = 2**20
SUPPORT = Path(__file__).parents[2] / "support"
CERTIFICATE, KEY = SUPPORT / "localhost_certificate.pem", SUPPORT / "localhost_key.pem"
CALL = header_block(GENERATE_STREAM)
CANCEL = (8).to_bytes(4)


def call(stream: int, *, max_tokens: int = 100) -> bytes:
    """A whole request, on this stream."""
    request = GenerateRequest(text="x", stopping=StoppingParams(max_tokens=max_tokens)).SerializeToString()
    return frame(HEADERS, END_HEADERS, stream, CALL) + frame(DATA, END_STREAM, stream, grpc_message(request))


def num_attackers_possible(wanted: int) -> int:
    """As many sockets as this process may open, up to `wanted`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(wanted, hard - 1000)


async def open_attackers(stack: contextlib.AsyncExitStack, address: str, count: int) -> list[Attacker]:
    return [await stack.enter_async_context(Attacker(address)) for _ in range(count)]


async def are_closed(attackers: Sequence[Attacker], *, timeout_s: float = 60.0) -> None:
    await until(lambda: all(attacker.is_closed.is_set() for attacker in attackers), timeout_s=timeout_s)


async def test_of_ten_thousand_idle_connections_only_the_allowed_ones_stay(tmp_path: Path) -> None:
    num_attackers = num_attackers_possible(10_000)
    assert num_attackers > 2 * MAX_CONNECTIONS, "raise the limit of open files (ulimit -n) to run this test"
    async with attacked_gateway(tmp_path) as gateway, contextlib.AsyncExitStack() as held:
        attackers = []
        for _ in range(num_attackers):
            attacker = await held.enter_async_context(Attacker(gateway.address))
            attacker.greet()
            attackers.append(attacker)
        num_expected = num_attackers - MAX_CONNECTIONS
        await until(lambda: sum(attacker.is_closed.is_set() for attacker in attackers) >= num_expected, timeout_s=60)
    assert gateway.most_fds < MAX_CONNECTIONS + 200
    assert gateway.most_bytes < 512 * MIB


async def test_ten_thousand_streams_whose_requests_never_come_end_by_themselves(tmp_path: Path) -> None:
    async with attacked_gateway(tmp_path, bounds={"read_timeout_s": 2.0}) as gateway, contextlib.AsyncExitStack() as held:
        attackers = await open_attackers(held, gateway.address, 10)
        for attacker in attackers:
            attacker.greet()
            await attacker.is_greeted.wait()
            attacker.send(b"".join(frame(HEADERS, END_HEADERS, 2 * number + 1, CALL) for number in range(1000)))
            await attacker.drain()
        await until(lambda: all(attacker.received[RST_STREAM] >= 1000 for attacker in attackers), timeout_s=60)
    assert gateway.submits_of_attackers() == []
    assert gateway.most_bytes < 768 * MIB


async def test_streams_that_are_reset_as_soon_as_they_are_opened_leave_nothing(tmp_path: Path) -> None:
    async with attacked_gateway(tmp_path) as gateway:
        async with Attacker(gateway.address) as attacker:
            attacker.greet()
            for number in range(10_000):
                stream = 2 * number + 1
                attacker.send(call(stream) + frame(RST_STREAM, 0, stream, CANCEL))
                if number % 100 == 0:
                    await attacker.drain()
            await attacker.drain()
            assert not attacker.is_closed.is_set()
        async with Attacker(gateway.address) as attacker:
            attacker.greet()
            num_submits = len(gateway.submits_of_attackers())  # those that were as quick
            streams = range(1, 401, 2)
            for stream in streams:
                attacker.send(call(stream))
            await until(lambda: len(gateway.submits_of_attackers()) >= num_submits + len(streams), timeout_s=30)
            for stream in streams:
                attacker.send(frame(RST_STREAM, 0, stream, CANCEL))
            await until(gateway.are_all_cancelled, timeout_s=30)
            assert not attacker.is_closed.is_set()
    assert gateway.most_bytes < 256 * MIB


async def test_metadata_without_an_end_costs_its_connection_and_nobody_elses(tmp_path: Path) -> None:
    async with attacked_gateway(tmp_path) as gateway:
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            oversized = InferenceServiceStub(channel).Generate(CANARY, metadata=(("x", "y" * 20_000),))
            assert (await refusal(oversized)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with Attacker(gateway.address) as attacker:
            attacker.greet()
            block = header_block(GENERATE_STREAM, {"x": "y" * (64 * MIB)})
            attacker.send(frame(HEADERS, 0, 1, block[:MAX_FRAME_BYTES]))
            for start in range(MAX_FRAME_BYTES, len(block), MAX_FRAME_BYTES):
                attacker.send(frame(CONTINUATION, 0, 1, block[start : start + MAX_FRAME_BYTES]))
                await attacker.drain()
            assert attacker.received[DATA] == 0
    assert gateway.submits_of_attackers() == []
    assert gateway.most_bytes < 256 * MIB


async def test_headers_that_come_byte_by_byte_end_with_their_connection(tmp_path: Path) -> None:
    bounds = {"max_connection_age_s": 2.0, "connection_grace_s": 0.5}
    async with (
        attacked_gateway(tmp_path, bounds=bounds, request_timeout_s=0.5) as gateway,
        contextlib.AsyncExitStack() as held,
    ):
        attackers = await open_attackers(held, gateway.address, 100)
        for attacker in attackers:
            attacker.greet()
            attacker.send(frame(HEADERS, 0, 1, CALL[:10]))
        for place in range(10, 30):
            for attacker in attackers:
                attacker.send(frame(CONTINUATION, 0, 1, CALL[place : place + 1]))
            await asyncio.sleep(0.01)
        await are_closed(attackers)
    assert gateway.submits_of_attackers() == []


async def test_connections_that_never_finish_their_greeting_are_closed(tmp_path: Path) -> None:
    num_attackers_possible(1000)
    async with attacked_gateway(tmp_path, bounds={"handshake_timeout_s": 2.0}) as gateway, contextlib.AsyncExitStack() as held:
        attackers = await open_attackers(held, gateway.address, 500)
        for place in range(len(PREFACE) - 1):
            for attacker in attackers:
                attacker.send(PREFACE[place : place + 1])
        await are_closed(attackers)
    assert gateway.most_fds > 500


async def test_connections_that_never_finish_their_tls_handshake_are_closed(tmp_path: Path) -> None:
    num_attackers_possible(1000)
    hello = client_hello()
    settings: dict[str, Any] = {"tls_cert": str(CERTIFICATE), "tls_key": str(KEY)}
    async with (
        attacked_gateway(tmp_path, bounds={"handshake_timeout_s": 2.0}, **settings) as gateway,
        contextlib.AsyncExitStack() as held,
    ):
        attackers = await open_attackers(held, gateway.address, 300)
        for number, attacker in enumerate(attackers):
            attacker.send((b"", hello[: len(hello) // 2], hello)[number % 3])  # nothing, half a first message, all of it and no answer
        await are_closed(attackers)
    assert gateway.most_fds > 300


async def test_streams_that_nobody_reads_are_cancelled_and_hold_little(tmp_path: Path) -> None:
    endless = Script([300] * 1900, group_sizes=[20] * 95, delay_s=0.02, ends=False)
    async with (
        attacked_gateway(tmp_path, bounds={"write_stall_timeout_s": 1.0}, endless=endless) as gateway,
        Attacker(gateway.address, settings=NO_WINDOW) as attacker,
    ):
        attacker.greet()
        for number in range(100):
            attacker.send(call(2 * number + 1, max_tokens=1900))
        await until(lambda: len(gateway.submits_of_attackers()) == 100 and gateway.are_all_cancelled(), timeout_s=60)
        assert not attacker.is_closed.is_set()
    assert gateway.most_bytes < 256 * MIB


def client_hello() -> bytes:
    """The first message of a TLS handshake."""
    out = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    return out.read()
