"""A client process of `quire bench serve`: `python -m quire.bench.serve_child`.

It says that it is ready, waits to be told when the load starts, tells of each request that ends, and at last that all have. Each
message is a line of JSON on a Unix socket: this command needs nothing but the SDK.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from quire.bench.request_meter import RequestRecord, measure_stream
from quire.bench.serve_requests import LoadSpec, PlannedRequest, plan_requests, share_of
from quire.client import AsyncClient, QuireError
from quire.common.child_process import enter_child
from quire.common.clock import monotonic

# Requests of an open loop that one process may have in flight; beyond them arrivals wait, which the report shows as lateness.
MAX_IN_FLIGHT: Final = 1_000
# Longest message: a request's times, some bytes per token.
MAX_MESSAGE_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class SentRequest:
    """What became of one request."""

    number: int
    record: RequestRecord
    late_s: float  # from its arrival to its call; 0 in a closed loop
    end_s: float  # since the start of the load


async def send_closed(
    client: AsyncClient,
    spec: LoadSpec,
    requests: Sequence[PlannedRequest],
    *,
    num_callers: int,
    start_s: float,
    on_end: Callable[[SentRequest], None],
) -> None:
    """num_callers callers, each of which sends its next request when its last one has ended."""
    waiting = iter(requests)

    async def caller() -> None:
        for request in waiting:  # shared: each request goes to one caller
            on_end(await _send(client, spec, request, load_start_s=start_s, arrival_s=None))

    await asyncio.gather(*(caller() for _ in range(min(num_callers, len(requests)))))


async def send_open(
    client: AsyncClient, spec: LoadSpec, requests: Sequence[PlannedRequest], *, start_s: float, on_end: Callable[[SentRequest], None]
) -> None:
    """Each request at its time. Its times count from its arrival, so a client that is late hides nothing."""
    free = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def send(request: PlannedRequest) -> None:
        try:
            on_end(await _send(client, spec, request, load_start_s=start_s, arrival_s=start_s + request.arrival_s))
        finally:
            free.release()

    async with asyncio.TaskGroup() as tasks:
        for request in requests:
            await asyncio.sleep(start_s + request.arrival_s - monotonic())
            await free.acquire()
            tasks.create_task(send(request))


async def _send(
    client: AsyncClient, spec: LoadSpec, request: PlannedRequest, *, load_start_s: float, arrival_s: float | None
) -> SentRequest:
    now_s = monotonic()
    stream = client.stream(
        request.prompt,
        model=spec.model,
        max_tokens=request.max_tokens,
        temperature=spec.temperature,
        ignore_eos=request.ignore_eos,
        seed=request.number,
        cache_salt=spec.cache_salt,
    )
    record = await measure_stream(stream, start_s=now_s if arrival_s is None else arrival_s)
    return SentRequest(request.number, record, 0.0 if arrival_s is None else now_s - arrival_s, monotonic() - load_start_s)


async def run(spec: LoadSpec, *, process: int, socket_path: str) -> None:
    """One process's share of the load; socket_path: where its parent listens."""
    reader, writer = await asyncio.open_unix_connection(socket_path, limit=MAX_MESSAGE_BYTES)

    def tell(kind: str, **fields: Any) -> None:
        writer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")  # the parent reads at once

    def on_end(request: SentRequest) -> None:
        tell("end", request=asdict(request))

    try:
        requests, num_callers = share_of(plan_requests(spec), spec, process=process)
        async with AsyncClient(spec.address) as client:
            await client.models()  # connects
            tell("ready")
            start_s = float(json.loads(await reader.readline())["start_s"])
            await asyncio.sleep(start_s - monotonic())
            if spec.rate_per_s is None:
                await send_closed(client, spec, requests, num_callers=num_callers, start_s=start_s, on_end=on_end)
            else:
                await send_open(client, spec, requests, start_s=start_s, on_end=on_end)
        tell("done")
    except QuireError as error:
        tell("error", message=error.message, reason=error.reason)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def main(spec: dict[str, Any]) -> int:
    """Run to the end of the load."""
    load = spec["load"] | {"prompts": tuple(spec["load"]["prompts"])}
    asyncio.run(run(LoadSpec(**load), process=spec["process"], socket_path=spec["socket_path"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(enter_child()))
