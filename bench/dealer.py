"""The sockets by which a benchmark stands in for a neighbour of the scheduler."""

from typing import Any

import zmq


def connect_dealer(context: "zmq.Context[zmq.Socket[bytes]]", address: str, identity: bytes) -> "zmq.Socket[bytes]":
    """A socket of the kind that gateways, ranks and the controller have. What is unsent when it closes is forgotten."""
    socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    return socket
