"""The client processes of `quire bench serve`, as the process sees them that starts them."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import zmq

from quire.bench.request_meter import RequestRecord
from quire.bench.serve_child import SentRequest
from quire.bench.serve_requests import LoadSpec
from quire.common.child_process import start_child, stop_child
from quire.common.clock import monotonic
from quire.common.errors import InternalError, Unavailable

# How long the processes may take to start and to connect.
START_TIMEOUT_S: Final = 60.0
# Longest time in which no request ends before the load counts as hung. Requests without a deadline get 600 s of the server.
MAX_SILENCE_S: Final = 660.0
POLL_MS: Final = 200
# The load starts this long after the last process is ready, when all of them know it.
START_DELAY_S: Final = 0.1


def run_clients(spec: LoadSpec, *, on_end: Callable[[int, int, float], None] = lambda ended, failed, elapsed_s: None) -> list[SentRequest]:
    """Send the load from spec.num_processes processes; what became of each request, by number.

    on_end: called with the numbers of requests that have ended and failed so far, and the time since the start

    Raises:
        Unavailable: a process cannot start or reach the server, or no request ends for MAX_SILENCE_S.
        InternalError: a process died.
    """
    with contextlib.ExitStack() as exits:
        folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="quire-bench-"))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        exits.callback(context.destroy, linger=0)
        socket = context.socket(zmq.ROUTER)
        address = f"ipc://{folder}/clients"
        socket.bind(address)
        children = []
        for process in range(spec.num_processes):
            children.append(start_child("quire.bench.serve_child", {"load": asdict(spec), "process": process, "address": address}))
            exits.callback(stop_child, children[-1])
        waiting: set[bytes] = set()
        sent: list[SentRequest] = []
        num_told = num_ended = num_failed = 0
        start_s, silent_since_s, timeout_s = 0.0, monotonic(), START_TIMEOUT_S
        while num_told < spec.num_processes:
            if not socket.poll(POLL_MS):
                codes = [child.poll() for child in children]
                if any(codes):  # they end with 0 when they have told everything
                    raise InternalError(f"client processes ended with codes {codes}; what they said is above")
                if monotonic() - silent_since_s > timeout_s:
                    raise Unavailable(f"the client processes said nothing for {timeout_s:g} s; {num_ended} requests have ended")
                continue
            name, frame = socket.recv_multipart()
            message, silent_since_s = json.loads(frame), monotonic()
            match message["kind"]:
                case "ready":
                    waiting.add(name)
                    if len(waiting) == spec.num_processes:
                        start_s, timeout_s = monotonic() + START_DELAY_S, MAX_SILENCE_S
                        for child_name in waiting:
                            socket.send_multipart([child_name, json.dumps({"start_s": start_s}).encode()])
                case "end":
                    num_ended += 1
                    num_failed += message["failed"]
                    on_end(num_ended, num_failed, monotonic() - start_s)
                case "records":
                    sent += map(_sent_request, message["requests"])
                    num_told += 1
                case "error":
                    raise Unavailable(f"a client process cannot go on: {message['message']}", reason=message["reason"])
        return sorted(sent, key=lambda request: request.number)


def _sent_request(entry: dict[str, Any]) -> SentRequest:
    record = entry["record"] | {"gaps_s": tuple(entry["record"]["gaps_s"])}
    return SentRequest(entry["number"], RequestRecord(**record), entry["late_s"], entry["end_s"])
