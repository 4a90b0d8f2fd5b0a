"""The gateway process: `python -m quire.cluster.gateway.main`, started by common/child_process.start_child."""

import asyncio
import json
import logging
import os
import random
import signal
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from quire.cluster.gateway.call_gate import CallGate
from quire.cluster.gateway.cluster_service import ClusterService
from quire.cluster.gateway.discovery import DiscoveryWatcher, RoutingTable
from quire.cluster.gateway.engine_link import EngineLink
from quire.cluster.gateway.server import Server
from quire.cluster.gateway.service import InferenceService
from quire.cluster.gateway.text_workers import TextWorkers
from quire.common.child_process import enter_child

log = logging.getLogger("quire.gateway")

# What calls that outlive the drain get to notice that they end.
STOP_GRACE_S: Final = 0.5

# The controller's files come in chunks below this; its tables are small.
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What the process is started with."""

    listen: str  # "host:port" of the gRPC edge; port 0 takes a free one
    discovery_address: str  # of the controller
    report_path: str  # where {"address": ...} or {"error": ...} is written
    request_timeout_s: float = 600.0  # of a request without a deadline; longer deadlines are cut to it
    drain_timeout_s: float = 30.0  # that running streams get after SIGTERM
    log_level: str = "info"


class Gateway:
    """All parts of a gateway, wired."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._channel = grpc.aio.insecure_channel(config.discovery_address, options=_CHANNEL_OPTIONS)
        self._workers = TextWorkers()
        self._gate = CallGate()
        self._link = EngineLink(gateway_id=f"gateway-{uuid.uuid4().hex}", on_change=self._on_link_change)
        self._watcher = DiscoveryWatcher(self._channel, self._workers, on_table=self._on_table, rng=random.Random())
        self.inference = InferenceService(
            table=lambda: self._watcher.table,
            link=self._link,
            workers=self._workers,
            gate=self._gate,
            request_timeout_s=config.request_timeout_s,
        )
        self._server = Server(self.inference, ClusterService(self._channel, gate=self._gate))
        self._health_tasks: set[asyncio.Task[None]] = set()
        self.is_ready = asyncio.Event()  # set once: a model is known and the scheduler said Welcome

    async def start(self) -> str:
        """Bind; the address.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        port = await self._server.start(self._config.listen)
        return f"{self._config.listen.rpartition(':')[0]}:{port}"

    async def watch(self) -> None:
        """Follow the controller for ever."""
        await self._watcher.run()

    async def drain(self) -> None:
        """NOT_SERVING, nothing new, and what runs gets drain_timeout_s to finish."""
        await self._server.stop_serving()
        log.info("draining %d calls for at most %g s", self._gate.num_calls, self._config.drain_timeout_s)
        if not await self._gate.drain(timeout_s=self._config.drain_timeout_s):
            log.warning("%d calls did not finish in time and are ended", self._gate.num_calls)

    async def stop(self) -> None:
        """End what still runs and close every socket."""
        await self._server.stop(grace_s=STOP_GRACE_S)
        await self._link.close()
        await self._channel.close()
        self._workers.close()

    async def _on_table(self, table: RoutingTable) -> None:
        if table.scheduler_address:
            await self._link.connect(table.scheduler_address)
        await self._update_health()

    def _on_link_change(self) -> None:
        task = asyncio.get_running_loop().create_task(self._update_health())
        self._health_tasks.add(task)
        task.add_done_callback(self._health_tasks.discard)

    async def _update_health(self) -> None:
        table = self._watcher.table
        if table.models and self._link.is_up:
            self.is_ready.set()
        if not self._gate.is_draining:
            await self._server.set_serving(bool(table.ready_models) and self._link.is_up)


async def run(config: GatewayConfig) -> int:
    """Serve until a signal; the exit code."""
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    gateway = Gateway(config)
    report = Path(config.report_path)
    try:
        address = await gateway.start()
    except (RuntimeError, OSError) as error:
        _write_report(report, {"error": f"{config.listen} cannot be bound: {error}"})
        await gateway.stop()
        return 1
    log.info("pid %d listens on %s", os.getpid(), address)
    watch = asyncio.create_task(gateway.watch())
    stopped, ready = asyncio.create_task(stop.wait()), asyncio.create_task(gateway.is_ready.wait())
    await asyncio.wait((watch, stopped, ready), return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        _write_report(report, {"address": address})
        await asyncio.wait((watch, stopped), return_when=asyncio.FIRST_COMPLETED)
    exit_code = 0
    if not watch.done():
        await gateway.drain()  # news of the cluster still count: what drains is at the scheduler
    else:
        log.error("the watch of the controller ended: %r", watch.exception())
        if not ready.done():
            _write_report(report, {"error": f"the watch of the controller ended: {watch.exception()!r}"})
        exit_code = 1
    for task in (watch, stopped, ready):
        task.cancel()
    await asyncio.gather(watch, stopped, ready, return_exceptions=True)
    await gateway.stop()
    return exit_code


def _write_report(path: Path, content: dict[str, str]) -> None:
    """All of it or nothing: whoever waits for the file never reads half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def main(spec: dict[str, Any]) -> int:
    """Run until SIGTERM."""
    config = GatewayConfig(**spec)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s gateway: %(message)s", stream=sys.stderr)
    return asyncio.run(run(config))


if __name__ == "__main__":
    sys.exit(main(enter_child()))
