"""A real Prometheus on a real cluster under load: every expression gives something, and three alerts fire."""

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from monitoring import PROMETHEUS, RULE_FILES, expressions, metric_of, selectors
from serving import ServeProcess, wait_for

from quire.client import AsyncClient
from quire.common.errors import QuireError

pytestmark = pytest.mark.slow

START_TIMEOUT_S: Final = 30.0
# What happens is to be seen in the rules within so much time.
ALERT_TIMEOUT_S: Final = 60.0
# Metrics that a cluster on CPU does not have.
ON_A_GPU_ALONE: Final = frozenset({"quire_rank_device_memory_bytes"})
# The ratio of preemptions to requests, the hits of the prefix cache and the like are of the last 5 minutes; waits are as short.
_PROMPT: Final = "Once upon a time there was a little girl who lived near the big forest and liked to walk there every day."


@dataclass
class Watched:
    """A cluster with the Prometheus that scrapes it."""

    serve: ServeProcess
    address: str
    prometheus: str  # its own address

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now.

        Raises:
            urllib.error.HTTPError: it is no expression.
        """
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"}

    def wait_until_fires(self, alert: str) -> None:
        wait_for(lambda: alert in self.firing(), timeout_s=ALERT_TIMEOUT_S)

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"http://{self.prometheus}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A cluster with little memory and a short queue, so that it preempts and refuses."""
    folder = tmp_path_factory.mktemp("watched")
    pages = ["--metrics-listen", "127.0.0.1:0", "--controller-metrics-listen", "127.0.0.1:0"]
    memory = ["--gpu-blocks", "14", "--swap-memory", "64Mi", "--preemption", "swap"]
    with ServeProcess(folder, *pages, *memory, "--max-waiting-requests", "6") as serve:
        address = serve.wait_ready()
        metrics = json.loads((folder / "ready.json").read_text())["metrics"]
        _write_configuration(folder, metrics)
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0",
                 "--log.level=info"],
                cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield Watched(serve, address, _own_address(process, folder / "prometheus.log"))
        finally:
            process.terminate()
            process.wait(30)


def _write_configuration(folder: Path, metrics: dict[str, str]) -> None:
    """The files of deploy/, but for the targets and for times: scraped every second, and alerts do not wait to be sure."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [metrics[job["job_name"].removeprefix("quire-")]]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in RULE_FILES:
        content = yaml.safe_load((PROMETHEUS / name).read_text())
        for group in content["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        (folder / name).write_text(yaml.safe_dump(content))


def _own_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where a Prometheus that was told to take a free port listens: its log does not say, its sockets do."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text()
        for port in _listening_ports(process.pid):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=1):
                    return f"127.0.0.1:{port}"
            except OSError:
                pass
        time.sleep(0.1)
    raise AssertionError(f"prometheus is not ready:\n{log.read_text()}")


def _listening_ports(pid: int) -> list[int]:
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(descriptor)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


async def _load(address: str, *, num_requests: int, max_tokens: int, until: Callable[[], bool] = lambda: True) -> set[str]:
    """Requests at once, again until something holds; the reasons of those that were refused."""
    reasons: set[str] = set()
    async with AsyncClient(address, max_retries=0) as client:

        async def one(number: int) -> None:
            try:
                await client.generate(f"{_PROMPT} Number {number % 4}.", max_tokens=max_tokens, ignore_eos=True)
            except QuireError as error:
                reasons.add(error.reason)

        deadline_s = time.monotonic() + ALERT_TIMEOUT_S
        while True:
            await asyncio.gather(*(one(number) for number in range(num_requests)))
            if until() or time.monotonic() > deadline_s:
                return reasons


def test_a_full_queue_and_too_little_memory_are_alerted(watched: Watched) -> None:
    expected = {"QuireQueueFull", "QuirePreemptionStorm"}
    reasons = asyncio.run(_load(watched.address, num_requests=60, max_tokens=40, until=lambda: expected <= watched.firing()))
    assert expected <= watched.firing()
    assert reasons == {"QUEUE_FULL"}


def test_every_expression_of_rules_and_dashboards_gives_something(watched: Watched) -> None:
    asyncio.run(_load(watched.address, num_requests=8, max_tokens=20))
    empty: dict[str, str] = {}
    for _ in range(30):  # recorded series come a moment after what they are made of
        alerts_and_gpus = {where for where, text in expressions().items() if _may_be_empty(where, text)}
        empty = {where: text for where, text in expressions().items() if where not in alerts_and_gpus and not watched.query(text)}
        if not empty:
            break
        asyncio.run(_load(watched.address, num_requests=4, max_tokens=10))
    assert empty == {}


def test_every_selector_matches_a_live_series(watched: Watched) -> None:
    read = {selector for text in expressions().values() for selector in selectors(text)}
    dead = {selector for selector in read if metric_of(selector) not in ON_A_GPU_ALONE and not watched.query(f"count({selector})")}
    assert dead == set()


def test_every_series_of_ours_is_documented(watched: Watched) -> None:
    from quire.common.metric_names import METRICS

    names = {entry["metric"]["__name__"] for entry in watched.query('{job=~"quire-.*", __name__=~"quire_.*"}')}
    assert {metric_of(name) for name in names} <= METRICS.keys()
    assert METRICS.keys() - {metric_of(name) for name in names} <= ON_A_GPU_ALONE


def test_a_dead_group_is_alerted_until_it_is_back(watched: Watched) -> None:
    assert "QuireGroupDown" not in watched.firing()
    os.kill(watched.serve.process_of("quire.worker.rank_process"), signal.SIGKILL)
    watched.wait_until_fires("QuireGroupDown")
    wait_for(lambda: "QuireGroupDown" not in watched.firing(), timeout_s=ALERT_TIMEOUT_S)


def _may_be_empty(where: str, text: str) -> bool:
    """An alert's expression gives something only when there is something to alert of; GPUs have metrics of their own."""
    return where.startswith("rule Quire") or any(metric_of(selector) in ON_A_GPU_ALONE for selector in selectors(text))
