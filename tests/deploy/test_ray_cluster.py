"""The description of a Ray on bare machines, by the checks of Ray's own launcher."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_rays_launcher_takes_it() -> None:
    config = prepare_config(yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text()))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_no_daemon_of_ray_answers_strangers() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_AUTH_TOKEN_PATH=" in start
