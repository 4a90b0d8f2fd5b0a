"""The gateway process: `python -m quire.cluster.gateway.main`, started by common/child_process.start_child."""

import asyncio
import gc
import logging
import os
import random
import resource
import signal
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quire.cluster.gateway.access import Access
from quire.cluster.gateway.call_gate import MAX_CALLS, CallGate
from quire.cluster.gateway.cluster_service import ClusterService
from quire.cluster.gateway.discovery import DiscoveryWatcher, RoutingTable
from quire.cluster.gateway.discovery_channel import discovery_channel
from quire.cluster.gateway.error_place import place_of
from quire.cluster.gateway.generation import FINISH_TIMEOUT_S
from quire.cluster.gateway.health_service import MAX_WATCHERS, OVERALL, HealthService
from quire.cluster.gateway.health_service import WRITE_TIMEOUT_S as HEALTH_WRITE_TIMEOUT_S
from quire.cluster.gateway.metrics import GatewayMetrics
from quire.cluster.gateway.pages import GatewayPages
from quire.cluster.gateway.request_reader import MAX_UNREAD_CALLS, READ_TIMEOUT_S, RequestReader
from quire.cluster.gateway.scheduler_link import DEFAULT_BOUNDS as DEFAULT_LINK_BOUNDS
from quire.cluster.gateway.scheduler_link import LinkBounds, SchedulerLink
from quire.cluster.gateway.server import (
    CLUSTER_SERVICE,
    CONNECTION_GRACE_S,
    HANDSHAKE_TIMEOUT_S,
    INFERENCE_SERVICE,
    MAX_CONNECTION_AGE_S,
    MAX_CONNECTIONS,
    Server,
)
from quire.cluster.gateway.service import WRITE_STALL_TIMEOUT_S, InferenceService
from quire.cluster.gateway.status_view import StatusView
from quire.cluster.gateway.text_workers import TextWorkers
from quire.cluster.gateway.tls import Certificates, TlsFiles
from quire.cluster.gateway.tokens import TokenFile
from quire.cluster.gateway.tracing import Tracing
from quire.common.child_process import enter_child
from quire.common.config import MAX_REQUEST_BYTES
from quire.common.curve import CurveKeys
from quire.common.errors import ConfigError, QuireError
from quire.common.files import write_json_atomically

log = logging.getLogger("quire.gateway")

# What calls that outlive the drain get to notice that they end.
STOP_GRACE_S: Final = 0.5

# What a gateway has open at most: its connections, and its links, pipes and libraries. Many systems start processes with 1024, where
# a thousand idle connections would leave no file for the next one, nor for the link to the scheduler.
MAX_OPEN_FILES: Final = MAX_CONNECTIONS + 512

# New objects after which Python looks for cycles among the youngest, and how often among the older ones. By its own 700, 10 and 10
# the looks took more than half of the processor time of 10,000 calls at once: 4.6 s instead of 2.1 (2 cores, 2026-11-25).
COLLECTION_THRESHOLDS: Final = (50_000, 20, 20)

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
    shares_port: bool = False  # with other gateways of this machine
    max_request_bytes: int = MAX_REQUEST_BYTES  # larger messages are refused by their length
    request_timeout_s: float = 600.0  # of a request without a deadline; longer deadlines are cut to it
    drain_timeout_s: float = 30.0  # that running streams get after SIGTERM
    log_level: str = "info"
    token_file: str | None = None  # of hashed tokens; None: no tokens are asked for
    tls_cert: str | None = None  # PEM, with tls_key; None: no TLS
    tls_key: str | None = None
    cluster_key: str | None = None  # file of the cluster's keys (common/curve.py), for a scheduler that is reached by TCP
    tls_client_ca: str | None = None  # PEM of who signs clients' certificates; None: clients need none
    metrics_listen: str | None = None  # "host:port" of the metrics page; None: none is served
    metrics_port_is_free: bool = False  # whether another port will do if that one is taken
    otlp_endpoint: str | None = None  # of the collector that spans are sent to; None: no tracing
    trace_sample_ratio: float = 1.0  # of requests whose client has not decided


@dataclass(frozen=True, slots=True)
class GatewayBounds:
    """What a gateway takes and waits for at most; each is explained where it is used."""

    max_calls: int = MAX_CALLS
    max_unread_calls: int = MAX_UNREAD_CALLS
    read_timeout_s: float = READ_TIMEOUT_S
    max_health_watchers: int = MAX_WATCHERS
    health_write_timeout_s: float = HEALTH_WRITE_TIMEOUT_S
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    max_connection_age_s: float = MAX_CONNECTION_AGE_S
    connection_grace_s: float = CONNECTION_GRACE_S
    write_stall_timeout_s: float = WRITE_STALL_TIMEOUT_S
    finish_timeout_s: float = FINISH_TIMEOUT_S
    link: LinkBounds = DEFAULT_LINK_BOUNDS


DEFAULT_BOUNDS: Final = GatewayBounds()


class Gateway:
    """All parts of a gateway, wired."""

    def __init__(self, config: GatewayConfig, *, bounds: GatewayBounds = DEFAULT_BOUNDS) -> None:
        """
        Raises:
            ConfigError: the token file, the certificate or the cluster key cannot be used.
        """
        self._config = config
        self._certificates = _certificates(config)
        keys = CurveKeys.read(Path(config.cluster_key)) if config.cluster_key is not None else None
        access = Access(TokenFile(Path(config.token_file)) if config.token_file is not None else None)
        self._channel = discovery_channel(config.discovery_address, keys.certificates if keys is not None else None, _CHANNEL_OPTIONS)
        self._workers = TextWorkers()
        self.gate = CallGate(max_calls=bounds.max_calls)
        self.metrics = GatewayMetrics()
        self._tracing = Tracing(config.otlp_endpoint, sample_ratio=config.trace_sample_ratio) if config.otlp_endpoint else None
        self.link = SchedulerLink(gateway_id=f"gateway-{uuid.uuid4().hex}", on_change=self._update_health, bounds=bounds.link, keys=keys)
        self.watcher = DiscoveryWatcher(self._channel, self._workers, on_table=self._on_table, rng=random.Random())
        self.inference = InferenceService(
            table=lambda: self.watcher.table,
            link=self.link,
            workers=self._workers,
            gate=self.gate,
            access=access,
            metrics=self.metrics,
            tracing=self._tracing,
            request_timeout_s=config.request_timeout_s,
            write_stall_timeout_s=bounds.write_stall_timeout_s,
            finish_timeout_s=bounds.finish_timeout_s,
        )
        self.health = HealthService(
            (OVERALL, INFERENCE_SERVICE, CLUSTER_SERVICE),
            max_watchers=bounds.max_health_watchers,
            write_timeout_s=bounds.health_write_timeout_s,
        )
        self.reader = RequestReader(
            timeout_s=bounds.read_timeout_s,
            max_unread_calls=bounds.max_unread_calls,
            max_model_len=lambda: max((model.max_model_len for model in self.watcher.table.models.values()), default=0),
        )
        self._server = Server(
            self.inference,
            ClusterService(self._channel, gate=self.gate),
            health=self.health,
            access=access,
            reader=self.reader,
            max_call_s=config.request_timeout_s,
            max_request_bytes=config.max_request_bytes,
            shares_port=config.shares_port,
            handshake_timeout_s=bounds.handshake_timeout_s,
            max_connection_age_s=bounds.max_connection_age_s,
            connection_grace_s=bounds.connection_grace_s,
        )
        self.pages = GatewayPages(self.metrics, StatusView(self._channel), gate=self.gate, health=self.health)
        self.is_ready = asyncio.Event()  # set once: a model is known and the scheduler said Welcome

    async def start(self) -> str:
        """Bind; the address.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        if self._config.metrics_listen is not None:
            await self.pages.start(self._config.metrics_listen, may_move=self._config.metrics_port_is_free)
        port = await self._server.start(self._config.listen, self._certificates)
        return f"{self._config.listen.rpartition(':')[0]}:{port}"

    async def watch(self) -> None:
        """Follow the controller and keep the link to the scheduler, for ever.

        Raises:
            Exception: of the one of them that failed for good; the process should end.
        """
        loops = [asyncio.create_task(self.watcher.run()), asyncio.create_task(self.link.watch())]
        try:
            await asyncio.gather(*loops)
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def drain(self) -> None:
        """Nothing new, NOT_SERVING, and what runs gets drain_timeout_s to finish."""
        self.gate.close()
        self.health.shut_down()
        self.link.stop_waiting()
        log.info("draining %d calls for at most %g s", self.gate.num_calls, self._config.drain_timeout_s)
        if not await self.gate.drain(timeout_s=self._config.drain_timeout_s):
            log.warning("%d calls did not finish in time and are ended", self.gate.num_calls)

    async def stop(self) -> None:
        """End what still runs and close every socket."""
        await self._server.stop(grace_s=STOP_GRACE_S)
        await self.pages.stop()
        if self._tracing is not None:
            await self._tracing.stop()
        await self.link.close()
        await self._channel.close()
        self._workers.close()

    async def _on_table(self, table: RoutingTable) -> None:
        if table.scheduler_address:
            await self.link.connect(table.scheduler_address)
        self._update_health()

    def _update_health(self) -> None:
        table = self.watcher.table
        if table.models and self.link.is_up:
            self.is_ready.set()
        self.health.set_serving(bool(table.ready_models) and self.link.is_up)


def _certificates(config: GatewayConfig) -> Certificates | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    client_ca = Path(config.tls_client_ca) if config.tls_client_ca is not None else None
    return Certificates(TlsFiles(Path(config.tls_cert), Path(config.tls_key), client_ca))


async def run(config: GatewayConfig, *, bounds: GatewayBounds = DEFAULT_BOUNDS) -> int:
    """Serve until a signal; the exit code."""
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    report = Path(config.report_path)
    try:
        gateway = Gateway(config, bounds=bounds)
    except ConfigError as error:
        write_json_atomically(report, {"error": error.message})
        return 1
    try:
        address = await gateway.start()
    except (RuntimeError, OSError) as error:
        write_json_atomically(report, {"error": f"an address cannot be bound: {error}"})
        await gateway.stop()
        return 1
    log.info("pid %d listens on %s", os.getpid(), address)
    gc.set_threshold(*COLLECTION_THRESHOLDS)
    watch = asyncio.create_task(gateway.watch())
    stopped, ready = asyncio.create_task(stop.wait()), asyncio.create_task(gateway.is_ready.wait())
    await asyncio.wait((watch, stopped, ready), return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        gc.freeze()  # what is there by now stays
        write_json_atomically(report, {"address": address, "metrics_address": gateway.pages.address})
        await asyncio.wait((watch, stopped), return_when=asyncio.FIRST_COMPLETED)
    exit_code = 0
    if not watch.done():
        await gateway.drain()  # news of the cluster still count: what drains is at the scheduler
    else:
        failure = watch.exception()
        assert failure is not None, "it watches for ever"
        text = f"the gateway cannot go on: {failure.message if isinstance(failure, QuireError) else place_of(failure)}"
        log.error("%s", text)
        if not ready.done():
            write_json_atomically(report, {"error": text})
        exit_code = 1
    for task in (watch, stopped, ready):
        task.cancel()
    await asyncio.gather(watch, stopped, ready, return_exceptions=True)
    await gateway.stop()
    return exit_code


def raise_file_limit(wanted: int = MAX_OPEN_FILES) -> None:
    """Let this process open as many files as it may need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning(
                "this process may open %d files and needs %d for %d connections; raise ulimit -Hn", allowed, wanted, MAX_CONNECTIONS
            )


def main(spec: dict[str, Any]) -> int:
    """Run until SIGTERM."""
    config = GatewayConfig(**spec)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s gateway: %(message)s", stream=sys.stderr)
    raise_file_limit()
    return asyncio.run(run(config))


if __name__ == "__main__":
    sys.exit(main(enter_child()))
