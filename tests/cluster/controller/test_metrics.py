"""The controller's metrics page: made of its table and of one Status of the scheduler."""

import asyncio
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from story import Story

from quire.cluster.controller.groups import Group, GroupState
from quire.cluster.controller.metrics import ControllerMetrics
from quire.common.config import ModelConfig, ModelPlan, plan_model
from quire.common.errors import Unavailable
from quire.common.messages import Sample, Status
from quire.common.metric_names import CONTROLLER_METRICS, RANK_METRICS, SCHEDULER_METRICS
from quire.internal.v1 import discovery_pb2


class View:
    """What the page needs of a controller: two groups, and a scheduler that answers or does not."""

    def __init__(self, status: Status | None) -> None:
        self._status = status
        self._groups = [Group("g0", "m", 1, state=GroupState.READY, num_restarts=3), Group("g1", "m", 1)]
        self._plan = plan_model(ModelConfig(device="cpu"))

    async def status(self) -> Status:
        if self._status is None:
            raise Unavailable("the scheduler did not answer")
        return self._status

    def groups(self) -> list[Group]:
        return self._groups

    def group(self, group_id: str) -> Group | None:
        return next((group for group in self._groups if group.group_id == group_id), None)

    def plan(self, model: str) -> ModelPlan:
        return self._plan

    def routing_table(self) -> discovery_pb2.WatchResponse:
        raise NotImplementedError("no page asks for it")

    async def wait_for_change(self, version: int) -> None:
        raise NotImplementedError("no page asks for it")

    def file(self, sha256: str) -> Path | None:
        raise NotImplementedError("no page asks for it")

    def drain(self, group_id: str) -> None:
        raise NotImplementedError("no page asks for it")


def _status() -> Status:
    """Of a scheduler with something waiting, running and swapped, and a rank that told of itself."""
    story = Story(num_blocks=8, num_cpu_blocks=16, preemption="swap", max_rows=2)
    for name in "abc":
        story.submit(name, [ord(name), *range(7)], max_tokens=16)
    while not story.scheduler.groups["g0"].swapped:
        story.step()
    story.scheduler.take_outbox()
    story.scheduler.status(1, story.now_s, samples=(Sample("quire_scheduler_cpu_seconds_total", (), 1.5),))
    (status,) = story.scheduler.take_outbox().to_controller
    assert isinstance(status, Status)
    group = status.groups[0]
    told = tuple(
        Sample(metric.name, ("weights",) if "phase" in metric.labels else ("free",) if "state" in metric.labels else (), 2.0)
        for metric in RANK_METRICS
    )
    return Status(status.query_id, (msgspec.structs.replace(group, ranks=((0, told),)),), status.queue, status.samples)


def _page(metrics: ControllerMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = asyncio.run(metrics.page({})).body.decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_page_has_the_four_signals_that_inference_gateways_balance_by() -> None:
    status = _status()
    metrics = ControllerMetrics(View(status))
    metrics.group_is_ready("g0", num_gpu_blocks=8, num_cpu_blocks=16)
    page = _page(metrics)
    model = frozenset({"model": "m"}.items())
    assert page["quire_requests_waiting", model] == status.queue.num_waiting == 1
    assert page["quire_requests_running", model] == status.queue.num_running_requests > 0
    assert page["quire_requests_swapped", model] == 1
    group = {"model": "m", "group": "g0"}
    held = status.groups[0].gpu.held
    assert page["quire_kv_cache_usage_ratio", frozenset(group.items())] == held / 8
    shape = {"block_size": "16", "num_gpu_blocks": "8", "num_cpu_blocks": "16"}
    assert page["quire_cache_config_info", frozenset({**group, **shape}.items())] == 1


def test_every_metric_of_the_list_is_there() -> None:
    metrics = ControllerMetrics(View(_status()))
    metrics.group_starts("g0")
    metrics.group_is_ready("g0", num_gpu_blocks=8, num_cpu_blocks=16)
    text = asyncio.run(metrics.page({})).body.decode()
    listed = (*CONTROLLER_METRICS, *SCHEDULER_METRICS, *RANK_METRICS)
    # The process's own memory is told by process.py, which is not here.
    missing = [metric.name for metric in listed if f"# TYPE {metric.name} {metric.kind}\n" not in text]
    assert missing == ["quire_scheduler_resident_memory_bytes"]


def test_a_silent_scheduler_is_said_and_the_groups_states_stay() -> None:
    page = _page(ControllerMetrics(View(None)))
    assert page["quire_scheduler_up", frozenset()] == 0
    states = {dict(labels)["state"]: value for (name, labels), value in page.items()
              if name == "quire_group_state" and dict(labels)["group"] == "g0"}  # fmt: skip
    assert states == {"ready": 1, "starting": 0, "draining": 0, "stopped": 0}
    assert page["quire_group_restarts_total", frozenset({"model": "m", "group": "g0"}.items())] == 3
    assert not any(name == "quire_requests_waiting" for name, _ in page)
