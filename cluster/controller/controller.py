"""The controller: a Ray actor that places the scheduler and the worker groups, watches them, and tells gateways of them."""

import asyncio
import contextlib
import json
import logging
import sys
import uuid
from collections.abc import Awaitable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import grpc
import ray
import zmq
import zmq.asyncio
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire.cluster.controller.cluster_admin import ClusterAdmin
from quire.cluster.controller.discovery import Discovery, TokenizerFile, group_message, served_model, tokenizer_files
from quire.cluster.controller.groups import (
    MAX_RESTARTS_IN_A_ROW,
    STEADY_S,
    Action,
    DrainAtScheduler,
    Group,
    GroupState,
    GroupTable,
    RankInfo,
    Reattach,
    RestartRanks,
    StopRanks,
    restart_pause_s,
)
from quire.cluster.controller.metrics import ControllerMetrics
from quire.cluster.controller.process_actor import ProcessActor
from quire.cluster.scheduler.process import CONTROLLER_IDENTITY, ProcessConfig
from quire.cluster.scheduler.scheduler import SchedulerConfig
from quire.common.clock import monotonic
from quire.common.config import DEFAULT_METRICS_LISTEN, ModelPlan, ServeConfig
from quire.common.errors import Unavailable
from quire.common.http_pages import HttpPages
from quire.common.messages import (
    PROTOCOL_VERSION,
    AttachGroup,
    DetachGroup,
    DrainGroup,
    GroupDrained,
    GroupLost,
    GroupReady,
    Status,
    StatusRequest,
    decode_control_up,
    encode,
)
from quire.internal.v1 import discovery_pb2, discovery_pb2_grpc
from quire.v1 import cluster_pb2_grpc
from quire.worker.rank_spec import make_rank_spec

log = logging.getLogger("quire.controller")

# A rank that hears nothing for this long exits by itself; the scheduler sends something every third of it.
RANK_LEASE_S: Final = 15.0
# A step may take this long at least before its group counts as hung, by device. A rank on a busy CPU stands still for seconds,
# and starting it anew would take more of them.
MIN_STEP_TIMEOUT_S: Final = {"cpu": 10.0, "cuda": 3.0}
# How long the scheduler may take to answer a question for gauges.
STATUS_TIMEOUT_S: Final = 5.0
# How long Ray may take to place a group whose resources are there.
PLACEMENT_TIMEOUT_S: Final = 60.0
# How long the actors may take to end their child in order before Ray kills them.
STOP_TIMEOUT_S: Final = 15.0
# Messages that may wait for the scheduler; there are a few per group and one per question.
SEND_QUEUE_MESSAGES: Final = 1000


def discovery_address(folder: Path) -> str:
    """Where the controller of a local cluster answers: a socket in its own folder, which only its user can open."""
    return f"unix:{folder}/discovery.sock"


class _Controller:
    """Runs on its actor's one event loop. What it decides is in GroupTable; here it is performed."""

    def __init__(self, config: ServeConfig, plan: ModelPlan, run_folder: str) -> None:
        logging.basicConfig(level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s controller: %(message)s")
        self._config = config
        self._plan = plan
        self._folder = Path(run_folder)
        self._table = GroupTable()
        self._files: list[TokenizerFile] = tokenizer_files(plan)
        self._changed = asyncio.Condition()
        self._over: asyncio.Future[str]
        self._scheduler: Any = None
        self._ranks: dict[str, list[Any]] = {}
        self._placements: dict[str, PlacementGroup] = {}
        self._queries: dict[int, asyncio.Future[Status]] = {}
        self._next_query_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._metrics = ControllerMetrics(self)
        self._pages = HttpPages({"/metrics": self._metrics.page})

    # -- for `quire serve` ---------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Start the scheduler, the ranks and discovery (at `discovery_address`); the address of the metrics. Does not wait for the
        groups."""
        self._over = asyncio.get_running_loop().create_future()
        self._link = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._link.setsockopt(zmq.IDENTITY, CONTROLLER_IDENTITY)
        self._link.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        self._link.setsockopt(zmq.LINGER, 0)
        self._link.connect(self._address("control"))
        self._server = grpc.aio.server()
        discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(Discovery(self), self._server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterAdmin(self), self._server)
        self._server.add_insecure_port(discovery_address(self._folder))
        await self._server.start()
        metrics_address = await self._pages.start(
            self._config.controller_metrics_listen or DEFAULT_METRICS_LISTEN["controller"],
            may_move=self._config.controller_metrics_listen is None,
        )
        self._spawn(self._read_scheduler())
        self._spawn(self._run_scheduler())
        for index in range(self._plan.groups):
            group = Group(f"{self._plan.name.replace('/', '-')}-{index}", self._plan.name, self._plan.tensor_parallel_size)
            self._table.add(group)
            await self._attach(group)
            self._spawn(self._run_ranks(group))
        return metrics_address

    async def wait_ready(self) -> str:
        """Wait until every group is ready (""), or until one cannot be (why)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._over.done() or all(g.state is GroupState.READY for g in self.groups()))
        return self._over.result() if self._over.done() else ""

    async def wait_over(self) -> str:
        """Wait until nothing is left that could serve; why."""
        return await asyncio.shield(self._over)

    async def stop(self) -> None:
        """End ranks and scheduler in order. Their actors go with this Ray: when Ray itself is ending, it answers no more."""
        self._is_stopping = True
        await asyncio.gather(*(self._stop_child(actor) for actors in self._ranks.values() for actor in actors))
        if self._scheduler is not None:
            await self._stop_child(self._scheduler)
        for task in self._tasks:
            task.cancel()
        await self._pages.stop()
        await self._server.stop(grace=None)

    # -- for discovery (ControllerView) --------------------------------------------------------------------------------

    def routing_table(self) -> discovery_pb2.WatchResponse:
        ready = [group.max_request_tokens for group in self.groups() if group.state is GroupState.READY]
        return discovery_pb2.WatchResponse(
            version=self._table.version,
            scheduler_address=self._address("session"),
            models=[served_model(self._plan, self._files, max_request_tokens=max(ready, default=0))],
            groups=[group_message(group) for group in self.groups()],
        )

    async def wait_for_change(self, version: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._table.version != version)

    def file(self, sha256: str) -> Path | None:
        return next((file.path for file in self._files if file.sha256 == sha256), None)

    def group(self, group_id: str) -> Group | None:
        return self._table.groups.get(group_id)

    def groups(self) -> list[Group]:
        return [self._table.groups[group_id] for group_id in sorted(self._table.groups)]

    def plan(self, model: str) -> ModelPlan:
        assert model == self._plan.name, model
        return self._plan

    async def status(self, *, has_blocks: bool = False) -> Status:
        """The scheduler's gauges; has_blocks: also what is told block by block.

        Raises:
            Unavailable: the scheduler does not answer.
        """
        query_id = self._next_query_id
        self._next_query_id += 1
        self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                await self._link.send(encode(StatusRequest(query_id, has_blocks)))
                return await self._queries[query_id]
        except TimeoutError:
            text = f"the scheduler did not answer within {STATUS_TIMEOUT_S:g} s; try again"
            raise Unavailable(text, reason="SCHEDULER_SILENT", retry_after_s=1.0) from None
        finally:
            del self._queries[query_id]

    def drain(self, group_id: str) -> None:
        self._perform(self._table.on_drain_asked(group_id))

    # -- the scheduler -------------------------------------------------------------------------------------------------

    async def _run_scheduler(self) -> None:
        """Keep a scheduler alive. One that dies takes its plans with it: ranks wait for the next, gateways submit to it again."""
        num_failures = num_deaths = 0
        while True:
            started_s = monotonic()
            code = await self._run_one_scheduler(num_deaths)
            num_deaths += 1
            num_failures = 1 if monotonic() - started_s >= STEADY_S else num_failures + 1
            if self._is_stopping or num_failures > MAX_RESTARTS_IN_A_ROW:
                self._finish(f"the scheduler ended with code {code}")
                return
            log.warning("the scheduler ended with code %d; the next one follows in %g s", code, restart_pause_s(num_failures))
            await asyncio.sleep(restart_pause_s(num_failures))
            self._perform(self._table.on_scheduler_lost())

    async def _run_one_scheduler(self, num_before: int) -> int:
        """Start a scheduler, and wait for its end; its exit code. num_before: how many there were before it."""
        process = ProcessConfig(
            session_address=self._address("session"),
            steps_address=self._address("steps"),
            control_address=self._address("control"),
            log_level=self._config.log_level,
        )
        scheduler = SchedulerConfig(
            scheduler_id=uuid.uuid4().hex,
            max_waiting_requests=self._config.max_waiting_requests,
            max_waiting_tokens=self._config.max_waiting_tokens,
            heartbeat_s=RANK_LEASE_S / 3,
            min_step_timeout_s=MIN_STEP_TIMEOUT_S[self._plan.device],
        )
        self._metrics.scheduler_starts()
        former, self._scheduler = self._scheduler, ProcessActor.options(name=f"quire-scheduler-{scheduler.scheduler_id}").remote()
        if former is not None:
            await asyncio.to_thread(_forget, [former], None)
        journal = self._config.scheduler_journal
        if journal and num_before:
            journal = f"{journal}.{num_before}"  # a journal is one scheduler's life
        spec = {"process": asdict(process), "scheduler": asdict(scheduler), "journal": journal}
        await self._scheduler.start.remote("quire.cluster.scheduler.process", spec, str(self._log("scheduler")))
        code: int = await self._scheduler.wait.remote()
        return code

    async def _read_scheduler(self) -> None:
        while True:
            message = decode_control_up(await self._link.recv())
            match message:
                case GroupReady():
                    self._metrics.group_is_ready(
                        message.group_id, num_gpu_blocks=message.num_gpu_blocks, num_cpu_blocks=message.num_cpu_blocks
                    )
                    ranks = tuple(RankInfo(rank, device, host, pid) for rank, device, host, pid in message.ranks)
                    actions = self._table.on_ready(
                        message.group_id,
                        message.term,
                        ranks=ranks,
                        max_request_tokens=message.max_request_tokens,
                        block_bytes=message.block_bytes,
                        now_s=monotonic(),
                        detail=f"each rank holds {whole}" if (whole := self._plan.whole_on_each_rank) else "",
                    )
                    self._perform(actions)
                case GroupLost():
                    self._perform(self._table.on_lost(message.group_id, message.term, message.reason, now_s=monotonic()))
                case GroupDrained():
                    self._perform(self._table.on_drained(message.group_id, message.term))
                case Status():
                    query = self._queries.get(message.query_id)
                    if query is not None and not query.done():
                        query.set_result(message)

    async def _attach(self, group: Group, *, oldest_term: int = 0) -> None:
        plan = self._plan
        await self._link.send(
            encode(
                AttachGroup(
                    version=PROTOCOL_VERSION,
                    group_id=group.group_id,
                    term=group.term,
                    model=plan.name,
                    tensor_parallel_size=plan.tensor_parallel_size,
                    block_size=plan.block_size,
                    max_model_len=plan.max_model_len,
                    max_sequences=plan.max_sequences,
                    max_batched_tokens=plan.max_batched_tokens,
                    preemption=plan.preemption,
                    oldest_term=oldest_term,
                )
            )
        )

    # -- ranks ---------------------------------------------------------------------------------------------------------

    async def _run_ranks(self, group: Group) -> None:
        """Place the group's ranks together, start them, and report the first that ends."""
        self._metrics.group_starts(group.group_id)
        # Ray hides GPUs from whoever asked for none.
        num_gpus = 1 if self._plan.device == "cuda" else 0
        bundles = [{"CPU": 1.0, "GPU": 1.0} if num_gpus else {"CPU": 1.0}] * group.tensor_parallel_size
        placement = placement_group(bundles, strategy="STRICT_PACK", name=f"{group.group_id}-{group.term}")
        self._placements[group.group_id] = placement
        try:
            await asyncio.wait_for(placement.ready(), PLACEMENT_TIMEOUT_S)
        except TimeoutError:
            asked = f"{group.tensor_parallel_size} ranks of 1 CPU each on one host"
            why = f"Ray found no place for {asked} within {PLACEMENT_TIMEOUT_S:g} s; it has {ray.cluster_resources().get('CPU', 0):g} CPUs"
            self._perform(self._table.on_lost(group.group_id, group.term, why, now_s=monotonic()))
            return
        actors = []
        for rank in range(group.tensor_parallel_size):
            strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank)
            name = f"quire-{group.group_id}-{rank}-{group.term}"
            actors.append(ProcessActor.options(name=name, num_gpus=num_gpus, scheduling_strategy=strategy).remote())
        self._ranks[group.group_id] = actors
        await asyncio.gather(
            *(
                actor.start.remote("quire.worker.rank_process", self._rank_spec(group, rank), str(self._log(f"{group.group_id}-{rank}")))
                for rank, actor in enumerate(actors)
            )
        )
        ends = [asyncio.ensure_future(self._wait_rank(group, rank, actor)) for rank, actor in enumerate(actors)]
        done, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in pending:
            end.cancel()
        if self._ranks.get(group.group_id) is actors:  # under whatever term they are by now
            current = self._table.groups[group.group_id]
            self._perform(self._table.on_lost(group.group_id, current.term, next(iter(done)).result(), now_s=monotonic()))

    async def _restart_ranks(self, group_id: str, *, pause_s: float) -> None:
        """Start a group's ranks anew, all together, once the former ones are gone for good."""
        await self._stop_ranks(group_id, is_lost=True)
        await asyncio.sleep(pause_s)
        group = self._table.groups[group_id]
        if self._is_stopping or group.state is not GroupState.STARTING:
            return  # an operator asked to drain it meanwhile
        await self._attach(group)
        await self._run_ranks(group)

    async def _wait_rank(self, group: Group, rank: int, actor: Any) -> str:
        """Wait for a rank's end; what is known of its cause."""
        try:
            code = await actor.wait.remote()
        except ray.exceptions.RayActorError:
            return f"rank {rank}'s actor died"
        with contextlib.suppress(OSError, ValueError, KeyError):
            return f"rank {rank}: {json.loads(self._report(group, rank).read_text())['error']}"
        return f"rank {rank} ended with code {code}"

    def _rank_spec(self, group: Group, rank: int) -> dict[str, Any]:
        return asdict(
            make_rank_spec(
                self._plan,
                group_id=group.group_id,
                term=group.term,
                rank=rank,
                scheduler_address=self._address("steps"),
                rank_lease_s=RANK_LEASE_S,
                log_level=self._config.log_level,
                folder=self._folder,
            )
        )

    async def _stop_ranks(self, group_id: str, *, is_lost: bool) -> None:
        actors = self._ranks.pop(group_id, [])
        await asyncio.gather(*(self._stop_child(actor, is_lost=is_lost) for actor in actors))
        placement = self._placements.pop(group_id, None)
        if not self._is_stopping:
            await asyncio.to_thread(_forget, actors, placement)

    @staticmethod
    async def _stop_child(actor: Any, *, is_lost: bool = False) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
            await asyncio.wait_for(actor.kill.remote() if is_lost else actor.stop.remote(), STOP_TIMEOUT_S)

    # -- what follows --------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StopRanks(group_id, term, is_lost):
                    detail = self._table.groups[group_id].detail
                    log.info("group %s stops: %s", group_id, detail)
                    self._spawn(self._link.send(encode(DetachGroup(group_id, term, detail))))
                    self._spawn(self._stop_ranks(group_id, is_lost=is_lost))
                case RestartRanks(group_id, lost_term, pause_s):
                    group = self._table.groups[group_id]
                    log.warning("group %s is %s; term %d follows in %g s", group_id, group.detail, group.term, pause_s)
                    self._spawn(self._link.send(encode(DetachGroup(group_id, lost_term, group.detail))))
                    self._spawn(self._restart_ranks(group_id, pause_s=pause_s))
                case Reattach(group_id, oldest_term):
                    self._spawn(self._attach(self._table.groups[group_id], oldest_term=oldest_term))
                case DrainAtScheduler(group_id):
                    self._spawn(self._link.send(encode(DrainGroup(group_id, self._table.groups[group_id].term))))
        groups = self.groups()
        if all(group.state is GroupState.STOPPED for group in groups) and any(group.has_failed for group in groups):
            self._finish("; ".join(f"group {group.group_id}: {group.detail}" for group in groups))
        self._spawn(self._notify())

    def _finish(self, reason: str) -> None:
        if not self._over.done() and not self._is_stopping:
            self._over.set_result(reason)
            self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: Coroutine[Any, Any, Any] | Awaitable[Any]) -> None:
        """Run beside everything else; an unexpected error ends the cluster rather than leaving it half alive."""
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except Exception as error:
            log.exception("the controller cannot go on")
            self._finish(f"the controller failed: {error}")

    # -- names ---------------------------------------------------------------------------------------------------------

    def _address(self, link: str) -> str:
        return f"ipc://{self._folder}/{link}.sock"

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    def _report(self, group: Group, rank: int) -> Path:
        return Path(self._rank_spec(group, rank)["report_path"])


def _forget(actors: list[Any], placement: PlacementGroup | None) -> None:
    """Give a group's actors and place back to Ray. Blocks for as long as Ray's store does not answer."""
    for actor in actors:
        ray.kill(actor)
    if placement is not None:
        ray.util.remove_placement_group(placement)


# Restarts of the controller itself come with fault tolerance of Ray's own store; until then its end is the cluster's end.
Controller: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_Controller)
