"""What the chart renders for operators, against the operators' own CRDs."""

from typing import Any

import pytest
from helm_chart import KUBE_VERSIONS, render, value_sets
from operator_crds import YOUNGER_FIELDS, crd_problems, crd_schemas

pytestmark = pytest.mark.slow  # downloads a package of 6 MB

CASES = value_sets()
KINDS = ("RayCluster", "PodMonitor", "PrometheusRule")


@pytest.mark.parametrize("kube_version", KUBE_VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_operators_take_their_objects(name: str, kube_version: str) -> None:
    objects = [item for item in render(CASES[name], kube_version=kube_version).objects if item["kind"] in KINDS]
    assert objects
    for item in objects:
        assert crd_problems(_without_younger_fields(item)) == []


def test_the_younger_fields_are_not_known_to_the_older_operator() -> None:
    """Else they are to be checked like all others."""
    known = crd_schemas()["ray.io/v1", "RayCluster"]["properties"]["spec"]["properties"]
    assert {"headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling"} <= known.keys()
    assert not YOUNGER_FIELDS & known.keys()


def test_the_crds_refuse_what_does_not_exist() -> None:
    objects = render(CASES["gpu"])
    cluster = _without_younger_fields(objects.one("RayCluster"))
    group = cluster["spec"]["workerGroupSpecs"][0]
    group["numOfHost"] = 2
    group["replicas"] = "two"
    group["template"]["spec"]["containers"][0]["volumeMount"] = []
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name")
    assert len(crd_problems(cluster)) == 4
    rules = objects.of_kind("PrometheusRule")[0]
    rules["spec"]["groups"][0]["rules"][0]["expression"] = "up"
    assert len(crd_problems(rules)) == 1


def _without_younger_fields(item: dict[str, Any]) -> dict[str, Any]:
    if item["kind"] != "RayCluster":
        return item
    return {**item, "spec": {name: part for name, part in item["spec"].items() if name not in YOUNGER_FIELDS}}
