"""The pages that a gateway shows of itself, on a port of their own."""

from collections.abc import Mapping

from quire.cluster.gateway.call_gate import CallGate
from quire.cluster.gateway.health_service import HealthService
from quire.cluster.gateway.metrics import GatewayMetrics
from quire.common.http_pages import HttpPages, Page


class GatewayPages:
    """/metrics for Prometheus."""

    def __init__(self, metrics: GatewayMetrics, *, gate: CallGate, health: HealthService) -> None:
        self._metrics = metrics
        self._gate = gate
        self._health = health
        self._http = HttpPages({"/metrics": self._metrics_page})
        self.address: str | None = None  # once they are served

    async def start(self, address: str, *, may_move: bool) -> None:
        """Serve at "host:port"; may_move: on a free port if that one is taken.

        Raises:
            OSError: it cannot be bound.
        """
        self.address = await self._http.start(address, may_move=may_move)

    async def stop(self) -> None:
        await self._http.stop()

    async def _metrics_page(self, headers: Mapping[str, str]) -> Page:
        return self._metrics.page(headers, num_calls=self._gate.num_calls, is_ready=self._health.is_serving)
