"""What the status page shows: groups, queue and the blocks' states, asked of the controller and kept for a moment."""

import asyncio
import base64
import json
import time
from typing import Any, Final

import grpc

from quire.common.clock import Clock, monotonic
from quire.common.version import quire_version
from quire.v1 import cluster_pb2
from quire.v1.cluster_pb2_grpc import ClusterServiceStub

# However many look, the scheduler is asked no more often than this.
KEEP_S: Final = 0.5
# How long the controller may take.
TIMEOUT_S: Final = 5.0


class StatusView:
    """The latest view, as JSON."""

    def __init__(self, channel: grpc.aio.Channel, *, clock: Clock = monotonic) -> None:
        self._stub = ClusterServiceStub(channel)
        self._clock = clock
        self._lock = asyncio.Lock()
        self._made_s = float("-inf")
        self._json = b""

    async def json(self) -> bytes:
        """At most KEEP_S old.

        Raises:
            AioRpcError: the controller, or the scheduler behind it, does not answer.
        """
        async with self._lock:
            if self._clock() - self._made_s >= KEEP_S:
                self._json = json.dumps(await self._ask()).encode()
                self._made_s = self._clock()
            return self._json

    async def _ask(self) -> dict[str, Any]:
        groups, queue, blocks = await asyncio.gather(
            self._stub.ListGroups(cluster_pb2.ListGroupsRequest(), timeout=TIMEOUT_S),
            self._stub.GetQueue(cluster_pb2.GetQueueRequest(), timeout=TIMEOUT_S),
            self._stub.GetBlocks(cluster_pb2.GetBlocksRequest(), timeout=TIMEOUT_S),
        )
        blocks_of = {each.group_id: each for each in blocks.groups}
        return {
            "time_s": time.time(),
            "version": quire_version(),
            "models": sorted({group.model for group in groups.groups}),
            "queue": {
                "waiting": queue.waiting_request_count,
                "max_waiting": queue.max_waiting_request_count,
                "oldest_wait_s": queue.oldest_wait.ToTimedelta().total_seconds(),
                "running": queue.running_request_count,
            },
            "groups": [_group(group, blocks_of.get(group.group_id)) for group in groups.groups],
        }


def _group(group: cluster_pb2.Group, blocks: cluster_pb2.GroupBlocks | None) -> dict[str, Any]:
    return {
        "group_id": group.group_id,
        "model": group.model,
        "state": cluster_pb2.GroupState.Name(group.state).removeprefix("GROUP_STATE_"),
        "detail": group.detail,
        "term": group.term,
        "restarts": group.restart_count,
        "running": group.running_sequence_count,
        "swapped": group.preempted_request_count,
        "steps": group.step_count,
        "gpu": _pool(blocks.gpu_blocks, blocks.gpu_block_states) if blocks else None,
        "cpu": _pool(blocks.cpu_blocks, blocks.cpu_block_states) if blocks else None,
    }


def _pool(pool: cluster_pb2.BlockPoolState, states: bytes) -> dict[str, Any]:
    return {
        "total": pool.total,
        "free": pool.free,
        "cached": pool.cached,
        "held": pool.held,
        "shared": pool.shared,
        "block_size": pool.block_size,
        "states": base64.b64encode(states).decode(),
    }
