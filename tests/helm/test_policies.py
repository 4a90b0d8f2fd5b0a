"""What must hold for every pod and object, whatever the values: the promises of docs/operate.md."""

from typing import Any

import pytest
from helm_chart import KUBE_VERSIONS, Rendered, containers, pod_templates, render, value_sets

CASES = value_sets()
CLUSTERS = [name for name, values in CASES.items() if values.get("topology") == "cluster"]


@pytest.fixture(params=CASES, ids=str)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return render(CASES[request.param])


@pytest.fixture(params=CLUSTERS, ids=str)
def cluster(request: pytest.FixtureRequest) -> Rendered:
    return render(CASES[request.param])


def test_pods_run_without_rights(rendered: Rendered) -> None:
    """What Kubernetes' `restricted` Pod Security Standard asks for, and a read-only root."""
    for template in pod_templates(rendered).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all("hostPath" not in volume for volume in spec["volumes"])
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "/tmp" in {mount["mountPath"] for mount in container.get("volumeMounts", [])} or container["name"] == "wait-for-redis"


def test_every_volume_is_mounted_and_every_mount_has_one(rendered: Rendered) -> None:
    for template in pod_templates(rendered).values():
        mounted = {mount["name"] for container in containers(template) for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


def test_service_names_do_not_become_settings(rendered: Rendered) -> None:
    """Kubernetes would set QUIRE_… of a release named quire, and the program refuses settings that it does not know."""
    assert all(template["spec"]["enableServiceLinks"] is False for template in pod_templates(rendered).values())


def test_containers_say_what_they_need(rendered: Rendered) -> None:
    for component, template in pod_templates(rendered).items():
        for container in containers(template):
            assert container["image"].rpartition(":")[2] not in ("", "latest")
            assert "cpu" not in container["resources"].get("limits", {}), "a limit stops a process for the rest of each tenth of a second"
            assert component in ("worker", "gateway") or "memory" in container["resources"]["limits"]


def test_process_1_hears_signals_and_reaps(rendered: Rendered) -> None:
    for template in pod_templates(rendered).values():
        if not template["spec"].get("shareProcessNamespace") and template["spec"].get("restartPolicy") != "Never":
            assert all(item.get("command", ["ray"])[0] in ("tini", "ray") for item in template["spec"]["containers"])


def test_a_gateway_has_more_time_to_end_than_it_needs(rendered: Rendered) -> None:
    spec = pod_templates(rendered)["gateway"]["spec"]
    args = dict(arg.removeprefix("--").partition("=")[::2] for arg in spec["containers"][0]["args"])
    pre_stop_s = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pre_stop_s + float(args["drain-timeout-s"])


def test_older_kubernetes_sleeps_by_a_process() -> None:
    spec = pod_templates(render(CASES["demo"], kube_version=KUBE_VERSIONS[0]))["gateway"]["spec"]
    assert spec["containers"][0]["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "15"]}}


def test_probes_mean_what_they_say(rendered: Rendered) -> None:
    """The process for startup and liveness, service for readiness."""
    gateway = pod_templates(rendered)["gateway"]["spec"]["containers"][0]
    asked = {kind: _health_name(gateway[f"{kind}Probe"]) for kind in ("startup", "liveness", "readiness")}
    assert asked == {"startup": "quire.live", "liveness": "quire.live", "readiness": ""}


def test_a_controller_is_not_given_up_while_ray_may_restart_it(cluster: Rendered) -> None:
    controller = pod_templates(cluster)["head"]["spec"]["containers"][1]
    assert controller["livenessProbe"]["periodSeconds"] * controller["livenessProbe"]["failureThreshold"] >= 300


def _health_name(probe: dict[str, Any]) -> str:
    if "grpc" in probe:
        return str(probe["grpc"]["service"])
    (name,) = [word.removeprefix("--service=") for word in probe["exec"]["command"] if word.startswith("--service=")]
    return str(name)


def test_nothing_is_placed_on_the_head(cluster: Rendered) -> None:
    spec = cluster.one("RayCluster")["spec"]
    assert (spec["headGroupSpec"]["rayStartParams"]["num-cpus"], spec["headGroupSpec"]["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert spec["enableInTreeAutoscaling"] is False


def test_the_controller_shares_with_ray_what_it_joins_through(cluster: Rendered) -> None:
    spec = pod_templates(cluster)["head"]["spec"]
    ray, controller = spec["containers"]
    assert spec["shareProcessNamespace"] is True
    *shared, key = controller["volumeMounts"]
    assert ray["volumeMounts"] == shared
    assert key["name"] == "cluster-key"
    assert {"/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in ray["volumeMounts"]}
    assert {volume["name"]: volume for volume in spec["volumes"]}["shm"]["emptyDir"]["medium"] == "Memory"


def test_ray_asks_for_its_token_everywhere_or_nowhere() -> None:
    def modes(name: str) -> list[str | None]:
        templates = pod_templates(render(CASES[name]))
        return [
            _variable(container, "RAY_AUTH_TOKEN") for part in ("head", "worker") for container in templates[part]["spec"]["containers"]
        ]

    assert modes("multi-host") == ["ray-token"] * 3
    assert modes("gpu") == [None, "demo-quire", None], "KubeRay gives its own to its own containers"
    assert render(CASES["gpu"]).one("RayCluster")["spec"]["authOptions"] == {"mode": "token"}
    assert modes("hub") == [None] * 3
    for container in containers(pod_templates(render(CASES["hub"]))["worker"])[-1:]:
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"], "the controller refuses to guess"
    assert "authOptions" not in render(CASES["hub"]).one("RayCluster")["spec"]


def _variable(container: dict[str, Any], name: str) -> str | None:
    """The Secret that a variable comes from."""
    found = [entry for entry in container["env"] if entry["name"] == name]
    return found[0]["valueFrom"]["secretKeyRef"]["name"] if found else None


def test_there_are_no_secrets_but_by_name(rendered: Rendered) -> None:
    assert not rendered.of_kind("Secret")
    for template in pod_templates(rendered).values():
        for container in containers(template):
            for entry in container.get("env", []):
                assert "value" not in entry or not any(word in entry["name"] for word in ("TOKEN", "PASSWORD", "KEY"))


def test_labels_find_what_they_should(rendered: Rendered) -> None:
    """Selectors of Services, budgets and policies against the labels of the pods, with those that KubeRay adds."""
    added: dict[str, dict[str, str]] = {}
    for item in rendered.of_kind("RayCluster"):
        name = {"ray.io/cluster": item["metadata"]["name"]}
        added = {
            "head": name | {"ray.io/node-type": "head"},
            "worker": name | {"ray.io/group": item["spec"]["workerGroupSpecs"][0]["groupName"]},
        }
    labels = {part: template["metadata"]["labels"] | added.get(part, {}) for part, template in pod_templates(rendered).items()}

    def found(selector: dict[str, str]) -> set[str]:
        return {part for part, own in labels.items() if selector.items() <= own.items()}

    for service in rendered.of_kind("Service"):
        assert found(service["spec"]["selector"]) == {"head" if service["metadata"]["name"].endswith("controller") else "gateway"}
    for item in rendered.of_kind("PodDisruptionBudget") + rendered.of_kind("NetworkPolicy") + rendered.of_kind("PodMonitor"):
        selector = item["spec"].get("selector") or item["spec"]["podSelector"]
        expected = {"gateway"} if item["metadata"]["name"].endswith("-gateway") else {"worker"}
        if item["metadata"]["name"].endswith("-ray"):
            expected = {"head", "worker"}
        assert found(selector["matchLabels"]) == expected
    selector = rendered.one("Deployment")["spec"]["selector"]["matchLabels"]
    assert found(selector) == {"gateway"}


def test_ports_have_the_names_that_others_use(rendered: Rendered) -> None:
    templates = pod_templates(rendered)
    parts = templates.keys() & {"gateway", "head"}
    names = {part: {port["name"] for item in templates[part]["spec"]["containers"] for port in item["ports"]} for part in parts}
    for service in rendered.of_kind("Service"):
        part = "head" if service["metadata"]["name"].endswith("controller") else "gateway"
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names[part]
    for monitor in rendered.of_kind("PodMonitor"):
        part = "gateway" if monitor["metadata"]["name"].endswith("gateway") else "head"
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names[part]
    for port in (port for part in parts for item in templates[part]["spec"]["containers"] for port in item["ports"]):
        assert not 10002 <= port["containerPort"] <= 19999, "Ray's workers take ports there"


def test_groups_get_the_pods_that_they_fill() -> None:
    def pods(name: str) -> tuple[int, int, str, str]:
        (group,) = render(CASES[name]).one("RayCluster")["spec"]["workerGroupSpecs"]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        return group["replicas"], group["numOfHosts"], group["rayStartParams"]["num-cpus"], group["rayStartParams"]["num-gpus"]

    assert pods("hub") == (1, 1, "1", "0")
    assert pods("gpu") == (2, 1, "1", "1")
    assert pods("several-groups-per-pod") == (2, 1, "4", "4")
    assert pods("multi-host") == (2, 2, "8", "0")


def test_a_pod_asks_for_its_gpus_and_keeps_its_other_resources() -> None:
    worker = pod_templates(render(CASES["gpu"]))["worker"]["spec"]["containers"][0]
    assert worker["resources"] == {"requests": {"cpu": "8", "memory": "48Gi"}, "limits": {"memory": "48Gi", "nvidia.com/gpu": 1}}
    worker = pod_templates(render(CASES["several-groups-per-pod"]))["worker"]["spec"]["containers"][0]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 4, "of two groups of two"
    (model,) = CASES["gpu"]["models"]
    split = {**model, "config": {"device": "cuda", "tensor_parallel_size": 4}, "workers": {**model["workers"], "ranksPerHost": 4}}
    rendered = render(CASES["gpu"] | {"models": [split]})
    (group,) = rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    worker = pod_templates(rendered)["worker"]["spec"]["containers"][0]
    assert (group["numOfHosts"], worker["resources"]["limits"]["nvidia.com/gpu"]) == (1, 4), "a group's GPUs are in one pod"
    server = pod_templates(render(CASES["gpu-standalone"]))["gateway"]["spec"]["containers"][0]
    assert server["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 2}, "of two groups"


def test_evictions_leave_all_pods_but_one() -> None:
    budgets = {item["metadata"]["name"]: item["spec"] for item in render(CASES["multi-host"]).of_kind("PodDisruptionBudget")}
    assert budgets["demo-quire-llama-405b"]["minAvailable"] == 3
    assert [item["metadata"]["name"] for item in render(CASES["demo"]).of_kind("PodDisruptionBudget")] == ["demo-quire-gateway"]


def test_to_scale_changes_no_pod() -> None:
    """KubeRay compares everything but the numbers of replicas; a difference elsewhere could end every pod."""
    values = CASES["gpu"]
    more = values | {"models": [values["models"][0] | {"groups": 5}]}
    before, after = render(values), render(more)
    assert after.one("ConfigMap", "-scale")["data"] == {"groups": "5"}
    for name in ("replicas", "minReplicas", "maxReplicas"):
        assert after.one("RayCluster")["spec"]["workerGroupSpecs"][0].pop(name) == 5
        before.one("RayCluster")["spec"]["workerGroupSpecs"][0].pop(name)
    assert before.one("RayCluster") == after.one("RayCluster")
    assert before.one("Deployment") == after.one("Deployment")


def test_gateways_are_scaled_by_demand() -> None:
    rendered = render(CASES["autoscaling"])
    scaler = rendered.one("HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in rendered.one("Deployment")["spec"], "an upgrade would undo what the autoscaler did"
    assert [metric["type"] for metric in scaler["metrics"]] == ["Pods", "External", "Resource"]
    assert scaler["scaleTargetRef"]["name"] == rendered.one("Deployment")["metadata"]["name"]
    metrics = render(CASES["gpu-standalone"]).one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [metric["pods"]["metric"]["name"] for metric in metrics] == ["quire_gateway_calls", "quire_requests_waiting"]


def test_the_head_waits_for_redis_for_a_bounded_time() -> None:
    init, *_ = pod_templates(render(CASES["multi-host"]))["head"]["spec"]["initContainers"]
    assert 'address="redis.data.svc:6379"' in init["command"][2]
    assert "waited < 300" in init["command"][2]
    ports = [
        port["port"]
        for rule in render(CASES["multi-host"]).one("NetworkPolicy", "-ray")["spec"]["egress"]
        for port in rule.get("ports", [])
    ]
    assert 6379 in ports


def test_models_are_where_the_program_looks() -> None:
    head = pod_templates(render(CASES["gpu"]))["head"]["spec"]
    assert head["containers"][1]["args"][1] == "/models/models/llama/8b"
    assert {"name": "model", "mountPath": "/models/models", "readOnly": True} in head["containers"][0]["volumeMounts"]
    assert {"name": "model", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}} in head["volumes"]
    templates = pod_templates(render(CASES["hub"]))
    for part in ("head", "worker"):
        fetch = templates[part]["spec"]["initContainers"][-1]
        assert fetch["command"][-1] == "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca"
        assert {"name": "HF_HOME", "value": "/models/hub"} in fetch["env"]
    server = pod_templates(render(CASES["gpu-standalone"]))["gateway"]["spec"]
    assert server["initContainers"][0]["command"][-1] == server["containers"][0]["args"][1]
    shared = pod_templates(render(CASES["shared-hub"]))["worker"]["spec"]["volumes"]
    assert {"name": "hub", "persistentVolumeClaim": {"claimName": "hub-cache"}} in shared
