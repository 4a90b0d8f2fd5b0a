"""The command lines in the chart, read by the program's own parser and config: what a values file says is what is in force."""

import argparse
from dataclasses import fields
from typing import Any

import pytest
from helm_chart import CHART, pod_templates, render, value_sets

from quire.cli import generate, health, serve
from quire.common.config import ModelConfig, ServeConfig, parse_setting, resolve_config

CASES = value_sets()
# Of `quire controller` and `quire gateway` alone.
OWN_FLAGS = {
    "controller": {"--ray-address", "--discovery-listen", "--controller-metrics-listen"},
    "gateway": {"--discovery", "--metrics-listen"},
}


def parsed(command: str, arguments: list[str]) -> ServeConfig:
    """The settings as `quire serve` reads them; the flags that it lacks are taken out, and must be there."""
    assert arguments[0] == command
    own = {argument.partition("=")[0] for argument in arguments} & OWN_FLAGS[command]
    assert own == OWN_FLAGS[command]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    args = parser.parse_args([argument for argument in arguments[1:] if argument.partition("=")[0] not in own])
    names = {f.name for cls in (ServeConfig, ModelConfig) for f in fields(cls)}
    return resolve_config({name: value for name, value in vars(args).items() if name in names}, environ={})


def expected(name: str, cls: type, values: dict[str, Any]) -> dict[str, Any]:
    return {key: parse_setting(cls, key, value, where=name) for key, value in values.items()}


@pytest.mark.parametrize("name", CASES)
def test_settings_arrive_as_they_were_written(name: str) -> None:
    rendered = render(CASES[name])
    templates = pod_templates(rendered)
    controller = parsed("controller", templates["head"]["spec"]["containers"][1]["args"])
    gateway = parsed("gateway", templates["gateway"]["spec"]["containers"][0]["args"])
    given = expected(name, ServeConfig, {"drain_timeout_s": 120, "start_timeout_s": 1800} | CASES[name].get("config", {}))
    for key, value in given.items():
        assert value in (getattr(controller, key), getattr(gateway, key)), key
    assert controller.log_level == gateway.log_level == given.get("log_level", "info")
    assert (gateway.drain_timeout_s, controller.start_timeout_s) == (given["drain_timeout_s"], given["start_timeout_s"])
    if "models" in CASES[name]:
        model = CASES[name]["models"][0]
        for key, value in expected(name, ModelConfig, model["config"]).items():
            assert getattr(controller.models[0], key) == value, key
        assert controller.models[0].name == model["name"]


@pytest.mark.parametrize("name", CASES)
def test_numbers_arrive_as_they_were_written(name: str) -> None:
    """A large number in a values file is a float to Helm, and 8e+06 would be no number of tokens."""
    settings = {"drain_timeout_s": 7.5, "max_waiting_tokens": 123456789, "max_waiting_requests": 1000000, "log_level": "warning"}
    templates = pod_templates(render(CASES[name] | {"config": settings}))
    controller = parsed("controller", templates["head"]["spec"]["containers"][1]["args"])
    gateway = parsed("gateway", templates["gateway"]["spec"]["containers"][0]["args"])
    assert (controller.max_waiting_tokens, controller.max_waiting_requests) == (123456789, 1000000)
    assert gateway.drain_timeout_s == 7.5
    assert templates["gateway"]["spec"]["terminationGracePeriodSeconds"] == 15 + 8 + 10


def test_gateways_find_their_secrets() -> None:
    templates = pod_templates(render(CASES["mutual-tls"]))
    gateway = parsed("gateway", templates["gateway"]["spec"]["containers"][0]["args"])
    assert (gateway.token_file, gateway.tls_cert) == ("/etc/quire/tokens/hashes", "/etc/quire/tls/tls.crt")
    assert (gateway.tls_key, gateway.tls_client_ca) == ("/etc/quire/tls/tls.key", "/etc/quire/tls/ca.crt")
    assert not gateway.insecure
    mounts = {mount["mountPath"] for mount in templates["gateway"]["spec"]["containers"][0]["volumeMounts"]}
    assert {"/etc/quire/tokens", "/etc/quire/tls"} <= mounts


def test_groups_come_by_the_environment() -> None:
    controller = pod_templates(render(CASES["gpu"]))["head"]["spec"]["containers"][1]
    (groups,) = [entry for entry in controller["env"] if entry["name"] == "QUIRE_GROUPS"]
    config_map = render(CASES["gpu"]).one("ConfigMap", "-scale")
    assert groups["valueFrom"]["configMapKeyRef"]["name"] == config_map["metadata"]["name"]
    assert resolve_config({}, environ={"QUIRE_GROUPS": config_map["data"]["groups"]}).models[0].groups == 2


@pytest.mark.parametrize("name", [name for name in CASES if name != "autoscaling"])
def test_the_test_hook_calls_the_program_as_it_is(name: str) -> None:
    pod = pod_templates(render(CASES[name]))["test"]["spec"]["containers"][0]
    command, *arguments = pod["args"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    {"generate": generate, "health": health}[command].add_arguments(parser)
    args = parser.parse_args(arguments)
    assert args.address.partition(".")[0] in {item["metadata"]["name"] for item in render(CASES[name]).of_kind("Service")}
    assert command == ("health" if name == "mutual-tls" else "generate")
    assert command == "health" or "--max-tokens=1" in arguments


def test_probes_with_tls_call_the_program_as_it_is() -> None:
    gateway = pod_templates(render(CASES["mutual-tls"]))["gateway"]["spec"]["containers"][0]
    for kind in ("startup", "liveness", "readiness"):
        program, command, *arguments = gateway[f"{kind}Probe"]["exec"]["command"]
        parser = argparse.ArgumentParser(allow_abbrev=False)
        health.add_arguments(parser)
        args = parser.parse_args(arguments)
        assert (program, command, args.tls_server_name) == ("quire", "health", "demo-quire-gateway.llm.svc")
        assert args.timeout < gateway[f"{kind}Probe"]["timeoutSeconds"]


def test_the_charts_version_is_the_programs() -> None:
    chart, project = (CHART / "Chart.yaml").read_text(), (CHART.parents[1] / "pyproject.toml").read_text()
    version = next(line.split('"')[1] for line in project.splitlines() if line.startswith("version ="))
    assert f'appVersion: "{version}"' in chart
