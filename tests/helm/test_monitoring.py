"""What the chart gives to Prometheus and Grafana is what the program has."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helm_chart import Rendered, render, value_sets

from quire.common import metric_names

ROOT = Path(__file__).parents[2]
CASES = value_sets()
NAMES = {metric.name for metric in vars(metric_names).values() if isinstance(metric, metric_names.Metric)}


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render(CASES["autoscaling"])


def test_rules_are_those_that_are_tested(rendered: Rendered) -> None:
    groups = [group for item in rendered.of_kind("PrometheusRule") for group in item["spec"]["groups"]]
    own = [yaml.safe_load((ROOT / "deploy" / "prometheus" / name).read_text())["groups"] for name in ("alerts.yml", "recording_rules.yml")]
    assert groups == [group for part in own for group in part]


def test_dashboards_are_those_that_are_made(rendered: Rendered) -> None:
    config_maps = [item for item in rendered.of_kind("ConfigMap") if "dashboard" in item["metadata"]["name"]]
    assert all(item["metadata"]["labels"]["grafana_dashboard"] == "1" for item in config_maps)
    shown = {name: json.loads(text) for item in config_maps for name, text in item["data"].items()}
    assert shown == {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy" / "grafana").glob("*.json")}
    assert len(shown) >= 4


def test_jobs_have_the_names_that_alerts_ask_for() -> None:
    """quire-gateway and quire-controller, as in deploy/prometheus/prometheus.yml."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    asked = {job["job_name"] for job in config["scrape_configs"]}
    for case in ("demo", "gpu"):
        endpoints = [endpoint for item in render(CASES[case]).of_kind("PodMonitor") for endpoint in item["spec"]["podMetricsEndpoints"]]
        jobs = {line["replacement"] for endpoint in endpoints for line in endpoint["relabelings"] if line["targetLabel"] == "job"}
        assert asked <= jobs
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    assert re.search(r'up\{job=~"quire-', alerts)


def test_autoscalers_ask_for_metrics_that_exist() -> None:
    for case in ("autoscaling", "gpu-standalone"):
        metrics = render(CASES[case]).one("HorizontalPodAutoscaler")["spec"]["metrics"]
        asked = {metric[kind]["metric"]["name"] for metric in metrics for kind in ("pods", "external") if kind in metric}
        assert asked == {"quire_gateway_calls", "quire_requests_waiting"}
        assert asked <= NAMES
