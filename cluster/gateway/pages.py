"""The pages that a gateway shows of itself, on a port of their own."""

from collections.abc import Mapping
from importlib import resources

from quire.cluster.gateway.call_gate import CallGate
from quire.cluster.gateway.health_service import HealthService
from quire.cluster.gateway.metrics import GatewayMetrics
from quire.cluster.gateway.status_view import StatusView
from quire.common.http_pages import HttpPages, Page


class GatewayPages:
    """/metrics for Prometheus; / for people, which asks for /status.json."""

    def __init__(self, metrics: GatewayMetrics, view: StatusView, *, gate: CallGate, health: HealthService) -> None:
        self._metrics = metrics
        self._gate = gate
        self._health = health
        self._view = view
        self._status_html = resources.files("quire.cluster.gateway").joinpath("status_page.html").read_bytes()
        self._http = HttpPages({"/": self._status_page, "/status.json": self._status_json, "/metrics": self._metrics_page})
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

    async def _status_page(self, headers: Mapping[str, str]) -> Page:
        return Page(self._status_html, "text/html; charset=utf-8")

    async def _status_json(self, headers: Mapping[str, str]) -> Page:
        return Page(await self._view.json(), "application/json")
