"""The compose file: its commands are the program's, its files are there, and nobody else on the network reaches it."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.cli import health, serve
from quire.cluster.controller.local_cluster import STOP_TIMEOUT_S
from quire.common.config import ServeConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CUDA: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())


def test_the_command_is_one_that_the_program_reads() -> None:
    program, command, *arguments = COMPOSE["services"]["quire"]["command"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    args = parser.parse_args(arguments)
    assert (program, command, args.listen, args.insecure) == ("quire", "serve", "0.0.0.0:50051", True)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    health.add_arguments(parser)
    kind, program, command, *arguments = COMPOSE["services"]["quire"]["healthcheck"]["test"]
    assert (kind, program, command) == ("CMD", "quire", "health")
    assert parser.parse_args(arguments).timeout < 5


def test_streams_get_their_time_when_it_stops() -> None:
    grace_s = int(COMPOSE["services"]["quire"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > ServeConfig().drain_timeout_s + STOP_TIMEOUT_S


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_ports_are_this_machines_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["services"][name]["ports"])
    assert ":latest" not in COMPOSE["services"][name]["image"]


def test_folders_that_are_mounted_are_there() -> None:
    mounts = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    own = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(own) == 5
    assert all((DEPLOY / path).exists() for path in own)
    (tmpfs,) = COMPOSE["services"]["quire"]["tmpfs"]
    assert "exec" in tmpfs.partition(":")[2].split(","), "Docker's tmpfs runs nothing otherwise, and Triton's modules lie there"
    named = {mount.split(":")[0] for mount in mounts if not mount.startswith(".")}
    assert named == COMPOSE["volumes"].keys()


def test_prometheus_asks_where_metrics_are() -> None:
    arguments = dict(argument.removeprefix("--").partition("=")[::2] for argument in COMPOSE["services"]["quire"]["command"])
    config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"][0] for job in config["scrape_configs"]}
    assert targets["quire-gateway"] == arguments["metrics-listen"].replace("0.0.0.0", "quire")
    assert targets["quire-controller"] == arguments["controller-metrics-listen"].replace("0.0.0.0", "quire")
    rules = [path for path in config["rule_files"] if path.startswith("rules/")]
    assert all((DEPLOY / "prometheus" / path.removeprefix("rules/")).exists() for path in rules)
    assert len(rules) == 2
    source = yaml.safe_load((DEPLOY / "compose" / "grafana" / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_the_cuda_file_changes_only_what_a_gpu_needs() -> None:
    assert CUDA.keys() == {"services"}
    assert CUDA["services"].keys() == {"quire"}
    assert CUDA["services"]["quire"].keys() == {"image", "build", "shm_size", "deploy"}
