"""Writes what helm/quire has of other parts: values.schema.json from the config model of the command line, and copies of the rules
and dashboards of deploy/, since a chart can only hold what lies in its own folder.

    python tools/chart_files.py            write them
    python tools/chart_files.py --check    exit with 1 if one is not what it should be
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import yaml

from quire.common.config import ModelConfig, ServeConfig, resolve_config, setting_type
from quire.common.errors import ConfigError

ROOT: Final = Path(__file__).parent.parent
CHART: Final = ROOT / "helm" / "quire"
# What is copied, by its folder in the chart. Tests of rules and configs of Prometheus stand beside the rules and stay there.
COPIED: Final = {"files/prometheus": "deploy/prometheus/*.yml", "files/grafana": "deploy/grafana/*.json"}

# Settings that the chart decides itself, from other values.
CHART_SERVER_SETTINGS: Final = frozenset(
    {
        "models",
        "listen",
        "insecure",
        "token_file",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "metrics_listen",
        "controller_metrics_listen",
        "gateways",
    }
)
CHART_MODEL_SETTINGS: Final = frozenset({"model", "name", "groups"})
# What common.config.parse_bytes reads.
BYTES_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?([kKmMgGtT]i?)?[bB]?$"
# Sizes that a setting which takes a power of two may have; more is no block size.
MAX_POWER: Final = 10

Schema = dict[str, Any]

# Draft 7: what every Helm 3 and 4 can read.
TEXT: Final[Schema] = {"type": "string"}
NAME: Final[Schema] = {"type": "string", "minLength": 1}
FLAG: Final[Schema] = {"type": "boolean"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
AT_LEAST_ONE: Final[Schema] = {"type": "integer", "minimum": 1}
PORT: Final[Schema] = {"type": "integer", "minimum": 1024, "maximum": 65535}
QUANTITY: Final[Schema] = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}
TEXTS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
FREE: Final[Schema] = {"type": "object"}  # Kubernetes' own: its API server checks it
LIST: Final[Schema] = {"type": "array", "items": {"type": "object"}}
SECRET_NAME: Final[Schema] = {"type": "string", "pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    wanted, there = wanted_files(), present_files()
    if parser.parse_args().check:
        wrong = sorted(str(path.relative_to(ROOT)) for path in wanted.keys() | there.keys() if wanted.get(path) != there.get(path))
        for name in wrong:
            print(f"{name} is not what it should be; run: make chart", file=sys.stderr)
        return 1 if wrong else 0
    for path in there.keys() - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


def wanted_files() -> dict[Path, str]:
    """Everything in the chart that is made here, and its contents."""
    wanted = {CHART / "values.schema.json": json.dumps(values_schema(), indent=2) + "\n"}
    for folder, pattern in COPIED.items():
        for path in ROOT.glob(pattern):
            text = path.read_text()
            if path.suffix == ".json" or _is_rules(text):
                wanted[CHART / folder / path.name] = text
    return wanted


def present_files() -> dict[Path, str]:
    """What of it is there."""
    found = [CHART / "values.schema.json", *(path for folder in COPIED for path in (CHART / folder).glob("*"))]
    return {path: path.read_text() for path in found if path.exists()}


def _is_rules(text: str) -> bool:
    contents = yaml.safe_load(text)
    return isinstance(contents, dict) and contents.keys() == {"groups"}


def values_schema() -> Schema:
    """All values, none of them beside those named."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart quire",
        **_object(
            nameOverride=TEXT,
            topology=_one_of("standalone", "cluster"),
            fullnameOverride=TEXT,
            image=_object(repository=NAME, tag=_not_latest(), pullPolicy=_one_of("Always", "IfNotPresent", "Never")),
            imagePullSecrets=LIST,
            security=_object(
                insecure=FLAG,
                tokens=_object(secretName=SECRET_NAME, key=NAME),
                tls=_object(secretName=SECRET_NAME, clientCertificates=FLAG),
                clusterKeySecretName=SECRET_NAME,
            ),
            config=_settings(ServeConfig, without=CHART_SERVER_SETTINGS, required=["drain_timeout_s"]),
            models={"type": "array", "minItems": 1, "maxItems": 1, "items": _model()},
            huggingFace=_object(tokenSecretName=SECRET_NAME, tokenKey=NAME, cacheClaim=SECRET_NAME, cacheSize=QUANTITY, endpoint=TEXT),
            ray=_ray(),
            head=_object(resources=FREE, shmSize=QUANTITY, scratchSize=QUANTITY, env=LIST, **_placement()),
            controller=_object(resources=FREE, discoveryPort=PORT, schedulerPort=PORT, metricsPort=PORT),
            gateway=_gateway(),
            serviceAccount=_object(create=FLAG, name=TEXT, annotations=TEXTS),
            networkPolicy=_object(enabled=FLAG, clients=LIST, monitoring=LIST, operator=LIST, extraEgress=LIST),
            monitoring=_object(
                podMonitors=_object(enabled=FLAG, interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}, labels=TEXTS),
                rules=_object(enabled=FLAG, labels=TEXTS),
                dashboards=_object(enabled=FLAG, labels=TEXTS),
            ),
            tests=_object(enabled=FLAG, apiKeySecretName=SECRET_NAME, apiKeyKey=NAME),
        ),
        # Of charts that have this one as a part.
        "patternProperties": {"^global$": FREE},
    }


def _model() -> Schema:
    model = _object(
        name=NAME,
        uri={
            "type": "string",
            "pattern": r"^(builtin://|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[\w.-]+)*|hf://\w[\w.-]*/[\w.-]+(@[\w./-]+)?)$",
            "description": "builtin://, pvc://CLAIM/FOLDER or hf://ORGANISATION/NAME@REVISION",
        },
        groups=AT_LEAST_ONE,
        config=_settings(ModelConfig, without=CHART_MODEL_SETTINGS, required=["device"]),
        workers=_object(
            ranksPerHost=AT_LEAST_ONE,
            resources=FREE,
            gpuResource=NAME,
            shmSize=QUANTITY,
            scratchSize=QUANTITY,
            minAvailable={"type": "integer", "minimum": -1},
            env=LIST,
            topologySpreadConstraints=LIST,
            **_placement(),
        ),
    )
    # The head decides what is `auto`, and sees no GPU.
    model["properties"]["config"]["properties"]["device"]["enum"].remove("auto")
    model["required"] = ["name", "uri", "groups", "config", "workers"]
    return model


def _ray() -> Schema:
    return _object(
        version={"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+"},
        upgradeStrategy=_one_of("None", "Recreate"),
        auth=_object(enabled=FLAG, secretName=SECRET_NAME),
        gcsFaultTolerance=_object(
            enabled=FLAG,
            redisAddress={"type": "string", "pattern": r"^((redis://)?[\w.-]+:[0-9]+)?$", "description": "HOST:PORT"},
            passwordSecretName=SECRET_NAME,
            passwordKey=NAME,
            waitTimeoutSeconds=AT_LEAST_ONE,
            reconnectTimeoutSeconds=AT_LEAST_ONE,
        ),
        healthCheck=_object(initialDelayMs=COUNT, periodMs=AT_LEAST_ONE, timeoutMs=AT_LEAST_ONE, failureThreshold=AT_LEAST_ONE),
        objectStoreBytes={"type": "integer", "minimum": 80 * 2**20},
        startParams={"type": "object", "additionalProperties": {"type": ["string", "integer"]}},
    )


def _gateway() -> Schema:
    return _object(
        replicas=COUNT,
        processes=AT_LEAST_ONE,
        maxSurge=COUNT,
        port=PORT,
        metricsPort=PORT,
        resources=FREE,
        preStopSeconds=AT_LEAST_ONE,  # Kubernetes refuses a sleep of 0
        startupTimeoutSeconds=AT_LEAST_ONE,
        autoscaling=_object(
            enabled=FLAG,
            minReplicas=AT_LEAST_ONE,
            maxReplicas=AT_LEAST_ONE,
            targetCalls=COUNT,
            callsMetric=NAME,
            targetWaitingRequests=COUNT,
            waitingMetric=NAME,
            targetCpuPercent=COUNT,
            scaleDownStabilizationSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
        ),
        service=_object(type=_one_of("ClusterIP", "LoadBalancer", "NodePort"), annotations=TEXTS),
        podDisruptionBudget=_object(enabled=FLAG, maxUnavailable=AT_LEAST_ONE),
        env=LIST,
        topologySpreadConstraints=LIST,
        **_placement(),
    )


def _placement() -> dict[str, Schema]:
    return {"nodeSelector": TEXTS, "tolerations": LIST, "affinity": FREE, "priorityClassName": TEXT, "podAnnotations": TEXTS}


def _settings(cls: type, *, without: frozenset[str], required: list[str]) -> Schema:
    """What `quire serve` takes, under its own names."""
    properties = {f.name: _setting(cls, f.name, f.metadata) for f in fields(cls) if f.name not in without}
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _setting(cls: type, name: str, meta: Any) -> Schema:
    kind, optional = setting_type(cls, name)
    schema: Schema = {"description": meta["help"]}
    if meta["choices"]:
        return {**schema, "type": "string", "enum": list(meta["choices"])}
    if meta["is_bytes"]:
        kinds: list[str] = ["string", "integer"]
    else:
        kinds = [{int: "integer", float: "number", bool: "boolean", str: "string"}[kind]]
    schema["type"] = [*kinds, "null"] if optional else kinds[0]
    if meta["is_bytes"]:
        schema["pattern"] = BYTES_PATTERN
    if kind is bool or "string" in kinds:
        return schema
    if kind is float:
        return {**schema, "exclusiveMinimum": 0} if not _takes(cls, name, 0.0) else schema
    if not _takes(cls, name, 3) and _takes(cls, name, 2):
        return {**schema, "enum": [2**power for power in range(MAX_POWER + 1)]}
    return {**schema, "minimum": 0 if _takes(cls, name, 0) else 1}


def _takes(cls: type, name: str, value: float) -> bool:
    """Whether the config model takes this: asked, so that no bound is written twice."""
    try:
        resolve_config({name: value}, environ={})
    except ConfigError:
        return False
    return True


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _one_of(*choices: str) -> Schema:
    return {"type": "string", "enum": list(choices)}


def _not_latest() -> Schema:
    return {"type": "string", "not": {"const": "latest"}, "description": "of the image; latest is not taken, because pods would differ"}


if __name__ == "__main__":
    sys.exit(main())
