"""The answers to quire.v1.ClusterService, which gateways pass on: the controller's table with the scheduler's gauges."""

from typing import Any, Final, Protocol

from quire.cluster.controller.discovery import group_message
from quire.cluster.controller.groups import Group, GroupState
from quire.cluster.rich_status import status_of
from quire.common.config import ModelPlan
from quire.common.errors import ConfigError, InvalidRequest, NotFound, QuireError
from quire.common.messages import GroupStatus, PoolStatus, Status
from quire.v1 import cluster_pb2, cluster_pb2_grpc

# Of a group id that a caller made up, this much is repeated in the error.
MAX_ECHOED_CHARS: Final = 64
# Above this a number of groups is a slip of the finger.
MAX_GROUPS: Final = 4096


class SteeredController(Protocol):
    """What is shown and steered here."""

    def group(self, group_id: str) -> Group | None: ...
    def groups(self) -> list[Group]: ...
    def models(self) -> list[str]: ...
    def plan(self, model: str) -> ModelPlan | None: ...
    async def status(self, *, has_blocks: bool = False) -> Status: ...
    def drain(self, group_id: str) -> None: ...
    def restart(self, group_ids: list[str]) -> None: ...
    async def scale(self, plan: ModelPlan, num_groups: int) -> None: ...


class ClusterAdmin(cluster_pb2_grpc.ClusterServiceServicer):
    """quire.v1.ClusterService."""

    def __init__(self, controller: SteeredController) -> None:
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
            running_request_count=queue.num_running_requests,
            priorities=[
                cluster_pb2.PriorityQueue(priority=priority, waiting_request_count=count)  # type: ignore[arg-type]  # the enum's own numbers
                for priority, count in queue.num_waiting_by_priority
            ],
        )
        response.oldest_wait.FromNanoseconds(int(queue.oldest_wait_s * 1e9))
        return response

    async def GetBlocks(self, request: cluster_pb2.GetBlocksRequest, context: Any) -> cluster_pb2.GetBlocksResponse:
        if request.HasField("group_id"):
            await self._find(request.group_id, context)
        status = await self._status(context, has_blocks=True)
        return cluster_pb2.GetBlocksResponse(
            groups=[
                cluster_pb2.GroupBlocks(
                    group_id=gauges.group_id,
                    gpu_blocks=self._pool(group, gauges.gpu),
                    cpu_blocks=self._pool(group, gauges.cpu),
                    gpu_ref_counts=gauges.gpu_ref_counts,
                    gpu_block_states=gauges.gpu_states,
                    cpu_block_states=gauges.cpu_states,
                )
                for gauges in status.groups
                if (group := self._controller.group(gauges.group_id)) is not None  # removed while we waited
                if not request.HasField("group_id") or gauges.group_id == request.group_id
            ]
        )

    async def DrainGroup(self, request: cluster_pb2.DrainGroupRequest, context: Any) -> cluster_pb2.DrainGroupResponse:
        await self._find(request.group_id, context)
        gauges = {group.group_id: group for group in (await self._status(context)).groups}
        self._controller.drain(request.group_id)
        group = await self._find(request.group_id, context)
        return cluster_pb2.DrainGroupResponse(group=self._group(group, gauges.get(group.group_id)))

    async def ScaleModel(self, request: cluster_pb2.ScaleModelRequest, context: Any) -> cluster_pb2.ScaleModelResponse:
        plan = self._controller.plan(request.model)
        try:
            if plan is None:
                raise _no_model(request.model, self._controller.models())
            if request.group_count > MAX_GROUPS:
                text = f"{request.group_count} groups were asked for; a model can have {MAX_GROUPS}"
                raise InvalidRequest(text, reason="TOO_MANY_GROUPS", field="group_count")
            await self._controller.scale(plan, request.group_count)
        except QuireError as error:
            await context.abort(*status_of(error))
        groups = [group_message(group) for group in self._controller.groups() if group.model == request.model]
        return cluster_pb2.ScaleModelResponse(groups=groups)

    async def RestartGroups(self, request: cluster_pb2.RestartGroupsRequest, context: Any) -> cluster_pb2.RestartGroupsResponse:
        if request.WhichOneof("target") == "group_id":
            chosen = [await self._find(request.group_id, context)]
        else:
            if self._controller.plan(request.model) is None:
                await context.abort(*status_of(_no_model(request.model, self._controller.models())))
            chosen = [
                group for group in self._controller.groups() if group.model == request.model and group.state is not GroupState.STOPPED
            ]
        if all(group.state is GroupState.STOPPED for group in chosen):
            what = f"group {chosen[0].group_id} is stopped" if chosen else f"model {request.model} has no groups"
            text = f"{what}, so there is nothing to restart; ask for a new one: quire scale MODEL=N"
            await context.abort(*status_of(ConfigError(text, reason="NOTHING_TO_RESTART")))
        group_ids = [group.group_id for group in chosen]
        self._controller.restart(group_ids)
        groups = [group for group_id in group_ids if (group := self._controller.group(group_id)) is not None]
        return cluster_pb2.RestartGroupsResponse(groups=[group_message(group) for group in groups])

    async def _find(self, group_id: str, context: Any) -> Group:
        group = self._controller.group(group_id)
        if group is None:
            known = ", ".join(group.group_id for group in self._controller.groups())
            message = f"there is no group {group_id[:MAX_ECHOED_CHARS]!r}; there are: {known}"
            await context.abort(*status_of(NotFound(message, reason="GROUP_NOT_FOUND", field="group_id")))
        assert group is not None, "abort raises"
        return group

    async def _status(self, context: Any, *, has_blocks: bool = False) -> Status:
        try:
            return await self._controller.status(has_blocks=has_blocks)
        except QuireError as error:
            await context.abort(*status_of(error))
            raise

    def _group(self, group: Group, gauges: GroupStatus | None) -> cluster_pb2.Group:
        message = group_message(group)
        if gauges is not None and gauges.term == group.term:
            message.running_sequence_count = gauges.num_running_sequences
            message.preempted_request_count = gauges.num_preempted_requests
            message.step_count = gauges.num_steps
            message.gpu_blocks.CopyFrom(self._pool(group, gauges.gpu))
            message.cpu_blocks.CopyFrom(self._pool(group, gauges.cpu))
        return message

    def _pool(self, group: Group, pool: PoolStatus) -> cluster_pb2.BlockPoolState:
        plan = self._controller.plan(group.model)
        assert plan is not None, group
        return cluster_pb2.BlockPoolState(
            total=pool.total,
            free=pool.free,
            cached=pool.cached,
            held=pool.held,
            shared=pool.shared,
            block_size=plan.block_size,
            block_bytes=group.block_bytes,
        )


def _no_model(name: str, known: list[str]) -> NotFound:
    message = f"there is no model {name[:MAX_ECHOED_CHARS]!r}; there are: {', '.join(known)}"
    return NotFound(message, reason="MODEL_NOT_FOUND", field="model")
