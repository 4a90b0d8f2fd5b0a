"""The answers to quire.v1.ClusterService, which gateways pass on: the controller's table with the scheduler's gauges."""

from typing import Any, Final

from quire.cluster.controller.discovery import ControllerView, group_message
from quire.cluster.controller.groups import Group
from quire.cluster.rich_status import status_of
from quire.common.errors import NotFound, QuireError
from quire.common.messages import GroupStatus, PoolStatus, Status
from quire.v1 import cluster_pb2, cluster_pb2_grpc

# Of a group id that a caller made up, this much is repeated in the error.
MAX_ECHOED_CHARS: Final = 64


class ClusterAdmin(cluster_pb2_grpc.ClusterServiceServicer):
    """quire.v1.ClusterService."""

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
                    gpu_blocks=self._pool(gauges.group_id, gauges.gpu),
                    cpu_blocks=self._pool(gauges.group_id, gauges.cpu),
                    gpu_ref_counts=gauges.gpu_ref_counts,
                    gpu_block_states=gauges.gpu_states,
                    cpu_block_states=gauges.cpu_states,
                )
                for gauges in status.groups
                if not request.HasField("group_id") or gauges.group_id == request.group_id
            ]
        )

    async def DrainGroup(self, request: cluster_pb2.DrainGroupRequest, context: Any) -> cluster_pb2.DrainGroupResponse:
        await self._find(request.group_id, context)
        gauges = {group.group_id: group for group in (await self._status(context)).groups}
        self._controller.drain(request.group_id)
        group = await self._find(request.group_id, context)
        return cluster_pb2.DrainGroupResponse(group=self._group(group, gauges.get(group.group_id)))

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
            message.gpu_blocks.CopyFrom(self._pool(group.group_id, gauges.gpu))
            message.cpu_blocks.CopyFrom(self._pool(group.group_id, gauges.cpu))
        return message

    def _pool(self, group_id: str, pool: PoolStatus) -> cluster_pb2.BlockPoolState:
        group = self._controller.group(group_id)
        assert group is not None, group_id
        return cluster_pb2.BlockPoolState(
            total=pool.total,
            free=pool.free,
            cached=pool.cached,
            held=pool.held,
            shared=pool.shared,
            block_size=self._controller.plan(group.model).block_size,
            block_bytes=group.block_bytes,
        )
