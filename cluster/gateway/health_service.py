"""grpc.health.v1: whether requests are served. No client can hold it up.

The servicer of grpcio-health-checking writes to its watchers under a lock that a change of status needs too, so that one
watcher that reads nothing stops them all, and the shutdown with them.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from quire.cluster.gateway.grpc_errors import Context, errors_as_status
from quire.cluster.gateway.writing import write
from quire.common.errors import NotFound, Overloaded

OVERALL: Final = ""  # the whole server's name, by the protocol
LIVE: Final = "quire.live"  # the process: SERVING for as long as it answers, whatever it can serve
SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

# One per load balancer and service is usual.
MAX_WATCHERS: Final = 1024
RETRY_AFTER_S: Final = 5.0
# A status is a dozen bytes; a watcher without room for that is gone or means harm.
WRITE_TIMEOUT_S: Final = 10.0


class HealthService(HealthServicer):  # type: ignore[misc]  # its stubs have no types
    """One status for all names but LIVE. Changes only set it; each watcher writes for itself, and only the latest status."""

    def __init__(self, names: Iterable[str], *, max_watchers: int = MAX_WATCHERS, write_timeout_s: float = WRITE_TIMEOUT_S) -> None:
        self._names = frozenset(names)
        self._max_watchers = max_watchers
        self._write_timeout_s = write_timeout_s
        self._status = HealthCheckResponse.NOT_SERVING
        self._is_final = False
        self._news = asyncio.Event()  # set at the next change, which brings another one
        self.num_watchers = 0

    def set_serving(self, is_serving: bool) -> None:
        """Nothing happens after shut_down."""
        status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        if status != self._status and not self._is_final:
            self._status = status
            self._news.set()
            self._news = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        return bool(self._status == HealthCheckResponse.SERVING)

    def shut_down(self) -> None:
        """NOT_SERVING for good."""
        self.set_serving(False)
        self._is_final = True

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        status = self._status_of(request.service)
        async with errors_as_status(context):
            if status == HealthCheckResponse.SERVICE_UNKNOWN:
                raise NotFound("this server has no such service", reason="SERVICE_NOT_FOUND", field="service")
        return HealthCheckResponse(status=status)

    async def Watch(self, request: HealthCheckRequest, context: Context) -> None:
        async with errors_as_status(context):
            if self.num_watchers >= self._max_watchers:
                text = f"{self.num_watchers} watchers are there already; use Check, or try again"
                raise Overloaded(text, reason="TOO_MANY_WATCHERS", retry_after_s=RETRY_AFTER_S)
            self.num_watchers += 1
            try:
                await self._tell(request.service, context)
            finally:
                self.num_watchers -= 1

    async def _tell(self, name: str, context: Context) -> None:
        told = None
        while True:
            news = self._news  # before the status is read, so that no change is missed
            status = self._status_of(name)
            if status != told:
                await write(context, HealthCheckResponse(status=status), timeout_s=self._write_timeout_s)
                told = status
            await news.wait()

    def _status_of(self, name: str) -> HealthCheckResponse.ServingStatus.ValueType:
        if name == LIVE:
            return HealthCheckResponse.SERVING
        return self._status if name in self._names else HealthCheckResponse.SERVICE_UNKNOWN
