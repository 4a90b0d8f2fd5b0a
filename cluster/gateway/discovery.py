"""What the controller tells this gateway: the routing table, watched, and the files of its models, fetched by hash."""

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import grpc

from quire.cluster.gateway.served_model import ServedModel, load_served_model, make_served_model
from quire.cluster.gateway.text_workers import TextWorkers
from quire.common.errors import ConfigError, InvalidRequest, NotFound, QuireError, Unavailable
from quire.internal.v1 import discovery_pb2
from quire.internal.v1.discovery_pb2_grpc import DiscoveryServiceStub
from quire.v1 import cluster_pb2

log = logging.getLogger("quire.gateway")

# Pause before the watch is opened again: doubled each time from the first to the longest, with a random part so that the
# gateways of a cluster do not come all at once.
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0
# The largest tokenizer.json seen is 35 MB.
MAX_FILE_BYTES: Final = 256 * 2**20
FETCH_TIMEOUT_S: Final = 60.0
RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """The cluster at one moment, as far as a gateway must know it."""

    version: int
    scheduler_address: str
    models: Mapping[str, ServedModel]  # by name
    ready_models: frozenset[str]  # those with at least one READY group

    def find(self, name: str) -> ServedModel:
        """The model that a request names; "" is the default one.

        Raises:
            Unavailable: no model is served yet.
            NotFound: there is no such model.
            InvalidRequest: none was named and there is no default.
        """
        if not self.models:
            raise Unavailable("no model is served yet; try again", reason="NO_MODEL", retry_after_s=RETRY_AFTER_S)
        if name:
            if name not in self.models:
                served = ", ".join(sorted(self.models))
                text = f"model {name[:64]!r} is not served; served: {served}"
                raise NotFound(text, reason="MODEL_NOT_FOUND", field="model", metadata={"served": served})
            return self.models[name]
        candidates = list(self.models.values()) if len(self.models) == 1 else [m for m in self.models.values() if m.public.default]
        if len(candidates) != 1:
            raise InvalidRequest(f"name a model; served: {', '.join(sorted(self.models))}", reason="MODEL_NOT_NAMED", field="model")
        return candidates[0]


EMPTY_TABLE: Final = RoutingTable(version=0, scheduler_address="", models=MappingProxyType({}), ready_models=frozenset())


class DiscoveryWatcher:
    """Keeps `table` at the controller's newest. While the controller is away, the last table stays."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        workers: TextWorkers,
        *,
        on_table: Callable[[RoutingTable], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self._stub = DiscoveryServiceStub(channel)
        self._workers = workers
        self._on_table = on_table  # called with each new table, after `table` holds it
        self._rng = rng
        self._loaded: dict[str, tuple[frozenset[tuple[str, str]], ServedModel]] = {}  # by name, with its files' names and hashes
        self.table = EMPTY_TABLE

    async def run(self) -> None:
        """Watch for ever."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                async for response in self._stub.Watch(discovery_pb2.WatchRequest(), wait_for_ready=True):
                    await self._take(response)
                    backoff_s = FIRST_BACKOFF_S
                why = "the controller ended the watch"
            except grpc.aio.AioRpcError as error:
                why = error.code().name  # without gRPC's words, which may quote what went wrong inside the controller
            except QuireError as error:
                why = error.message
            log.warning("no news from the controller, next attempt in %.1f s: %s", backoff_s, why)
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _take(self, response: discovery_pb2.WatchResponse) -> None:
        """Make a table of a response; a model whose files did not change keeps its tokenizer."""
        loaded = {entry.model.name: await self._load(entry) for entry in response.models}
        self._loaded = loaded
        ready = {group.model for group in response.groups if group.state == cluster_pb2.GROUP_STATE_READY}
        self.table = RoutingTable(
            version=response.version,
            scheduler_address=response.scheduler_address,
            models=MappingProxyType({name: model for name, (_, model) in loaded.items()}),
            ready_models=frozenset(ready & loaded.keys()),
        )
        log.info("routing table %d: models %s, ready %s", response.version, sorted(loaded), sorted(self.table.ready_models))
        await self._on_table(self.table)

    async def _load(self, entry: discovery_pb2.ServedModel) -> tuple[frozenset[tuple[str, str]], ServedModel]:
        hashes = frozenset((file.name, file.sha256) for file in entry.files)
        former_hashes, former = self._loaded.get(entry.model.name, (None, None))
        if former is not None and former_hashes == hashes:
            return hashes, make_served_model(entry, former.tokenizer, former.chat)
        files = {file.name: await self._fetch(file) for file in entry.files}
        return hashes, await self._workers.run(load_served_model, entry, files, self._workers.templates)

    async def _fetch(self, file: discovery_pb2.ModelFile) -> bytes:
        """A file's contents.

        Raises:
            ConfigError: it is too large, or what came is not what the table names.
        """
        if file.size_bytes > MAX_FILE_BYTES:
            raise ConfigError(f"{file.name} has {file.size_bytes} bytes; a gateway takes {MAX_FILE_BYTES}")
        content = bytearray()
        async for response in self._stub.FetchFile(discovery_pb2.FetchFileRequest(sha256=file.sha256), timeout=FETCH_TIMEOUT_S):
            content += response.chunk
            if len(content) > file.size_bytes:
                break
        if len(content) != file.size_bytes or hashlib.sha256(content).hexdigest() != file.sha256.lower():
            raise ConfigError(f"{file.name} came with {len(content)} bytes, not the {file.size_bytes} of sha256 {file.sha256}")
        return bytes(content)
