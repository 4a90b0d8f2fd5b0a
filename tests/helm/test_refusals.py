"""Values that would not work are refused before anything is installed, in words that say what to do."""

from typing import Any

import pytest
from helm_chart import ChartRefused, render, value_sets

DEMO: dict[str, Any] = {"security": {"insecure": True, "clusterKeySecretName": "quire-keys"}}


def model(**changes: Any) -> dict[str, Any]:
    base = value_sets()["gpu"]["models"][0]
    return DEMO | {"topology": "cluster", "models": [base | changes]}


def workers(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = value_sets()["gpu"]["models"][0]["workers"]
    return base | changes


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing said of security": ({}, "security.insecure=true"),
    "tokens without TLS": ({"security": {"tokens": {"secretName": "tokens"}}}, "security.tls.secretName"),
    "client certificates without TLS": ({"security": {"insecure": True, "tls": {"clientCertificates": True}}}, "there is no TLS without"),
    "a secret in the values": ({"security": {"insecure": True, "tokens": {"value": "s3cret"}}}, "value"),
    "a cluster without keys": ({"topology": "cluster", "security": {"insecure": True}}, "quire key new keys"),
    "a port and the one behind another": (
        DEMO | {"controller": {"schedulerPort": 9400}},
        "the port behind controller.schedulerPort are both 9401",
    ),
    "no such topology": (DEMO | {"topology": "serverless"}, "topology"),
    "a misspelt value": (DEMO | {"gatway": {}}, "gatway"),
    "a misspelt setting": (DEMO | {"config": {"drain_timeout_s": 30, "max_waitng_requests": 3}}, "max_waitng_requests"),
    "a setting of the wrong kind": (DEMO | {"config": {"drain_timeout_s": "soon"}}, "drain_timeout_s"),
    "a drain of no time": (DEMO | {"config": {"drain_timeout_s": 0}}, "drain_timeout_s"),
    "no drain": (DEMO | {"config": {"drain_timeout_s": None}}, "drain_timeout_s"),
    "a setting that the chart decides": (DEMO | {"config": {"drain_timeout_s": 30, "listen": "0.0.0.0:1"}}, "listen"),
    "two models": (DEMO | {"models": model()["models"] * 2}, "models"),
    "no model": (DEMO | {"models": []}, "models"),
    "no groups": (model(groups=0), "groups"),
    "a model from nowhere": (model(uri="s3://bucket/model"), "uri"),
    "a device that the head cannot see": (model(config={"device": "auto"}), "device"),
    "no device": (model(config={"dtype": "bfloat16"}), "device"),
    "a block size that is no power of two": (model(config={"device": "cuda", "block_size": 24}), "block_size"),
    "memory that is none": (model(config={"device": "cuda", "kv_cache_memory": "lots"}), "kv_cache_memory"),
    "GPUs of a group on several hosts": (
        model(config={"device": "cuda", "tensor_parallel_size": 4}, workers=workers(ranksPerHost=2)),
        "has 4 GPUs in pods of workers.ranksPerHost 2, but GPUs of a group must be of one host",
    ),
    "ranks that do not fill pods": (
        model(config={"device": "cuda", "tensor_parallel_size": 3}, workers=workers(ranksPerHost=2)),
        "make tensor_parallel_size a multiple of ranksPerHost",
    ),
    "pods that ranks do not fill": (
        model(config={"device": "cuda", "tensor_parallel_size": 3}, workers=workers(ranksPerHost=4)),
        "some would stay unused",
    ),
    "a hub model that pods may get different files of": (model(uri="hf://org/name"), "hf://org/name@COMMIT"),
    "Redis without an address": (DEMO | {"topology": "cluster", "ray": {"gcsFaultTolerance": {"enabled": True}}}, "give HOST:PORT"),
    "an address without a port": (
        DEMO | {"topology": "cluster", "ray": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis"}}},
        "redisAddress",
    ),
    "fewer gateways than at least": (
        DEMO | {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}},
        "minReplicas 5 is more than maxReplicas 2",
    ),
    "autoscaling by nothing": (
        DEMO | {"gateway": {"autoscaling": {"enabled": True, "targetCalls": 0, "targetWaitingRequests": 0}}},
        "has no target",
    ),
    "one port for two": (DEMO | {"gateway": {"port": 9400}}, "gateway.port and gateway.metricsPort are both 9400"),
    "two ports of the controller": (DEMO | {"controller": {"discoveryPort": 9401}}, "are both 9401"),
    "a port of Ray's workers": (DEMO | {"controller": {"discoveryPort": 10500}}, "10002 to 19999"),
    "a port for root": (DEMO | {"gateway": {"port": 443}}, "port"),
    "an image that changes": (DEMO | {"image": {"tag": "latest"}}, "tag"),
    "a sleep of nothing": (DEMO | {"gateway": {"preStopSeconds": 0}}, "preStopSeconds"),
    "a size that is none": (DEMO | {"head": {"shmSize": "big"}}, "shmSize"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    values, words = CASES[name]
    with pytest.raises(ChartRefused) as refused:
        render(values)
    assert words in str(refused.value)


def test_what_the_refusals_start_from_is_taken() -> None:
    """Else they might be refused for another reason."""
    assert render(DEMO).objects
    assert render(model()).objects
