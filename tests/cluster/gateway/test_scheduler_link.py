"""The link to the scheduler by itself: its bounds, and what happens when its own loops break."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from fake_scheduler import FakeScheduler, Script
from gateway_parts import LIMITS, details_of, refusal, running_gateway, until

from quire.cluster.gateway.main import GatewayBounds
from quire.cluster.gateway.scheduler_link import LinkBounds, SchedulerLink, SchedulerStream
from quire.common.errors import InternalError, Overloaded, Unavailable
from quire.common.messages import PROTOCOL_VERSION, Cancel, Hello, SamplingState, SequenceStart, Submit, Tokens, Welcome
from quire.v1.inference_pb2 import GenerateRequest

NEVER_ENDS = Script([5], ends=False)


@contextlib.asynccontextmanager
async def linked(scheduler: FakeScheduler, **bounds: Any) -> AsyncIterator[SchedulerLink]:
    """A link that the scheduler has welcomed."""
    scheduler.limits = LIMITS
    link = SchedulerLink(gateway_id="g", bounds=LinkBounds(**bounds))
    async with scheduler:
        await link.connect(scheduler.address)
        try:
            await until(lambda: link.is_up)
            yield link
        finally:
            await link.close()


def submit(request_id: str) -> Submit:
    return Submit(
        request_id=request_id,
        attempt=1,
        tenant="local",
        priority=2,
        model="quire-tales",
        adapter="",
        prompt_ids=(5, 6),
        block_hashes=(),
        cache_root=b"",
        sequences=(SequenceStart(0),),
        n=1,
        sampling=SamplingState(),
        max_tokens=10,
        time_left_s=60.0,
        age_s=0.0,
    )


def reason_of(stream: SchedulerStream) -> str | None:
    return stream.error.reason if stream.error is not None else None


async def until_tokens(stream: SchedulerStream) -> None:
    await until(lambda: bool(stream.sequences[0].unsent))


async def until_over(stream: SchedulerStream) -> None:
    await until(lambda: stream.is_over)


class FailingReceive:
    """zmq's Socket.recv, which raises as often as it was told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_failures_left = 0
        receive = zmq.asyncio.Socket.recv

        def recv(socket: zmq.asyncio.Socket, *arguments: Any, **options: Any) -> Any:
            if self.num_failures_left > 0:
                self.num_failures_left -= 1
                raise KeyError("secret")
            return receive(socket, *arguments, **options)

        monkeypatch.setattr(zmq.asyncio.Socket, "recv", recv)


async def test_a_submit_beyond_the_outbox_is_refused_while_cancels_still_go() -> None:
    async with linked(FakeScheduler(), max_outbox_messages=2) as link:
        first, _ = link.submit(submit("a")), link.submit(submit("b"))
        with pytest.raises(Overloaded, match="2 messages wait to reach the scheduler") as refused:
            link.submit(submit("c"))
        assert (refused.value.reason, refused.value.retry_after_s, link.num_requests) == ("LINK_FULL", 2.0, 2)
        link.cancel(first, reason="test")
        assert reason_of(first) == "CANCELLED"


async def test_bad_messages_in_a_row_end_the_session_and_a_new_one_begins() -> None:
    scheduler = FakeScheduler(script=lambda _: NEVER_ENDS)
    async with linked(scheduler, max_bad_messages=3) as link:
        stream = link.submit(submit("a"))
        await until_tokens(stream)
        for _ in range(2):  # a good one between them starts the count again
            for _ in range(2):
                await scheduler.send_raw(b"not a message")
            await scheduler.welcome()
        await scheduler.send_tokens(0, offset=1, token_ids=[7])
        await until(lambda: stream.sequences[0].num_received == 2)
        assert link.is_up
        for _ in range(3):
            await scheduler.send_raw(b"not a message")
        await scheduler.wait_for(Hello, count=2)
        again = await scheduler.wait_for(Submit, count=2)
        assert (again.request_id, again.attempt, again.sequences) == ("a", 2, (SequenceStart(0, (5, 7)),))
        assert not stream.is_over
        await until_tokens(link.submit(submit("b")))


async def test_a_link_whose_loop_fails_is_opened_anew_and_its_requests_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive = FailingReceive(monkeypatch)
    scheduler = FakeScheduler(script=lambda _: NEVER_ENDS)
    async with linked(scheduler, first_backoff_s=0.01, max_failures=3) as link:
        stream = link.submit(submit("a"))
        await until_tokens(stream)
        receive.num_failures_left = 3
        await scheduler.welcome()  # after which the loop receives again
        await until(lambda: not link.is_up)
        with pytest.raises(Unavailable):
            link.submit(submit("b"))
        await until(lambda: link.is_up)
        assert receive.num_failures_left == 0
        await until_tokens(link.submit(submit("c")))
        assert [(message.request_id, message.attempt) for message in scheduler.of_kind(Submit)] == [("a", 1), ("a", 2), ("c", 1)]
        assert not stream.is_over
    assert "the link to the scheduler failed: KeyError in quire.cluster.gateway.scheduler_link._receive" in caplog.text
    assert "secret" not in caplog.text


async def test_failures_that_lie_further_apart_than_the_window_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = FailingReceive(monkeypatch)
    scheduler = FakeScheduler()
    async with linked(scheduler, first_backoff_s=0.001, max_failures=1, failure_window_s=0.0) as link:
        for count in range(2, 6):
            receive.num_failures_left = 1
            await scheduler.welcome()
            await scheduler.wait_for(Hello, count=count)
            await until(lambda: link.is_up)


async def test_a_link_that_fails_too_often_ends_the_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of a gateway is what its process waits for: it ends with exit code 1 when the watch does (test_main.py)."""
    receive = FailingReceive(monkeypatch)
    bounds = GatewayBounds(link=LinkBounds(first_backoff_s=0.001, max_failures=2))
    async with running_gateway(tmp_path, scheduler=FakeScheduler(script=lambda _: NEVER_ENDS), bounds=bounds) as running:
        call = running.inference.GenerateStream(GenerateRequest(text="x"))
        await call.read()
        receive.num_failures_left = 1000
        await running.scheduler.welcome()
        with pytest.raises(InternalError, match="the link to the scheduler failed 3 times within 60 s") as failed:
            await running.watch
        assert failed.value.reason == "LINK_FAILED"
        assert details_of(await refusal(call))[0].reason == "SCHEDULER_LOST"
        await running.wait_for_health("NOT_SERVING")


async def test_a_link_that_closes_cancels_what_is_in_flight() -> None:
    scheduler = FakeScheduler(script=lambda _: NEVER_ENDS)
    async with linked(scheduler) as link:
        stream = link.submit(submit("a"))
        await until_tokens(stream)
        await link.close()
        assert (await scheduler.wait_for(Cancel)).request_id == "a"
        assert reason_of(stream) == "CANCELLED"


async def test_a_welcome_of_another_session_means_that_everything_is_submitted_again() -> None:
    """The scheduler gave the gateway up, because it did not take its messages, and has forgotten its requests."""
    scheduler = FakeScheduler(script=lambda _: NEVER_ENDS)
    async with linked(scheduler) as link:
        running = link.submit(submit("a"))
        await until_tokens(running)
        await scheduler.welcome()  # of the same session: only the limits changed
        scheduler.on_submit = lambda *_: None
        silent = link.submit(submit("b"))
        await scheduler.wait_for(Submit, count=2)
        assert not running.is_over
        scheduler.session += 1
        scheduler.on_submit = None
        await scheduler.welcome()
        await scheduler.wait_for(Submit, count=4)
        again = [(message.request_id, message.attempt, message.sequences[0].resumed_ids) for message in scheduler.of_kind(Submit)[2:]]
        assert again == [("a", 2, (5,)), ("b", 2, ())]  # supersedes what the new session may have taken of attempt 1
        await until_tokens(silent)
        assert (link.is_up, running.is_over, len(scheduler.of_kind(Hello)), scheduler.of_kind(Cancel)) == (True, False, 1, [])
        await until_tokens(link.submit(submit("c")))


async def test_cancels_that_wait_to_leave_outlive_a_session() -> None:
    scheduler = FakeScheduler(script=lambda _: NEVER_ENDS)
    async with linked(scheduler) as link:
        stream = link.submit(submit("a"))
        await until_tokens(stream)
        link.cancel(stream, reason="test")
        link._on_welcome(Welcome(PROTOCOL_VERSION, scheduler.scheduler_id, LIMITS, scheduler.session + 1))
        assert (await scheduler.wait_for(Cancel)).request_id == "a"


async def test_a_first_token_is_read_before_the_next_tokens_of_others() -> None:
    scheduler = FakeScheduler(script=lambda _: Script([], ends=False))
    async with linked(scheduler) as link:
        streams = {name: link.submit(submit(name)) for name in ("a", "b", "c")}
        await until(lambda: all(stream.handle is not None for stream in streams.values()))
        handles = {name: stream.handle or 0 for name, stream in streams.items()}
        for name in ("a", "b"):
            await scheduler.send_tokens(handles[name], offset=0, token_ids=(5,))
            await until_tokens(streams[name])
        readers: list[str] = []

        async def read(name: str) -> None:
            await streams[name].wait_for_news()
            readers.append(name)

        async with asyncio.TaskGroup() as tasks:
            for name in streams:
                tasks.create_task(read(name))
            await asyncio.sleep(0)
            await scheduler.send(Tokens(tuple(handles.values()), (0, 0, 0), (1, 1, 0), (1, 1, 1), (6, 6, 5), ()))
        assert readers == ["c", "a", "b"]
