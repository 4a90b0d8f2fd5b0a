"""The command lines in the chart, read by the program's own parser and config: what a values file says is what is in force."""

import argparse
from dataclasses import fields

import pytest
from helm_chart import CHART, Rendered, pod_templates, render, value_sets

from quire.cli import controller, gateway, generate, health, serve
from quire.common.config import ModelConfig, ServeConfig, parse_setting, resolve_config

CASES = value_sets()
COMMANDS = {"controller": controller, "gateway": gateway, "serve": serve}


def parsed(arguments: list[str]) -> ServeConfig:
    """The settings as the command itself reads them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    COMMANDS[arguments[0]].add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    names = {f.name for cls in (ServeConfig, ModelConfig) for f in fields(cls)}
    return resolve_config({name: value for name, value in vars(args).items() if name in names}, environ={})


def command_lines(rendered: Rendered) -> dict[str, ServeConfig]:
    """What runs in a release, by command."""
    containers = [container for template in pod_templates(rendered).values() for container in template["spec"]["containers"]]
    found = [container["args"] for container in containers if "args" in container]
    return {arguments[0]: parsed(arguments) for arguments in found if arguments[0] in COMMANDS}


@pytest.mark.parametrize("name", CASES)
def test_settings_arrive_as_they_were_written(name: str) -> None:
    lines = command_lines(render(CASES[name]))
    assert lines.keys() == ({"controller", "gateway"} if CASES[name].get("topology") == "cluster" else {"serve"})
    planner, edge = lines.get("controller") or lines["serve"], lines.get("gateway") or lines["serve"]
    given = {"drain_timeout_s": 120, "start_timeout_s": 1800} | CASES[name].get("config", {})
    for key, value in given.items():
        assert parse_setting(ServeConfig, key, value, where=name) in (getattr(planner, key), getattr(edge, key)), key
    assert planner.log_level == edge.log_level == given.get("log_level", "info")
    assert planner.start_timeout_s == edge.start_timeout_s == 1800
    assert edge.drain_timeout_s == 120
    for model in CASES[name].get("models", []):
        for key, value in model["config"].items():
            assert getattr(planner.models[0], key) == parse_setting(ModelConfig, key, value, where=name), key
        assert planner.models[0].name == model["name"]


@pytest.mark.parametrize("name", CASES)
def test_numbers_arrive_as_they_were_written(name: str) -> None:
    """A large number in a values file is a float to Helm, and 8e+06 would be no number of tokens."""
    settings = {"drain_timeout_s": 7.5, "max_waiting_tokens": 123456789, "max_waiting_requests": 1000000, "log_level": "warning"}
    rendered = render(CASES[name] | {"config": settings})
    lines = command_lines(rendered)
    planner, edge = lines.get("controller") or lines["serve"], lines.get("gateway") or lines["serve"]
    assert (planner.max_waiting_tokens, planner.max_waiting_requests) == (123456789, 1000000)
    assert edge.drain_timeout_s == 7.5
    ends = 0 if "gateway" in lines else 30
    assert pod_templates(rendered)["gateway"]["spec"]["terminationGracePeriodSeconds"] == 15 + 8 + ends + 10


def test_a_standalone_pod_has_all_groups() -> None:
    config = command_lines(render(CASES["gpu-standalone"]))["serve"]
    assert (config.models[0].groups, config.models[0].model) == (2, "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca")


def test_gateways_find_their_secrets() -> None:
    templates = pod_templates(render(CASES["mutual-tls"]))
    edge = parsed(templates["gateway"]["spec"]["containers"][0]["args"])
    assert (edge.token_file, edge.tls_cert) == ("/etc/quire/tokens/hashes", "/etc/quire/tls/tls.crt")
    assert (edge.tls_key, edge.tls_client_ca) == ("/etc/quire/tls/tls.key", "/etc/quire/tls/ca.crt")
    assert not edge.insecure
    mounts = {mount["mountPath"] for mount in templates["gateway"]["spec"]["containers"][0]["volumeMounts"]}
    assert {"/etc/quire/tokens", "/etc/quire/tls"} <= mounts


def test_parts_of_a_cluster_find_each_other() -> None:
    templates = pod_templates(render(CASES["gpu"]))
    head, edge = templates["head"]["spec"]["containers"][1], templates["gateway"]["spec"]["containers"][0]
    parsers = {}
    for name, container in (("controller", head), ("gateway", edge)):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        COMMANDS[name].add_arguments(parser)
        parsers[name] = parser.parse_args(container["args"][1:])
    assert parsers["controller"].scheduler_listen == "$(POD_IP):50053"
    assert {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} in head["env"]
    assert parsers["controller"].cluster_key == "/etc/quire/cluster-key/cluster_key"
    assert parsers["gateway"].cluster_key == "/etc/quire/cluster-key/client_key"
    service = render(CASES["gpu"]).one("Service", "-controller")
    assert parsers["gateway"].discovery == f"{service['metadata']['name']}:50052"
    (volume,) = [volume for volume in templates["gateway"]["spec"]["volumes"] if volume["name"] == "cluster-key"]
    assert volume["secret"]["items"] == [{"key": "client_key", "path": "client_key"}], "the scheduler's secret is not for gateways"


def test_groups_come_by_the_environment() -> None:
    container = pod_templates(render(CASES["gpu"]))["head"]["spec"]["containers"][1]
    (groups,) = [entry for entry in container["env"] if entry["name"] == "QUIRE_GROUPS"]
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
    container = pod_templates(render(CASES["mutual-tls"]))["gateway"]["spec"]["containers"][0]
    for kind in ("startup", "liveness", "readiness"):
        program, command, *arguments = container[f"{kind}Probe"]["exec"]["command"]
        parser = argparse.ArgumentParser(allow_abbrev=False)
        health.add_arguments(parser)
        args = parser.parse_args(arguments)
        assert (program, command, args.tls_server_name) == ("quire", "health", "demo-quire-gateway.llm.svc")
        assert args.timeout < container[f"{kind}Probe"]["timeoutSeconds"]


def test_the_charts_version_is_the_programs() -> None:
    chart, project = (CHART / "Chart.yaml").read_text(), (CHART.parents[1] / "pyproject.toml").read_text()
    version = next(line.split('"')[1] for line in project.splitlines() if line.startswith("version ="))
    assert f'appVersion: "{version}"' in chart
