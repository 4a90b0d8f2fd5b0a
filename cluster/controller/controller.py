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

from quire.cluster.controller.cluster_admin import ClusterAdmin
from quire.cluster.controller.desired_state import DesiredState, drop_state, load_state, save_state
from quire.cluster.controller.discovery import (
    Discovery,
    TokenizerFile,
    group_message,
    served_model,
    server_credentials,
    tokenizer_files,
)
from quire.cluster.controller.early_ranks import early_folder
from quire.cluster.controller.groups import (
    MAX_RESTARTS_IN_A_ROW,
    STEADY_S,
    Action,
    AfterDrain,
    DrainAtScheduler,
    Group,
    GroupState,
    RankInfo,
    Reattach,
    RestartRanks,
    StartRanks,
    StopRanks,
    restart_pause_s,
)
from quire.cluster.controller.listen_address import free_port_pair, split_address
from quire.cluster.controller.metrics import ControllerMetrics
from quire.cluster.controller.placement import placement_refusal
from quire.cluster.controller.process_actor import STOPPED
from quire.cluster.controller.rank_actors import HEAD_RESOURCE, HEAD_SHARE, Child, RankActors, stop_child
from quire.cluster.controller.scheduler_actor import find_scheduler, start_scheduler
from quire.cluster.scheduler.process import CONTROLLER_IDENTITY, ProcessConfig
from quire.cluster.scheduler.scheduler import SchedulerConfig
from quire.common.clock import monotonic
from quire.common.cluster_tls import is_loopback
from quire.common.config import DEFAULT_METRICS_LISTEN, ModelPlan, ServeConfig
from quire.common.curve import CurveKeys, keys_for, secure_client
from quire.common.errors import ConfigError, Unavailable
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
# Ray tells what is free with a delay; no longer than this is looked again before a wish for more groups is refused.
PLACE_SETTLES_S: Final = 2.0
PLACE_POLL_S: Final = 0.25
# The scheduler's sockets.
LINKS: Final = ("session", "steps", "control")
# Those of them that other hosts connect to, in the order of their ports.
_TCP_LINKS: Final = ("session", "steps")
# Messages that may wait for the scheduler; there are a few per group and one per question.
SEND_QUEUE_MESSAGES: Final = 1000


# Under which Ray knows our actors.
NAMESPACE: Final = "quire"
CONTROLLER_NAME: Final = "quire-controller"


def discovery_address(folder: Path) -> str:
    """Where the controller of a local cluster answers: a socket in its own folder, which only its user can open."""
    return f"unix:{folder}/discovery.sock"


class _Controller:
    """Runs on its actor's one event loop. What it decides is in GroupTable; here it is performed.

    It may die at any time: Ray starts it anew, it reads again what shall be, finds what runs by name, and touches none of that.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        config: ServeConfig,
        plan: ModelPlan,
        run_folder: str,
        rank_resource: str,
        discovery_listen: str,
        scheduler_listen: str | None = None,
    ) -> None:
        """Start the scheduler, the ranks and discovery, or take over those that a controller before this one started in the same
        folder. Does not wait for the groups.

        rank_resource: of which Ray resource a rank takes one
        discovery_listen: where discovery answers, HOST:PORT or unix:PATH; port 0 takes a free one, and keeps it
        scheduler_listen: HOST:PORT at which gateways of other hosts reach the scheduler, and ranks at the next port; port 0 takes
                          free ones; None: both are on this host
        """
        logging.basicConfig(level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s controller: %(message)s")
        self._config = config
        self._plan = plan
        self._folder = Path(run_folder)
        self._keys = CurveKeys.of_folder(self._folder)
        self._files: list[TokenizerFile] = tokenizer_files(plan)
        self._changed = asyncio.Condition()
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._scheduler: Any = None
        early = early_folder(self._folder)
        self._ranks = RankActors(
            rank_resource, may_leave_head=scheduler_listen is not None, early_folder=str(early) if early.is_dir() else None
        )
        self._rank_resource = rank_resource
        self._scaling = asyncio.Lock()
        self._queries: dict[int, asyncio.Future[Status]] = {}
        self._next_query_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        former = load_state(self._folder)
        self._state = former or DesiredState()
        self._table = self._state.table
        self._scheduler_host = ""  # where it listens, if by TCP
        if scheduler_listen is not None:
            self._scheduler_host, port = split_address(scheduler_listen)
            self._state.scheduler_port = self._state.scheduler_port or port or free_port_pair(self._scheduler_host)
        self._metrics = ControllerMetrics(self, num_schedulers=self._state.num_schedulers)
        self._pages = HttpPages({"/metrics": self._metrics.page})
        self._link = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._link.setsockopt(zmq.IDENTITY, CONTROLLER_IDENTITY)
        self._link.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        self._link.setsockopt(zmq.LINGER, 0)
        if (keys := keys_for(self._address("control"), self._keys)) is not None:
            secure_client(self._link, keys)
        self._link.connect(self._address("control"))
        self._spawn(self._read_scheduler())
        if former is None:
            self._spawn(self._run_scheduler(None))
            tensor_parallel_size = plan.tensor_parallel_size
            self._perform(self._table.on_scale_asked(plan.name, plan.groups, tensor_parallel_size=tensor_parallel_size))
        else:
            await self._take_over()
        self._server = grpc.aio.server()
        discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(Discovery(self), self._server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterAdmin(self), self._server)
        self.discovery = self._bind(discovery_listen)
        await self._server.start()
        self.metrics = await self._bind_metrics()

    def _bind(self, listen: str) -> str:
        """Bind discovery; its address."""
        host, _, port = listen.rpartition(":")
        if listen.startswith("unix:"):
            self._server.add_insecure_port(listen)
            return listen
        wanted = f"{host}:{int(port) or self._state.discovery_port}"  # gateways know the port of the controller before this one
        if is_loopback(listen):
            self._state.discovery_port = self._server.add_insecure_port(wanted)
        else:
            certificates = self._keys.certificates
            if certificates is None:
                raise ConfigError("the cluster's keys have no certificates for discovery; make new ones with: quire key new")
            self._state.discovery_port = self._server.add_secure_port(wanted, server_credentials(certificates))
        save_state(self._folder, self._state)
        return f"{host}:{self._state.discovery_port}"

    async def _bind_metrics(self) -> str:
        """Serve the metrics page; its address."""
        asked = self._config.controller_metrics_listen
        listen = asked or DEFAULT_METRICS_LISTEN["controller"]
        if self._state.metrics_port:  # of the controller before this one
            listen = f"{listen.rpartition(':')[0]}:{self._state.metrics_port}"
        address = await self._pages.start(listen, may_move=asked is None)
        self._state.metrics_port = int(address.rpartition(":")[2])
        save_state(self._folder, self._state)
        return address

    # -- for `quire serve` and `quire controller` ----------------------------------------------------------------------

    async def wait_listening(self) -> tuple[str, str]:
        """The addresses of discovery and of the metrics, once they answer. What keeps them from that is raised here, by Ray."""
        return self.discovery, self.metrics

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
        await self._ranks.end_children()
        if self._scheduler is not None:
            await stop_child(self._scheduler)
        for task in self._tasks:
            task.cancel()
        await self._pages.stop()
        await self._server.stop(grace=None)

    async def leave(self) -> str:
        """End everything that was started, on a Ray that stays; the run's folder, which is left to the caller. This actor is, too."""
        self._is_stopping = True
        folder = str(self._folder)
        await asyncio.gather(*(self._ranks.end(group.group_id, is_lost=False, folder=folder) for group in self.groups()))
        await asyncio.gather(*(self._ranks.end_leftovers(group.group_id) for group in self.groups()))
        if self._scheduler is not None:
            await stop_child(self._scheduler)
            await asyncio.to_thread(ray.kill, self._scheduler)
        for task in self._tasks:
            task.cancel()
        await self._server.stop(grace=None)
        drop_state(self._folder)
        return str(self._folder)

    # -- after the death of a controller -------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Find what runs. What happened meanwhile is told by who saw it: the scheduler when groups are attached again, actors when
        they are asked to wait for their children."""
        scheduler = await find_scheduler(self._state.scheduler_id)
        for group in self.groups():
            if group.state is GroupState.STOPPED:
                if not group.is_gone:
                    self._spawn(self._finish_end(group))
            elif await self._ranks.adopt(group):
                log.info("group %s of term %d goes on with the ranks that it has", group.group_id, group.term)
                await self._attach(group, oldest_term=group.ranks_term)
                if group.state is GroupState.DRAINING:
                    await self._link.send(encode(DrainGroup(group.group_id, group.term, group.after_drain is AfterDrain.RESTART)))
                self._spawn(self._watch_ranks(group))
            elif group.state is GroupState.STARTING:
                log.info("group %s of term %d had not started yet", group.group_id, group.term)
                self._spawn(self._start_over(group))
            else:
                why = "its ranks died while the controller was away"
                await self._ranks.end_leftovers(group.group_id)
                self._perform(self._table.on_lost(group.group_id, group.term, why, now_s=monotonic()))
        self._spawn(self._run_scheduler(scheduler))
        log.info("took over the groups of the controller before this one: %s", [group.group_id for group in self.groups()])

    async def _finish_end(self, group: Group) -> None:
        await self._link.send(encode(DetachGroup(group.group_id, group.term, group.detail)))
        await self._ranks.end_leftovers(group.group_id)
        await self._end_ranks(group.group_id, is_lost=True)

    async def _start_over(self, group: Group) -> None:
        await self._ranks.end_leftovers(group.group_id)
        await self._start_ranks(group.group_id)

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
        return sorted(self._table.groups.values(), key=lambda group: (group.model, group.index))

    def models(self) -> list[str]:
        return [self._plan.name]

    def plan(self, model: str) -> ModelPlan | None:
        return self._plan if model == self._plan.name else None

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

    def restart(self, group_ids: list[str]) -> None:
        self._perform(self._table.on_restart_asked(group_ids))

    async def scale(self, plan: ModelPlan, num_groups: int) -> None:
        """
        Raises:
            ConfigError: there is no place for so many groups.
        """
        async with self._scaling:  # two at once would count the same place twice
            await self._check_place(plan, num_groups)
            self._perform(self._table.on_scale_asked(plan.name, num_groups, tensor_parallel_size=plan.tensor_parallel_size))

    async def _check_place(self, plan: ModelPlan, num_groups: int) -> None:
        """Look again for a moment before refusing: Ray tells with a delay what was given back."""
        deadline_s = monotonic() + PLACE_SETTLES_S
        while True:
            free = await asyncio.to_thread(self._ranks.free_on_nodes)
            refusal = placement_refusal(
                free,
                model=plan.name,
                resource=self._rank_resource,
                ranks_per_group=plan.tensor_parallel_size,
                num_placed=sum(group.group_id in self._ranks.placed for group in self._table.wanted(plan.name)),
                num_groups=num_groups,
                spans_hosts=await asyncio.to_thread(self._ranks.needs_several_hosts, plan.tensor_parallel_size),
            )
            if refusal is None:
                return
            if monotonic() >= deadline_s:
                raise refusal
            await asyncio.sleep(PLACE_POLL_S)

    # -- the scheduler -------------------------------------------------------------------------------------------------

    async def _run_scheduler(self, actor: Any) -> None:
        """Keep a scheduler alive. One that dies takes its plans with it: ranks wait for the next, gateways submit to it again.

        actor: of a scheduler that a controller before this one started, or None
        """
        num_failures = 0
        while True:
            started_s = monotonic()
            is_replaced = actor is None and self._state.num_schedulers > 0
            try:
                self._scheduler = actor or await self._start_scheduler()
                if is_replaced:  # not before: what the link holds for the former one, which may have been killed just now, is lost
                    self._perform(self._table.on_scheduler_lost())
                code = await self._scheduler.wait.remote()
                end = "the scheduler is stopped" if code == STOPPED else f"the scheduler ended with code {code}"
            except ray.exceptions.RayActorError:
                end = "the scheduler's actor died"
            num_failures = 1 if monotonic() - started_s >= STEADY_S else num_failures + 1
            if self._is_stopping or num_failures > MAX_RESTARTS_IN_A_ROW:
                self._finish(end)
                return
            if self._scheduler is not None:
                await stop_child(self._scheduler, is_lost=True)  # it may only be stopped
                await asyncio.to_thread(ray.kill, self._scheduler)
            actor = self._scheduler = None
            log.warning("%s; the next one follows in %g s", end, restart_pause_s(num_failures))
            await asyncio.sleep(restart_pause_s(num_failures))

    async def _start_scheduler(self) -> Any:
        """A new scheduler's actor."""
        process = ProcessConfig(
            session_address=self._address("session"),
            steps_address=self._address("steps"),
            control_address=self._address("control"),
            log_level=self._config.log_level,
            curve=self._keys.as_spec() if any(keys_for(self._address(link), self._keys) for link in LINKS) else None,
        )
        scheduler = SchedulerConfig(
            scheduler_id=uuid.uuid4().hex,
            max_waiting_requests=self._config.max_waiting_requests,
            max_waiting_tokens=self._config.max_waiting_tokens,
            heartbeat_s=RANK_LEASE_S / 3,
            min_step_timeout_s=MIN_STEP_TIMEOUT_S[self._plan.device],
            checks_ranks=self._config.checks_ranks,
        )
        self._metrics.scheduler_starts()
        journal = self._config.scheduler_journal
        if journal and self._state.num_schedulers:
            journal = f"{journal}.{self._state.num_schedulers}"  # a journal is one scheduler's life
        self._state.scheduler_id = scheduler.scheduler_id
        self._state.num_schedulers += 1
        save_state(self._folder, self._state)
        return await start_scheduler(process, scheduler, journal, log_path=self._log("scheduler"))

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

    async def _attach(self, group: Group, *, oldest_term: int) -> None:
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
        children = [
            Child(self._rank_spec(group, rank), str(self._log(f"{group.group_id}-{rank}"))) for rank in range(group.tensor_parallel_size)
        ]
        try:
            await self._ranks.start(group, children)
        except Unavailable as error:
            self._perform(self._table.on_lost(group.group_id, group.term, error.message, now_s=monotonic()))
            return
        await self._watch_ranks(group)

    async def _watch_ranks(self, group: Group) -> None:
        """Wait for a rank's end, and report it under whatever term the group is by then."""
        end = await self._ranks.first_end(group)
        if end is None or self._is_stopping:
            return
        rank, code, report = end
        why = f"rank {rank}'s actor died" if code is None else f"rank {rank} ended with code {code}"
        if code == STOPPED:
            why = f"rank {rank} is stopped (SIGSTOP)"
        with contextlib.suppress(ValueError, KeyError):
            why = f"rank {rank}: {json.loads(report)['error']}"
        current = self._table.groups[group.group_id]
        self._perform(self._table.on_lost(group.group_id, current.term, why, now_s=monotonic()))

    async def _start_ranks(self, group_id: str) -> None:
        """Start a group's ranks, all together."""
        group = self._table.groups.get(group_id)
        if self._is_stopping or group is None or group.state is not GroupState.STARTING:
            return  # an operator asked to drain it meanwhile
        await self._attach(group, oldest_term=group.ranks_term)
        await self._run_ranks(group)

    async def _restart_ranks(self, group_id: str, *, pause_s: float, is_lost: bool) -> None:
        """Start a group's ranks anew, once the former ones are gone for good."""
        await self._ranks.end(group_id, is_lost=is_lost)
        await asyncio.sleep(pause_s)
        await self._start_ranks(group_id)

    async def _end_ranks(self, group_id: str, *, is_lost: bool) -> None:
        """End a group's ranks for good."""
        await self._ranks.end(group_id, is_lost=is_lost)
        self._table.on_gone(group_id)
        self._perform([])

    def _rank_spec(self, group: Group, rank: int) -> dict[str, Any]:
        keys = keys_for(self._address("steps"), self._keys)
        return asdict(
            make_rank_spec(
                self._plan,
                group_id=group.group_id,
                term=group.ranks_term,
                rank=rank,
                scheduler_address=self._address("steps"),
                rank_lease_s=RANK_LEASE_S,
                log_level=self._config.log_level,
                folder=self._folder,
                curve=keys.of_clients().as_spec() if keys is not None else None,
            )
        )

    # -- what follows --------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        save_state(self._folder, self._state)  # first: the next controller must know of all that was begun
        for action in actions:
            match action:
                case StartRanks(group_id):
                    self._spawn(self._start_ranks(group_id))
                case StopRanks(group_id, term, is_lost):
                    detail = self._table.groups[group_id].detail
                    log.info("group %s stops: %s", group_id, detail)
                    self._spawn(self._link.send(encode(DetachGroup(group_id, term, detail))))
                    self._spawn(self._end_ranks(group_id, is_lost=is_lost))
                case RestartRanks(group_id, lost_term, pause_s, is_lost):
                    group = self._table.groups[group_id]
                    log.warning("group %s is %s; term %d follows in %g s", group_id, group.detail, group.term, pause_s)
                    self._spawn(self._link.send(encode(DetachGroup(group_id, lost_term, group.detail))))
                    self._spawn(self._restart_ranks(group_id, pause_s=pause_s, is_lost=is_lost))
                case Reattach(group_id, oldest_term):
                    self._spawn(self._attach(self._table.groups[group_id], oldest_term=oldest_term))
                case DrainAtScheduler(group_id, comes_back):
                    group = self._table.groups[group_id]
                    log.info("group %s drains: %s", group_id, group.detail)
                    self._spawn(self._link.send(encode(DrainGroup(group_id, group.term, comes_back))))
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
        if self._scheduler_host and link in _TCP_LINKS:
            host = f"[{self._scheduler_host}]" if ":" in self._scheduler_host else self._scheduler_host
            return f"tcp://{host}:{self._state.scheduler_port + _TCP_LINKS.index(link)}"
        return f"ipc://{self._folder}/{link}.sock"

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"


# Ray starts it anew where it dies; after so many deaths something is wrong that no restart mends. Calls are not repeated: whoever
# waits for an answer asks again.
MAX_CONTROLLER_RESTARTS: Final = 100
Controller: Any = ray.remote(num_cpus=0, resources={HEAD_RESOURCE: HEAD_SHARE}, max_restarts=MAX_CONTROLLER_RESTARTS, max_task_retries=0)(
    _Controller
)
