"""Health: every watcher hears of changes, and none of them can hold up another, the gateway, or its end."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from gateway_parts import until
from google.rpc import status_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from quire.cluster.gateway.health_service import LIVE, HealthService

STATUS = HealthCheckResponse.ServingStatus


class Watcher:
    """A client of Watch, which takes a message only while it has room."""

    def __init__(self, *, has_room: bool = True) -> None:
        self.heard: list[str] = []
        self.has_room = asyncio.Event()
        self.aborted: Any = None
        if has_room:
            self.has_room.set()

    async def write(self, message: HealthCheckResponse) -> None:
        await self.has_room.wait()
        self.heard.append(STATUS.Name(message.status))

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.aborted = (code, status_pb2.Status.FromString(dict(trailing_metadata)["grpc-status-details-bin"]).message)
        raise grpc.aio.AbortError


@contextlib.asynccontextmanager
async def watching(health: HealthService, *watchers: Watcher, service: str = "") -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(health.Watch(HealthCheckRequest(service=service), watcher)) for watcher in watchers]  # type: ignore[arg-type]
    try:
        await asyncio.sleep(0)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_watchers_hear_of_each_change_and_of_nothing_else() -> None:
    def heard(num_messages: int) -> bool:
        return all(len(watcher.heard) >= num_messages for watcher in watchers)

    health, watchers = HealthService([""]), [Watcher(), Watcher()]
    async with watching(health, *watchers):
        for is_serving, num_heard in ((True, 2), (True, 2), (False, 3), (True, 4)):
            health.set_serving(is_serving)
            await until(functools.partial(heard, num_heard))
        health.shut_down()
        health.set_serving(True)  # too late
        await until(functools.partial(heard, 5))
    for watcher in watchers:
        assert watcher.heard == ["NOT_SERVING", "SERVING", "NOT_SERVING", "SERVING", "NOT_SERVING"]
    assert health.num_watchers == 0


async def test_a_watcher_without_room_holds_up_nobody_and_hears_the_latest() -> None:
    health, stuck, other = HealthService([""]), Watcher(has_room=False), Watcher()
    async with watching(health, stuck, other):
        for is_serving in (True, False, True):
            health.set_serving(is_serving)
            await asyncio.sleep(0)
        await until(lambda: other.heard[-1] == "SERVING")
        stuck.has_room.set()
        await until(lambda: len(stuck.heard) == 2)
        assert stuck.heard == ["NOT_SERVING", "SERVING"]  # the one that it had no room for, and how things are now


async def test_a_watcher_without_room_is_given_up() -> None:
    health, stuck = HealthService([""], write_timeout_s=0.05), Watcher(has_room=False)
    async with watching(health, stuck) as tasks:
        await asyncio.wait(tasks, timeout=5)
        assert stuck.aborted == (grpc.StatusCode.CANCELLED, "the client took nothing for 0.05 s")
        assert health.num_watchers == 0


async def test_a_watcher_that_leaves_takes_no_other_with_it() -> None:
    health, staying = HealthService([""]), Watcher()
    async with watching(health, staying):
        async with watching(health, Watcher()):
            assert health.num_watchers == 2
        assert health.num_watchers == 1
        health.set_serving(True)
        await until(lambda: staying.heard == ["NOT_SERVING", "SERVING"])


async def test_a_watcher_too_many_is_refused() -> None:
    health, late = HealthService([""], max_watchers=2), Watcher()
    async with watching(health, Watcher(), Watcher()):
        with pytest.raises(grpc.aio.AbortError):
            await health.Watch(HealthCheckRequest(), late)  # type: ignore[arg-type]
    assert late.aborted == (grpc.StatusCode.RESOURCE_EXHAUSTED, "2 watchers are there already; use Check, or try again")


async def test_an_unknown_service_is_unknown() -> None:
    health, watcher = HealthService(["", "known"]), Watcher()
    async with watching(health, watcher, service="other"):
        health.set_serving(True)
        await until(lambda: watcher.heard == ["SERVICE_UNKNOWN"])
    context: Any = Watcher()
    assert (await health.Check(HealthCheckRequest(service="known"), context)).status == HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AbortError):
        await health.Check(HealthCheckRequest(service="other"), context)
    assert context.aborted[0] is grpc.StatusCode.NOT_FOUND


async def test_the_process_lives_whatever_it_can_serve() -> None:
    """What a liveness probe asks: NOT_SERVING there would end a gateway that only waits for a scheduler, or finishes its streams."""
    health, watcher = HealthService([""]), Watcher()
    for is_serving in (True, False):
        health.set_serving(is_serving)
        answer = await health.Check(HealthCheckRequest(service=LIVE), watcher)  # type: ignore[arg-type]
        assert answer.status == HealthCheckResponse.SERVING
    async with watching(health, watcher, service=LIVE):
        await until(lambda: watcher.heard == ["SERVING"])
