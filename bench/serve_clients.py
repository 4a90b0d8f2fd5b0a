"""The client processes of `quire bench serve`, as the process sees them that starts them."""

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from quire.bench.request_meter import RequestRecord
from quire.bench.serve_child import MAX_MESSAGE_BYTES, SentRequest
from quire.bench.serve_requests import LoadSpec
from quire.common.child_process import start_child, stop_child
from quire.common.clock import monotonic
from quire.common.errors import InternalError, Unavailable

# How long the processes may take to start and to connect.
START_TIMEOUT_S: Final = 60.0
# Longest time in which no request ends before the load counts as hung. Requests without a deadline get 600 s of the server.
MAX_SILENCE_S: Final = 660.0
POLL_S: Final = 0.2
# The load starts this long after the last process is ready, when all of them know it.
START_DELAY_S: Final = 0.1

Told = tuple[asyncio.StreamWriter, dict[str, Any]]
OnEnd = Callable[[int, int, float], None]


def run_clients(spec: LoadSpec, *, on_end: OnEnd = lambda num_ended, num_failed, elapsed_s: None) -> list[SentRequest]:
    """Send the load from spec.num_processes processes; what became of each request, by number.

    on_end: called with the numbers of requests that have ended and failed so far, and the time since the start

    Raises:
        Unavailable: a process cannot start or reach the server, or no request ends for MAX_SILENCE_S.
        InternalError: a process died.
    """
    return asyncio.run(_run_clients(spec, on_end))


async def _run_clients(spec: LoadSpec, on_end: OnEnd) -> list[SentRequest]:
    told: asyncio.Queue[Told] = asyncio.Queue()  # at most a message per request and three per process

    readers: list[asyncio.Task[Any] | None] = []

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        readers.append(asyncio.current_task())
        while line := await reader.readline():
            told.put_nowait((writer, json.loads(line)))

    async def let_readers_end() -> None:
        """Their processes have ended, so they do too; cancelled, asyncio would complain of them."""
        await asyncio.gather(*(reader for reader in readers if reader is not None), return_exceptions=True)

    async with contextlib.AsyncExitStack() as exits:
        folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="quire-bench-"))
        socket_path = f"{folder}/clients"
        server = await asyncio.start_unix_server(on_client, socket_path, limit=MAX_MESSAGE_BYTES)
        exits.callback(server.close)
        exits.push_async_callback(let_readers_end)
        children = []
        for process in range(spec.num_processes):
            child_spec = {"load": asdict(spec), "process": process, "socket_path": socket_path}
            api_key = {name: os.environ[name] for name in ("QUIRE_API_KEY",) if name in os.environ}  # they are clients
            children.append(start_child("quire.bench.serve_child", child_spec, environ=api_key))
            exits.callback(stop_child, children[-1])
        waiting: list[asyncio.StreamWriter] = []
        sent: list[SentRequest] = []
        num_done = num_failed = 0
        start_s, told_s, timeout_s = 0.0, monotonic(), START_TIMEOUT_S
        while num_done < spec.num_processes:
            try:
                writer, message = await asyncio.wait_for(told.get(), POLL_S)
            except TimeoutError:
                codes = [child.poll() for child in children]
                if any(codes):  # they end with 0 when they have told everything
                    raise InternalError(f"client processes ended with codes {codes}; what they said is above") from None
                if monotonic() - told_s > timeout_s:
                    raise Unavailable(f"no client process said anything for {timeout_s:g} s; {len(sent)} requests have ended") from None
                continue
            told_s = monotonic()
            match message["kind"]:
                case "ready":
                    waiting.append(writer)
                    if len(waiting) == spec.num_processes:
                        start_s, timeout_s = monotonic() + START_DELAY_S, MAX_SILENCE_S
                        for client in waiting:
                            client.write(json.dumps({"start_s": start_s}).encode() + b"\n")
                case "end":
                    sent.append(_sent_request(message["request"]))
                    num_failed += sent[-1].record.error is not None
                    on_end(len(sent), num_failed, monotonic() - start_s)
                case "done":
                    num_done += 1
                case "error":
                    raise Unavailable(f"a client process cannot go on: {message['message']}", reason=message["reason"])
    assert len(sent) == spec.num_requests, (len(sent), spec.num_requests)
    return sorted(sent, key=lambda request: request.number)


def _sent_request(entry: dict[str, Any]) -> SentRequest:
    record = entry["record"] | {"gaps_s": tuple(entry["record"]["gaps_s"])}
    return SentRequest(entry["number"], RequestRecord(**record), entry["late_s"], entry["end_s"])
