"""What is in deploy/: rules, alerts and dashboards, read for tests."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from quire.common.metric_names import METRICS

CHECKOUT: Final = Path(__file__).resolve().parents[2]
PROMETHEUS: Final = CHECKOUT / "deploy" / "prometheus"
GRAFANA: Final = CHECKOUT / "deploy" / "grafana"
RULE_FILES: Final = ("recording_rules.yml", "alerts.yml")

# Metrics that are not ours: of Prometheus itself, and of the gateway's process.
FOREIGN: Final = frozenset({"up", "process_cpu_seconds_total", "process_resident_memory_bytes"})
_SUFFIXES: Final = ("_bucket", "_count", "_sum")
_SELECTOR: Final = re.compile(r"\b((?:model:|group:)?quire_[a-z_:0-9]+|up|process_[a-z_]+)(\{[^}]*\})?")


def rules() -> list[dict[str, Any]]:
    """All recording rules and alerts."""
    groups = [group for name in RULE_FILES for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The graphs of a dashboard, those in rows included."""
    for panel in board["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from panel.get("panels") or ()


def boards() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}


def expressions() -> dict[str, str]:
    """Every expression by where it is, with Grafana's variables filled in as "all" and a rate over 30 s."""
    found = {f"rule {rule.get('record') or rule['alert']}": str(rule["expr"]) for rule in rules()}
    for name, board in boards().items():
        for panel in panels(board):
            for index, target in enumerate(panel["targets"]):
                found[f"{name}: {panel['title']} [{index}]"] = fill(target["expr"])
    return found


def fill(expression: str) -> str:
    return expression.replace("$__rate_interval", "30s").replace("$model", ".*").replace("$group", ".*")


def selectors(expression: str) -> set[str]:
    """The series that an expression reads: names with their matchers."""
    without_groupings = re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)", "", expression)
    return {name + (matchers or "") for name, matchers in _SELECTOR.findall(without_groupings)}


def metric_of(selector: str) -> str:
    """The listed metric that a selector reads, a recorded one by its own name."""
    name = selector.partition("{")[0]
    for suffix in _SUFFIXES:
        bare = name.removesuffix(suffix)
        if bare in METRICS and METRICS[bare].kind == "histogram":
            return bare
    return name
