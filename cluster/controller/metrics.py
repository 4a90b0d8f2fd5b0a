"""The controller's metrics page: what it knows of groups, and what the scheduler and, through it, the ranks count."""

import platform
from collections.abc import Mapping
from typing import Protocol

from quire.cluster.controller.groups import Group, GroupState
from quire.cluster.metric_page import Families, page_of
from quire.common import metric_names as names
from quire.common.clock import Clock, monotonic
from quire.common.config import ModelPlan
from quire.common.errors import Unavailable
from quire.common.http_pages import Page
from quire.common.messages import GroupStatus, PoolStatus, QueueStatus, Status
from quire.common.version import quire_version


class WatchedController(Protocol):
    """What is shown here."""

    def group(self, group_id: str) -> Group | None: ...
    def groups(self) -> list[Group]: ...
    def plan(self, model: str) -> ModelPlan | None: ...
    async def status(self) -> Status: ...


class ControllerMetrics:
    """Made anew for each scrape, from the controller's table and one Status of the scheduler."""

    def __init__(self, controller: WatchedController, *, clock: Clock = monotonic, num_schedulers: int = 0) -> None:
        """num_schedulers: that were started before, by a controller before this one"""
        self._controller = controller
        self._clock = clock
        self._started_s: dict[str, float] = {}  # by group, as the next two
        self._start_took_s: dict[str, float] = {}
        self._cache_shape: dict[str, tuple[int, int]] = {}  # GPU and CPU blocks
        self._num_schedulers = num_schedulers

    def scheduler_starts(self) -> None:
        """A scheduler is started, the first or one that replaces another."""
        self._num_schedulers += 1

    def group_starts(self, group_id: str) -> None:
        """Its ranks are being placed."""
        self._started_s[group_id] = self._clock()

    def group_is_ready(self, group_id: str, *, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        """All its ranks are there, for this start or, if they outlived a scheduler, for one before."""
        self._cache_shape[group_id] = num_gpu_blocks, num_cpu_blocks
        if group_id in self._started_s:
            self._start_took_s[group_id] = self._clock() - self._started_s.pop(group_id)

    async def page(self, headers: Mapping[str, str]) -> Page:
        """What Prometheus scrapes. Without an answer of the scheduler it says so and has the controller's part."""
        families = Families()
        try:
            status: Status | None = await self._controller.status()
        except Unavailable:
            status = None
        families.add(names.SCHEDULER_UP, (), float(status is not None))
        families.add(names.BUILD_INFO, (quire_version(), platform.python_version(), "controller"), 1)
        families.add(names.SCHEDULER_RESTARTS, (), max(0, self._num_schedulers - 1))
        for group in self._controller.groups():
            self._add_group(families, group)
        if status is not None:
            self._add_queue(families, status.queue)
            families.add_samples((), status.samples)
            for gauges in status.groups:
                self._add_gauges(families, gauges)
            self._add_totals(families, status)
        return page_of([families], headers)

    def _add_group(self, families: Families, group: Group) -> None:
        labels = (group.model, group.group_id)
        for state in GroupState:
            families.add(names.GROUP_STATE, (*labels, state.name.lower()), float(group.state is state))
        families.add(names.GROUP_RESTARTS, labels, group.num_restarts)
        if group.group_id in self._start_took_s:
            families.add(names.GROUP_START_TIME, labels, self._start_took_s[group.group_id])
        plan = self._controller.plan(group.model)
        if group.group_id in self._cache_shape and plan is not None:
            block_size = plan.block_size
            families.add(names.CACHE_INFO, (*labels, str(block_size), *map(str, self._cache_shape[group.group_id])), 1)

    def _add_queue(self, families: Families, queue: QueueStatus) -> None:
        waiting = dict(queue.num_waiting_by_priority)
        for priority, label in names.PRIORITY_LABELS.items():
            families.add(names.WAITING_BY_PRIORITY, (label,), waiting.get(priority, 0))
        families.add(names.QUEUE_LIMIT, (), queue.max_waiting)
        families.add(names.QUEUE_TOKENS, (), queue.num_waiting_tokens)
        families.add(names.QUEUE_TOKEN_LIMIT, (), queue.max_waiting_tokens)
        families.add(names.OLDEST_WAIT, (), queue.oldest_wait_s)

    def _add_gauges(self, families: Families, gauges: GroupStatus) -> None:
        group = self._controller.group(gauges.group_id)
        if group is None:
            return
        labels = (group.model, group.group_id)
        families.add(names.GROUP_SEQUENCES, labels, gauges.num_running_sequences)
        families.add(names.GROUP_SWAPPED, labels, gauges.num_preempted_requests)
        for name, pool in (("gpu", gauges.gpu), ("cpu", gauges.cpu)):
            _add_pool(families, (*labels, name), pool)
        families.add(names.KV_USAGE, labels, gauges.gpu.held / gauges.gpu.total if gauges.gpu.total else 0.0)
        families.add(names.WASTE, labels, gauges.waste_ratio)
        families.add_samples(labels, gauges.samples)
        families.add_distributions(labels, gauges.distributions)
        for rank, samples in gauges.ranks:
            families.add_samples((*labels, str(rank)), samples)

    def _add_totals(self, families: Families, status: Status) -> None:
        """What gateways in front of several clusters balance by. The queue is one for all models, and there is one model."""
        models = sorted({group.model for group in self._controller.groups()})
        assert len(models) == 1, f"the queue's numbers are not by model, and there are {models}"
        families.add(names.REQUESTS_RUNNING, models, status.queue.num_running_requests)
        families.add(names.REQUESTS_WAITING, models, status.queue.num_waiting)
        families.add(names.REQUESTS_SWAPPED, models, sum(gauges.num_preempted_requests for gauges in status.groups))


def _add_pool(families: Families, labels: tuple[str, ...], pool: PoolStatus) -> None:
    for state, num_blocks in (("free", pool.free), ("cached", pool.cached), ("held", pool.held)):
        families.add(names.BLOCKS, (*labels, state), num_blocks)
    families.add(names.SHARED_BLOCKS, labels, pool.shared)
