"""Whether Kubernetes would take an object: strict schemas of its own kinds, by version, and of the kinds of operators that we use.

Of KubeRay's RayCluster (v1, operator 1.5) and the Prometheus operator's kinds (v1) the schemas below are ours, of the fields that
we may set; what they embed of Kubernetes (pod templates, environment) is checked against Kubernetes' own schemas. No field that is
not named here passes, so a new one needs a look at the operator's documentation. operator_crds.py has the CRDs that a cluster with
those operators published; they are a download, and KubeRay's is of an older operator.
"""

from collections.abc import Iterator
from typing import Any, Final

import jsonschema
import kubernetes_validate

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_TEXTS: Final[Schema] = {"type": "object", "additionalProperties": _TEXT}
_POD_TEMPLATE: Final[Schema] = {"type": "object", "required": ["spec"]}


def problems(item: dict[str, Any], version: str) -> list[str]:
    """What is wrong with an object for Kubernetes of a version, such as "1.30"; nothing if it would be taken."""
    key = (item["apiVersion"], item["kind"])
    if key not in _SCHEMAS:
        return list(_kubernetes_problems(item, version))
    found = [f"{'/'.join(map(str, error.path))}: {error.message}" for error in jsonschema.Draft7Validator(_SCHEMAS[key]).iter_errors(item)]
    for template in _pod_templates(item):
        metadata = {"name": "part-of-another"}
        found += _kubernetes_problems({"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}, version)
    return found


def _kubernetes_problems(item: dict[str, Any], version: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{item['kind']} {'/'.join(map(str, error.path))}: {error.message}"


def _pod_templates(item: dict[str, Any]) -> list[dict[str, Any]]:
    if item["kind"] != "RayCluster":
        return []
    spec = item["spec"]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _kind(spec: Schema) -> Schema:
    return _object("apiVersion", "kind", "metadata", "spec", apiVersion=_TEXT, kind=_TEXT, metadata={"type": "object"}, spec=spec)


def _count(minimum: int) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": 2**31 - 1}


_SECRET_KEY: Final = _object("name", "key", name=_TEXT, key=_TEXT)
_SELECTOR: Final = _object("matchLabels", matchLabels=_TEXTS)
_LABEL_NAME: Final[Schema] = {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}

_RAY_CLUSTER: Final = _object(
    "headGroupSpec",
    "workerGroupSpecs",
    rayVersion=_TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    upgradeStrategy=_object("type", type={"enum": ["None", "Recreate"]}),
    authOptions=_object("mode", mode={"enum": ["token", "disabled"]}),
    gcsFaultToleranceOptions=_object(
        "redisAddress",
        redisAddress=_TEXT,
        redisPassword=_object("valueFrom", valueFrom=_object("secretKeyRef", secretKeyRef=_SECRET_KEY)),
    ),
    headGroupSpec=_object("rayStartParams", "template", rayStartParams=_TEXTS, template=_POD_TEMPLATE),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            "groupName",
            "rayStartParams",
            "template",
            "minReplicas",
            "maxReplicas",
            groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
            replicas=_count(0),
            minReplicas=_count(0),
            maxReplicas=_count(0),
            numOfHosts=_count(1),
            rayStartParams=_TEXTS,
            template=_POD_TEMPLATE,
        ),
    },
)

_POD_MONITOR: Final = _object(
    "selector",
    "podMetricsEndpoints",
    jobLabel=_TEXT,
    selector=_SELECTOR,
    podMetricsEndpoints={
        "type": "array",
        "items": _object(
            "port",
            port=_TEXT,
            interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
            relabelings={
                "type": "array",
                "items": _object(sourceLabels={"type": "array", "items": _LABEL_NAME}, targetLabel=_LABEL_NAME, replacement=_TEXT),
            },
        ),
    },
)

_RULE: Final = _object(
    "expr", alert=_TEXT, record=_TEXT, expr=_TEXT, labels=_TEXTS, annotations=_TEXTS, **{"for": _TEXT, "keep_firing_for": _TEXT}
)
_PROMETHEUS_RULE: Final = _object(
    "groups",
    groups={"type": "array", "items": _object("name", "rules", name=_TEXT, interval=_TEXT, rules={"type": "array", "items": _RULE})},
)

_SCHEMAS: Final = {
    ("ray.io/v1", "RayCluster"): _kind(_RAY_CLUSTER),
    ("monitoring.coreos.com/v1", "PodMonitor"): _kind(_POD_MONITOR),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _kind(_PROMETHEUS_RULE),
}
