"""Our chart through Helm's own engine: what `helm template` and `helm lint` would give. Everything that knows the binding is here."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml
from helm_python import HelmError, _native

CHART: Final = Path(__file__).parents[2] / "helm" / "quire"
# What is installed in a cluster with the Prometheus operator.
MONITORING: Final = ("monitoring.coreos.com/v1",)
# The oldest version without a sleep of its own before SIGTERM, and a recent one.
KUBE_VERSIONS: Final = ("1.29", "1.34")

Object = dict[str, Any]


class ChartRefused(Exception):
    """Helm does not take these values; its words."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a release would consist of."""

    objects: list[Object]
    notes: str

    def of_kind(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Object:
        (found,) = [item for item in self.of_kind(kind) if item["metadata"]["name"].endswith(suffix)]
        return found


def value_sets() -> dict[str, Any]:
    """The chart's own cases (helm/quire/ci), by name."""
    return {path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text()) for path in sorted(CHART.glob("ci/*-values.yaml"))}


def render(
    values: Mapping[str, Any], *, kube_version: str = KUBE_VERSIONS[1], api_versions: Sequence[str] = MONITORING, name: str = "demo"
) -> Rendered:
    """
    Raises:
        ChartRefused: the schema or the chart does not take the values.
    """
    options = {"name": name, "namespace": "llm", "kube_version": f"v{kube_version}.0", "api_versions": list(api_versions)}
    files = _files(json.dumps(values), json.dumps(options))
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return Rendered(
        objects=[item for text in texts for item in yaml.load_all(text, _UniqueKeys) if item],
        notes=next(text for path, text in files.items() if path.endswith("NOTES.txt")),
    )


@functools.cache
def _files(values: str, options: str) -> dict[str, str]:
    """What each template becomes."""
    try:
        with helm_python.Chart.load(CHART) as chart:
            chart.validate_schema(chart.merge_values(json.loads(values)))
            # Chart.render has no parameters for versions yet.
            files: dict[str, str] = json.loads(_native.call_string("helm_render", chart._raw(), values, options))
    except HelmError as error:
        raise ChartRefused(str(error)) from None
    return files


class _UniqueKeys(yaml.CSafeLoader):
    """Refuses a mapping that says a key twice, of which YAML's readers silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ChartRefused(f"{', '.join(sorted(twice))} is there twice, {node.start_mark}")
        return super().construct_mapping(node, deep)


def lint(values: Mapping[str, Any], *, kube_version: str) -> list[str]:
    """What `helm lint --strict` objects to."""
    report = helm_python.lint(CHART, dict(values), strict=True, kube_version=f"v{kube_version}.0")
    icon = "icon is recommended"  # of no use where no catalogue shows it
    return [message["error"] for message in report["messages"] if icon not in message["error"]] + list(report["errors"])


def pod_templates(rendered: Rendered) -> dict[str, Object]:
    """Every pod that a release makes, by component; a whole standalone cluster is a gateway here."""
    templates = {"gateway": rendered.one("Deployment", "-gateway")["spec"]["template"]}
    for cluster in rendered.of_kind("RayCluster"):
        templates["head"] = cluster["spec"]["headGroupSpec"]["template"]
        templates["worker"] = cluster["spec"]["workerGroupSpecs"][0]["template"]
    for pod in rendered.of_kind("Pod"):
        templates["test"] = {"metadata": pod["metadata"], "spec": pod["spec"]}
    return templates


def containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
