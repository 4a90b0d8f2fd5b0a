"""quire.v1.ClusterService: the controller answers, the gateway passes calls on."""

import logging
from collections.abc import Awaitable
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from quire.cluster.gateway.call_gate import CallGate
from quire.cluster.gateway.grpc_errors import Context, errors_as_status
from quire.cluster.rich_status import DETAILS_KEY
from quire.common.errors import Unavailable
from quire.v1 import cluster_pb2
from quire.v1.cluster_pb2_grpc import ClusterServiceServicer, ClusterServiceStub

log = logging.getLogger("quire.gateway")

# The controller answers from memory; a caller without a deadline waits no longer than this.
MAX_TIMEOUT_S: Final = 30.0
RETRY_AFTER_S: Final = 1.0

_Response = TypeVar("_Response", bound=Message, covariant=True)


class _Method(Protocol[_Response]):
    def __call__(self, request: Any, *, timeout: float | None = None) -> Awaitable[_Response]: ...


class ClusterService(ClusterServiceServicer):
    """Each call goes to the controller with what is left of its deadline; its errors come back with their details."""

    def __init__(self, channel: grpc.aio.Channel, *, gate: CallGate) -> None:
        self._stub = ClusterServiceStub(channel)
        self._gate = gate

    async def ListGroups(self, request: cluster_pb2.ListGroupsRequest, context: Context) -> cluster_pb2.ListGroupsResponse:
        return await self._forward(self._stub.ListGroups, request, context)

    async def GetQueue(self, request: cluster_pb2.GetQueueRequest, context: Context) -> cluster_pb2.GetQueueResponse:
        return await self._forward(self._stub.GetQueue, request, context)

    async def GetBlocks(self, request: cluster_pb2.GetBlocksRequest, context: Context) -> cluster_pb2.GetBlocksResponse:
        return await self._forward(self._stub.GetBlocks, request, context)

    async def DrainGroup(self, request: cluster_pb2.DrainGroupRequest, context: Context) -> cluster_pb2.DrainGroupResponse:
        return await self._forward(self._stub.DrainGroup, request, context)

    async def ScaleModel(self, request: cluster_pb2.ScaleModelRequest, context: Context) -> cluster_pb2.ScaleModelResponse:
        return await self._forward(self._stub.ScaleModel, request, context)

    async def RestartGroups(self, request: cluster_pb2.RestartGroupsRequest, context: Context) -> cluster_pb2.RestartGroupsResponse:
        return await self._forward(self._stub.RestartGroups, request, context)

    async def _forward(self, method: _Method[_Response], request: Message, context: Context) -> _Response:
        async with errors_as_status(context):
            with self._gate.enter():
                remaining_s: float | None = context.time_remaining()
                try:
                    response = await method(request, timeout=MAX_TIMEOUT_S if remaining_s is None else min(remaining_s, MAX_TIMEOUT_S))
                except grpc.aio.AioRpcError as error:
                    details = tuple((key, value) for key, value in error.trailing_metadata() or () if key == DETAILS_KEY)
                    if not details:  # the controller gives them with each error, so gRPC itself made this one
                        raise _no_answer(error.code()) from None
                    await context.abort(error.code(), error.details() or "", details)
        return response


def _no_answer(code: grpc.StatusCode) -> Unavailable:
    """gRPC's own words stay here: they may quote what went wrong inside the controller."""
    log.warning("the controller gave no answer: %s", code.name)
    text = f"the controller cannot be reached ({code.name}); try again"
    return Unavailable(text, reason="NO_CONTROLLER", metadata={"code": code.name}, retry_after_s=RETRY_AFTER_S)
