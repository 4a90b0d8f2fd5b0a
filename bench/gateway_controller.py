"""What a gateway needs of a controller, for benchmarks: the real discovery service, with one model and one group that never change."""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc

from quire.cluster.controller.discovery import Discovery, group_message, served_model, tokenizer_files
from quire.cluster.controller.groups import Group, GroupState
from quire.common.config import ModelPlan
from quire.internal.v1 import discovery_pb2
from quire.internal.v1.discovery_pb2_grpc import add_DiscoveryServiceServicer_to_server

GROUP_ID: Final = "bench/0"


class StillController:
    """Serves discovery on a Unix socket, for the time of an `async with`."""

    def __init__(self, plan: ModelPlan, *, scheduler_address: str, address: str, max_request_tokens: int) -> None:
        """address: "unix:PATH" """
        self._files = tokenizer_files(plan)
        self._address = address
        self._table = discovery_pb2.WatchResponse(
            version=1,
            scheduler_address=scheduler_address,
            models=[served_model(plan, self._files, max_request_tokens=max_request_tokens)],
            groups=[group_message(Group(GROUP_ID, plan.name, 1, GroupState.READY))],
        )

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        add_DiscoveryServiceServicer_to_server(Discovery(self), self._server)
        self._server.add_insecure_port(self._address)
        await self._server.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._server.stop(None)

    # -- ControllerView -----------------------------------------------------------------------------------------------

    def routing_table(self) -> discovery_pb2.WatchResponse:
        return self._table

    async def wait_for_change(self, version: int) -> None:
        await asyncio.Event().wait()  # there is none

    def file(self, sha256: str) -> Path | None:
        return next((file.path for file in self._files if file.sha256 == sha256), None)
