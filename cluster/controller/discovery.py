"""The controller's gRPC face: discovery for gateways, and the answers to quire.v1.ClusterService that gateways pass on."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import grpc

from quire.cluster.controller.groups import Group, GroupState
from quire.common.config import ModelPlan
from quire.common.errors import NotFound, QuireError
from quire.common.messages import GroupStatus, PoolStatus, Status
from quire.common.model_folder import TOKENIZER_FILES
from quire.internal.v1 import discovery_pb2, discovery_pb2_grpc
from quire.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2

# Well below gRPC's 4 MiB bound on a message.
FILE_CHUNK_BYTES: Final = 1 << 20

_STATES: Final = {
    GroupState.STARTING: cluster_pb2.GROUP_STATE_STARTING,
    GroupState.READY: cluster_pb2.GROUP_STATE_READY,
    GroupState.DRAINING: cluster_pb2.GROUP_STATE_DRAINING,
    GroupState.STOPPED: cluster_pb2.GROUP_STATE_STOPPED,
}
# What requests that set nothing take from a model's generation_config.json.
_SAMPLING_DEFAULTS: Final[Mapping[str, type]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
}


class ControllerView(Protocol):
    """What the services here need of the controller."""

    def routing_table(self) -> discovery_pb2.WatchResponse: ...
    async def wait_for_change(self, version: int) -> None: ...
    def file(self, sha256: str) -> Path | None: ...
    def group(self, group_id: str) -> Group | None: ...
    def groups(self) -> list[Group]: ...
    def plan(self, model: str) -> ModelPlan: ...
    async def status(self) -> Status: ...
    def drain(self, group_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A file that gateways fetch."""

    name: str
    path: Path
    sha256: str
    size_bytes: int


def tokenizer_files(plan: ModelPlan) -> list[TokenizerFile]:
    """The files of a model's folder that a gateway needs; those that are there."""
    files = []
    for name in TOKENIZER_FILES:
        path = plan.folder.path / name
        if path.is_file():
            contents = path.read_bytes()
            files.append(TokenizerFile(name, path, hashlib.sha256(contents).hexdigest(), len(contents)))
    return files


def served_model(plan: ModelPlan, files: list[TokenizerFile], *, max_request_tokens: int) -> discovery_pb2.ServedModel:
    """A model as gateways are told of it. max_request_tokens is 0 while no group is ready."""
    folder = plan.folder
    sampling = inference_pb2.SamplingParams()
    for name, kind in _SAMPLING_DEFAULTS.items():
        if folder.generation.get(name) is not None:
            setattr(sampling, name, kind(folder.generation[name]))
    if folder.generation.get("do_sample") is False:
        sampling.temperature = 0.0
    has_template = any(file.name == "chat_template.jinja" for file in files) or any(
        file.name == "tokenizer_config.json" and '"chat_template"' in file.path.read_text() for file in files
    )
    return discovery_pb2.ServedModel(
        model=inference_pb2.Model(
            name=plan.name,
            default=True,
            model_type=folder.model_type,
            max_model_len=plan.max_model_len,
            vocab_size=folder.vocab_size,
            chat=has_template,
            default_sampling=sampling,
            eos_token_ids=folder.eos_token_ids,
            block_size=plan.block_size,
        ),
        files=[discovery_pb2.ModelFile(name=file.name, sha256=file.sha256, size_bytes=file.size_bytes) for file in files],
        logits_size=folder.vocab_size,
        max_request_tokens=max_request_tokens,
    )


def group_message(group: Group) -> cluster_pb2.Group:
    """A group without the gauges that only the scheduler knows."""
    return cluster_pb2.Group(
        group_id=group.group_id,
        model=group.model,
        state=_STATES[group.state],
        term=group.term,
        tensor_parallel_size=group.tensor_parallel_size,
        restart_count=group.num_restarts,
        detail=group.detail,
        ranks=[cluster_pb2.Rank(rank=r.rank, device=r.device, pid=r.pid, host=r.host) for r in group.ranks],
    )


class Discovery(discovery_pb2_grpc.DiscoveryServiceServicer):
    """quire.internal.v1.DiscoveryService."""

    def __init__(self, controller: ControllerView) -> None:
        self._controller = controller

    async def Watch(self, request: discovery_pb2.WatchRequest, context: Any) -> AsyncIterator[discovery_pb2.WatchResponse]:
        while True:
            table = self._controller.routing_table()
            yield table
            await self._controller.wait_for_change(table.version)

    async def FetchFile(self, request: discovery_pb2.FetchFileRequest, context: Any) -> AsyncIterator[discovery_pb2.FetchFileResponse]:
        path = self._controller.file(request.sha256)
        if path is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no model has a file with this hash")
            return
        with path.open("rb") as file:
            while chunk := file.read(FILE_CHUNK_BYTES):
                yield discovery_pb2.FetchFileResponse(chunk=chunk)


class ClusterAdmin(cluster_pb2_grpc.ClusterServiceServicer):
    """quire.v1.ClusterService, from the controller's table and the scheduler's gauges."""

    def __init__(self, controller: ControllerView) -> None:
        self._controller = controller

    async def ListGroups(self, request: cluster_pb2.ListGroupsRequest, context: Any) -> cluster_pb2.ListGroupsResponse:
        gauges = {group.group_id: group for group in (await self._status(context)).groups}
        return cluster_pb2.ListGroupsResponse(
            groups=[self._group(group, gauges.get(group.group_id)) for group in self._controller.groups()]
        )

    async def GetQueue(self, request: cluster_pb2.GetQueueRequest, context: Any) -> cluster_pb2.GetQueueResponse:
        queue = (await self._status(context)).queue
        response = cluster_pb2.GetQueueResponse(
            waiting_request_count=queue.num_waiting,
            waiting_token_count=queue.num_waiting_tokens,
            max_waiting_request_count=queue.max_waiting,
            max_waiting_token_count=queue.max_waiting_tokens,
            running_request_count=queue.num_running,
        )
        response.oldest_wait.FromNanoseconds(int(queue.oldest_wait_s * 1e9))
        return response

    async def GetBlocks(self, request: cluster_pb2.GetBlocksRequest, context: Any) -> cluster_pb2.GetBlocksResponse:
        if request.HasField("group_id") and self._controller.group(request.group_id) is None:
            await self._not_found(request.group_id, context)
        status = await self._status(context)
        return cluster_pb2.GetBlocksResponse(
            groups=[
                cluster_pb2.GroupBlocks(
                    group_id=gauges.group_id,
                    gpu_blocks=self._pool(gauges.group_id, gauges.gpu),
                    cpu_blocks=self._pool(gauges.group_id, gauges.cpu),
                    gpu_ref_counts=gauges.gpu_ref_counts,
                )
                for gauges in status.groups
                if not request.HasField("group_id") or gauges.group_id == request.group_id
            ]
        )

    async def DrainGroup(self, request: cluster_pb2.DrainGroupRequest, context: Any) -> cluster_pb2.DrainGroupResponse:
        if self._controller.group(request.group_id) is None:
            await self._not_found(request.group_id, context)
        self._controller.drain(request.group_id)
        group = self._controller.group(request.group_id)
        assert group is not None
        return cluster_pb2.DrainGroupResponse(group=group_message(group))

    async def _status(self, context: Any) -> Status:
        try:
            return await self._controller.status()
        except QuireError as error:
            await context.abort(_GRPC_CODES[int(error.code)], error.message)
            raise

    async def _not_found(self, group_id: str, context: Any) -> None:
        known = ", ".join(group.group_id for group in self._controller.groups())
        await context.abort(_GRPC_CODES[int(NotFound.code)], f"there is no group {group_id}; there are: {known}")

    def _group(self, group: Group, gauges: GroupStatus | None) -> cluster_pb2.Group:
        message = group_message(group)
        if gauges is not None and gauges.term == group.term:
            message.running_sequence_count = gauges.num_running
            message.preempted_request_count = gauges.num_preempted
            message.step_count = gauges.step_count
            message.gpu_blocks.CopyFrom(self._pool(group.group_id, gauges.gpu))
            message.cpu_blocks.CopyFrom(self._pool(group.group_id, gauges.cpu))
        return message

    def _pool(self, group_id: str, pool: PoolStatus) -> cluster_pb2.BlockPoolState:
        group = self._controller.group(group_id)
        assert group is not None
        return cluster_pb2.BlockPoolState(
            total=pool.total,
            free=pool.free,
            cached=pool.cached,
            held=pool.held,
            shared=pool.shared,
            block_size=self._controller.plan(group.model).block_size,
            block_bytes=group.block_bytes,
        )


_GRPC_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
