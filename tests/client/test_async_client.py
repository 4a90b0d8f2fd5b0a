"""The asynchronous client against a real gRPC server; what it shares with the synchronous one is tested there."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from fake_inference_server import Failure, FakeServer, Reply

from quire.client import AsyncClient, Cancelled, Client, DeadlineExceeded, NotFound, Overloaded, Unavailable


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as client:
        yield client


async def test_it_answers_as_the_synchronous_client(server: FakeServer, client: AsyncClient) -> None:
    with Client(server.address) as other:
        assert await client.generate("x", n=2) == other.generate("x", n=2)
        assert [delta async for delta in client.stream([1])] == list(other.stream([1]))
        assert await client.chat([("user", "x")]) == other.chat([("user", "x")])
        assert [delta async for delta in client.chat_stream([("user", "x")])] == list(other.chat_stream([("user", "x")]))
        assert await client.tokenize("x") == other.tokenize("x")
        assert await client.detokenize([1, 2]) == other.detokenize([1, 2])
        assert await client.models() == other.models()
        assert await client.health() == other.health()
        assert await client.cluster.groups() == other.cluster.groups()
        assert await client.cluster.queue() == other.cluster.queue()
        assert await client.cluster.blocks("group-0") == other.cluster.blocks("group-0")
        assert await client.cluster.drain("group-0") == other.cluster.drain("group-0")
        assert await client.cluster.scale("m", 1) == other.cluster.scale("m", 1)
        assert await client.cluster.restart(group_id="group-0") == other.cluster.restart(group_id="group-0")
    assert server.requests[0::2] == server.requests[1::2]


def test_both_clients_have_the_same_methods() -> None:
    assert {name for name in dir(Client) if name[0] != "_"} == {name for name in dir(AsyncClient) if name[0] != "_"}


async def test_many_streams_run_at_once(server: FakeServer, client: AsyncClient) -> None:
    async def text() -> str:
        return "".join([delta.text async for delta in client.stream("x")])

    assert await asyncio.gather(*(text() for _ in range(8))) == ["Once upon a time."] * 8


async def test_cancel_reaches_the_server_and_ends_the_iteration(server: FakeServer, client: AsyncClient) -> None:
    server.script = [Reply(hang=True)]
    received = []
    stream = client.stream("x")
    async for delta in stream:
        received.append(delta.text)
        if len(received) == 2:
            stream.cancel()
    assert received == ["Once ", "upon "]
    assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_cancel_by_another_task_ends_a_waiting_iteration(server: FakeServer, client: AsyncClient) -> None:
    server.script = [Reply(hang=True)]
    stream = client.stream("x")
    asyncio.get_running_loop().call_later(0.1, stream.cancel)
    assert len([delta async for delta in stream]) == 3


@pytest.mark.parametrize("streams", [True, False])
async def test_cancelling_the_task_cancels_the_request(server: FakeServer, client: AsyncClient, streams: bool) -> None:
    server.script = [Reply(hang=True)]

    async def run() -> None:
        if streams:
            async for _ in client.stream("x"):
                pass
        else:
            await client.generate("x")

    task = asyncio.create_task(run())
    assert await asyncio.to_thread(server.asked.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.cancelled.wait, 5)


@pytest.mark.parametrize("streams", [True, False])
async def test_closing_the_client_ends_a_running_call(server: FakeServer, streams: bool) -> None:
    server.script = [Reply(hang=True)]
    client = AsyncClient(server.address)

    async def run() -> None:
        if streams:
            async for _ in client.stream("x"):
                pass
        else:
            await client.generate("x")

    task = asyncio.create_task(run())
    assert await asyncio.to_thread(server.asked.wait, 5)
    await client.close()
    with pytest.raises(Cancelled):
        await task
    assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_closing_the_client_ends_a_stream_that_nobody_reads_just_now(server: FakeServer) -> None:
    server.script = [Reply(hang=True)]
    client = AsyncClient(server.address)
    stream = client.stream("x")
    await anext(stream)
    await client.close()
    assert await asyncio.to_thread(server.cancelled.wait, 5)
    with pytest.raises(Cancelled):
        async for _ in stream:
            pass


async def test_leaving_the_block_of_a_stream_cancels_it(server: FakeServer, client: AsyncClient) -> None:
    server.script = [Reply(hang=True)]
    async with client.stream("x") as stream:
        await anext(stream)
    assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_retries_and_typed_errors(server: FakeServer, client: AsyncClient) -> None:
    busy = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", metadata={"waiting": "9"}, retry_after_s=0.01)
    server.script = [busy, busy, Reply()]
    assert (await client.generate("x")).text == "Once upon a time."
    server.script = [busy, busy, Reply()]
    assert len([delta async for delta in client.stream("x")]) == 4
    server.script = [busy]
    with pytest.raises(Overloaded, match="full") as caught:
        await client.generate("x")
    assert (caught.value.reason, caught.value.metadata, caught.value.retry_after_s) == ("QUEUE_FULL", {"waiting": "9"}, 0.01)
    with pytest.raises(Overloaded):
        await anext(client.with_options(max_retries=0).stream("x"))
    with pytest.raises(NotFound):
        await client.cluster.drain("other")


async def test_nothing_is_tried_again_once_something_was_received(server: FakeServer, client: AsyncClient) -> None:
    server.script = [Reply(fail=Failure(grpc.StatusCode.UNAVAILABLE, retry_after_s=0.001)), Reply()]
    stream = client.stream("x")
    texts = [(await anext(stream)).text for _ in range(4)]
    with pytest.raises(Unavailable):
        await anext(stream)
    assert "".join(texts) == "Once upon a time."
    assert len(server.requests) == 1


async def test_the_timeout_ends_a_call_with_its_number(server: FakeServer, client: AsyncClient) -> None:
    server.script = [Reply(hang=True)]
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
        await client.generate("x", timeout_s=0.1)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
        async for _ in client.stream("x", timeout_s=0.1):
            pass


def test_it_may_be_made_outside_the_event_loop(server: FakeServer) -> None:
    client = AsyncClient(server.address)

    async def run() -> str:
        async with client.with_options(timeout_s=5) as same:
            return (await same.generate("x")).text

    assert asyncio.run(run()) == "Once upon a time."
