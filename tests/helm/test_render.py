"""Every set of values of the chart, for two versions of Kubernetes, through Helm's own engine and strict schemas."""

import re

import pytest
from helm_chart import KUBE_VERSIONS, lint, render, value_sets
from kube_schemas import problems

CASES = value_sets()


@pytest.mark.parametrize("kube_version", KUBE_VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_kubernetes_takes_every_object(name: str, kube_version: str) -> None:
    rendered = render(CASES[name], kube_version=kube_version)
    found = {(item["kind"], item["metadata"]["name"]): problems(item, kube_version) for item in rendered.objects}
    assert not {key: texts for key, texts in found.items() if texts}
    assert len(found) == len(rendered.objects), "two objects have one name"
    kinds = {kind for kind, _ in found}
    assert {"Deployment", "Service", "PodDisruptionBudget", "PodMonitor"} <= kinds
    assert ("RayCluster" in kinds) == (CASES[name].get("topology") == "cluster")


@pytest.mark.parametrize("name", CASES)
def test_lint_has_nothing_to_say(name: str) -> None:
    assert lint(CASES[name], kube_version=KUBE_VERSIONS[0]) == []


def test_objects_of_operators_that_are_not_there_are_left_out() -> None:
    kinds = {item["kind"] for item in render(CASES["autoscaling"], api_versions=()).objects}
    assert not kinds & {"PodMonitor", "PrometheusRule"}
    assert "RayCluster" in kinds


def test_the_schemas_refuse_what_does_not_exist() -> None:
    """Else they would prove nothing."""
    rendered = render(CASES["gpu"])
    cluster = rendered.one("RayCluster")
    cluster["spec"]["workerGroupSpecs"][0]["numOfHost"] = 2
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    gateway = rendered.one("Deployment", "-gateway")
    gateway["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["grcp"] = {"port": 1}
    assert [len(problems(item, KUBE_VERSIONS[0])) for item in (cluster, gateway)] == [2, 1]


@pytest.mark.parametrize("topology", ["standalone", "cluster"])
def test_long_names_are_cut_to_what_kubernetes_takes(topology: str) -> None:
    values = CASES["gpu"] | {"topology": topology, "fullnameOverride": ""}
    rendered = render(values, name="a-release-with-a-name-as-long-as-helm-lets-it-be-here")
    names = [item["metadata"]["name"] for item in rendered.objects]
    assert len(set(names)) >= 4
    for name in names:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name), name
    for cluster in rendered.of_kind("RayCluster"):
        assert len(f"{cluster['metadata']['name']}-head-svc") <= 50, "KubeRay cuts what is longer"
