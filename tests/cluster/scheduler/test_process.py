"""The scheduler as a process of its own, over real sockets, with ranks in simulation and a gateway written by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from fake_ranks import FakeRank, expected_completion, hello

from quire.cluster.scheduler.process import CONTROLLER_IDENTITY
from quire.common.child_process import start_child, stop_child
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    Finished,
    GroupReady,
    Hello,
    SamplingState,
    SequenceStart,
    Status,
    StatusRequest,
    StepPlan,
    Submit,
    Tokens,
    Welcome,
    decode_control_up,
    decode_rank_down,
    decode_session_up,
    encode,
)

RECEIVE_TIMEOUT_MS = 20_000


class Wires:
    """The three links of a running scheduler process."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.addresses = {name: f"ipc://{folder}/{name}" for name in ("session", "steps", "control")}
        self.gateway = self._dealer("session", b"gateway")
        self.rank = self._dealer("steps", b"g0/0")
        self.controller = self._dealer("control", CONTROLLER_IDENTITY)

    def _dealer(self, link: str, identity: bytes) -> "zmq.Socket[bytes]":
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
        socket.connect(self.addresses[link])
        return socket


@pytest.fixture
def wires(tmp_path: Path) -> Iterator[Wires]:
    wires = Wires(tmp_path)
    process = {f"{name}_address": address for name, address in wires.addresses.items()}
    child = start_child("quire.cluster.scheduler.process", {"process": process, "scheduler": {"scheduler_id": "s1", "heartbeat_s": 0.2}})
    yield wires
    wires.context.destroy(linger=0)
    assert stop_child(child) == 0


def test_a_request_goes_through_real_sockets_and_an_idle_group_hears_a_heartbeat(wires: Wires) -> None:
    wires.controller.send(encode(AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 1, 4, 64, 4, 16)))
    wires.controller.send(encode(StatusRequest(7)))  # answered behind the attachment, so the rank is known from here on
    assert isinstance(decode_control_up(wires.controller.recv()), Status)
    wires.rank.send(encode(hello()))
    assert isinstance(decode_control_up(wires.controller.recv()), GroupReady)
    wires.gateway.send(encode(Hello(PROTOCOL_VERSION, "gateway")))
    welcome = decode_session_up(wires.gateway.recv())
    assert isinstance(welcome, Welcome)
    assert (welcome.scheduler_id, welcome.models[0].block_size, welcome.models[0].max_request_tokens) == ("s1", 4, 64)

    root = cache_root(model="m", adapter="", tenant_scope="local", cache_salt="")
    hashes = tuple(hash_full_blocks(root, range(6), block_size=4))
    wires.gateway.send(b"\xc1 not msgpack")  # one bad message changes nothing
    wires.gateway.send(
        encode(Submit("r", 0, "local", 2, "m", "", tuple(range(6)), hashes, root, (SequenceStart(0),), 1, SamplingState(), 5, 60.0, 0.0))
    )
    assert isinstance(decode_session_up(wires.gateway.recv()), Accepted)
    ranks = FakeRank(block_size=4, num_blocks=16)
    row_is_gone, heartbeats = False, 0
    while heartbeats < 2:
        plan = decode_rank_down(wires.rank.recv())
        heartbeats += row_is_gone and plan == StepPlan(plan.term, plan.step_id)
        row_is_gone |= bool(plan.remove_rows)
        result, ack = ranks.execute(plan)
        wires.rank.send(encode(result))
        wires.rank.send(encode(ack))
    received: list[int] = []
    while not isinstance(message := decode_session_up(wires.gateway.recv()), Finished):
        assert isinstance(message, Tokens)
        received += message.token_ids
    assert received == expected_completion(range(6), SamplingState(), max_tokens=5)
    assert message.usage.num_completion_tokens == 5
