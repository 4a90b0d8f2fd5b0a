"""install, upgrade, rollback, test, uninstall by Helm's own engine, against an API server in memory."""

from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
from fake_kube_api import FakeKubeApi
from helm_chart import CHART, render, value_sets

VALUES: dict[str, Any] = value_sets()["gpu"]
TIMEOUT_S = 20


@pytest.fixture
def api() -> Iterator[FakeKubeApi]:
    with FakeKubeApi() as server:
        yield server


def helm(api: FakeKubeApi) -> helm_python.Config:
    """Releases are remembered in memory: the engine would write its Secrets in protobuf, which the server does not read."""
    return helm_python.Config(namespace="llm", storage_driver="memory", kube_apiserver=api.url, kubeconfig_content=api.kubeconfig)


def changed(**model: Any) -> dict[str, Any]:
    return VALUES | {"models": [VALUES["models"][0] | model]}


def test_a_release_from_install_to_uninstall(api: FakeKubeApi) -> None:
    cluster = api.cluster
    with helm(api) as config:
        config.install(CHART, "demo", VALUES, timeout=TIMEOUT_S)
        expected = {item["kind"] for item in render(VALUES).objects} - {"Pod"}
        assert cluster.kinds().keys() == expected
        first_uid = cluster.the("RayCluster", "demo-quire")["metadata"]["uid"]

        config.upgrade(CHART, "demo", changed(groups=3), timeout=TIMEOUT_S)
        assert cluster.the("RayCluster", "demo-quire")["spec"]["workerGroupSpecs"][0]["replicas"] == 3
        assert cluster.the("ConfigMap", "demo-quire-scale")["data"] == {"groups": "3"}
        assert cluster.the("RayCluster", "demo-quire")["metadata"]["uid"] == first_uid

        config.rollback("demo", version=1, timeout=TIMEOUT_S)
        assert cluster.the("RayCluster", "demo-quire")["spec"]["workerGroupSpecs"][0]["replicas"] == 2
        assert [(entry["revision"], entry["status"]) for entry in config.history("demo")] == [
            (1, "superseded"),
            (2, "superseded"),
            (3, "deployed"),
        ]

        config.test("demo", timeout=TIMEOUT_S, logs=False)
        made = [path for method, path in cluster.requests if "/pods" in path and method in ("POST", "PATCH")]
        assert made == ["/api/v1/namespaces/llm/pods/demo-quire-test"]
        assert "Pod" not in cluster.kinds(), "a test that succeeded leaves nothing behind"

        config.uninstall("demo", timeout=TIMEOUT_S)
        assert cluster.kinds() == {}


def test_a_test_that_fails_is_told_and_its_pod_stays_to_be_looked_at(api: FakeKubeApi) -> None:
    api.cluster.pod_phase = "Failed"
    with helm(api) as config:
        config.install(CHART, "demo", VALUES, timeout=TIMEOUT_S)
        with pytest.raises(helm_python.HelmError):
            config.test("demo", timeout=TIMEOUT_S, logs=False)
        assert api.cluster.kinds()["Pod"] == ["demo-quire-test"]


def test_bad_values_leave_nothing_behind(api: FakeKubeApi) -> None:
    with helm(api) as config:
        with pytest.raises(helm_python.HelmError, match="hf://org/name@COMMIT"):
            config.install(CHART, "demo", changed(uri="hf://org/name"), timeout=TIMEOUT_S)
        assert api.cluster.kinds() == {}


def test_a_kubernetes_without_grpc_probes_is_refused() -> None:
    with FakeKubeApi(version="1.26") as api, helm(api) as config:
        with pytest.raises(helm_python.HelmError, match=r"1\.27"):
            config.install(CHART, "demo", VALUES, timeout=TIMEOUT_S)
        assert api.cluster.kinds() == {}
