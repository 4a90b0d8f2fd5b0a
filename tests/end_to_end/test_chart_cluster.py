"""A release of the chart with `topology: cluster`, without Kubernetes: KubeRay's `ray start`, the controller's and the gateway's own
command lines, keys, test hook and first request, on a real Ray of a head and workers behind a cable of ours.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import CHART, Rendered, pod_templates, render
from quire_command import quire, start_quire
from serving import wait_for
from two_hosts import READY_TIMEOUT_S, TwoHosts

from quire.client import Client

pytestmark = pytest.mark.slow

MODEL = "quire-tales"
TIMEOUT_S = 90.0
PROMPT = "Once upon a time"


def release(**changes: Any) -> Rendered:
    return render({"topology": "cluster", "security": {"insecure": True, "clusterKeySecretName": "quire-keys"}, **changes})


def ray_flags(group: dict[str, Any]) -> list[str]:
    """What KubeRay makes of rayStartParams."""
    return [f"--{name}={value}" for name, value in group["rayStartParams"].items()]


def plain_environ(container: dict[str, Any]) -> dict[str, str]:
    """The variables whose values the chart itself says, but for those that are about the image."""
    named = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    return {name: value for name, value in named.items() if name.startswith("RAY_")}


class Pods:
    """The release's processes, where a kubelet would start them. Names of Services become addresses."""

    def __init__(self, hosts: TwoHosts, folder: Path, rendered: Rendered) -> None:
        self._hosts = hosts
        self._folder = folder
        self._templates = pod_templates(rendered)
        self._groups = rendered.one("ConfigMap", "-scale")["data"]["groups"]
        self._discovery = ""
        self.address = ""
        keys = quire("key", "new", str(folder / "keys"))
        assert keys.returncode == 0, keys.stderr

    def here(self, words: Sequence[str]) -> list[str]:
        """Arguments of the chart, for this machine, on which other ports are free."""
        replaced = {
            r"/etc/quire/cluster-key": str(self._folder / "keys"),
            r"--ray-address=auto": f"--ray-address={self._hosts.ray_address}",
            r"--discovery-listen=0\.0\.0\.0:\d+": f"--discovery-listen={self._hosts.head_ip}:0",
            r"\$\(POD_IP\):\d+": f"{self._hosts.head_ip}:0",
            r"demo-quire-controller:\d+": self._discovery,
            r"^--listen=0\.0\.0\.0:\d+": f"--listen={self._hosts.worker_ip}:0",
            r"metrics-listen=0\.0\.0\.0:\d+": "metrics-listen=127.0.0.1:0",
            r"demo-quire-gateway\.llm\.svc:\d+": self.address,
        }
        found = list(words)
        for pattern, new in replaced.items():
            found = [re.sub(pattern, new, word) for word in found]
        return found

    def start(self) -> None:
        """The controller beside Ray's head, and a gateway elsewhere."""
        (container,) = [each for each in self._templates["head"]["spec"]["containers"] if each["name"] == "controller"]
        ready = self._start("controller", container, on_worker=False, QUIRE_GROUPS=self._groups)
        self._discovery = json.loads(ready.read_text())["address"]
        (container,) = self._templates["gateway"]["spec"]["containers"]
        ready = self._start("gateway", container, on_worker=True)
        self.address = json.loads(ready.read_text())["address"]

    def hook(self) -> "subprocess.CompletedProcess[str]":
        """What `helm test` runs."""
        (container,) = self._templates["test"]["spec"]["containers"]
        return quire(*self.here(container["args"]))

    def _start(self, name: str, container: dict[str, Any], *, on_worker: bool, **environ: str) -> Path:
        assert container["command"][-1] == "quire"
        ready = self._folder / f"{name}.json"
        command = [sys.executable, "-P", "-m", "quire.cli.main", *self.here(container["args"]), "--ready-file", str(ready)]
        output = self._folder / f"{name}.log"
        process = self._hosts.spawn(self._hosts.on_worker(*command) if on_worker else command, output, self._folder, **environ)
        wait_for(lambda: ready.exists() or process.poll() is not None, timeout_s=READY_TIMEOUT_S)
        assert process.poll() is None, output.read_text()
        return ready


@pytest.mark.timeout(420)
def test_a_release_is_installed_scaled_and_loses_a_node(tmp_path: Path) -> None:
    rendered = release()
    cluster = rendered.one("RayCluster")["spec"]
    (group,) = cluster["workerGroupSpecs"]
    head, worker = cluster["headGroupSpec"], group
    environ = plain_environ(head["template"]["spec"]["containers"][0])
    with TwoHosts(head_flags=ray_flags(head), worker_flags=ray_flags(worker), environ=environ) as hosts:
        # Install, and the first token.
        pods = Pods(hosts, tmp_path, rendered)
        pods.start()
        done = pods.hook()
        assert (done.returncode, done.stderr) == (0, ""), "helm test"
        assert done.stdout.strip(), "one token"
        (first_request,) = re.findall(r"quire (generate --address .+)", rendered.notes)
        done = quire(*shlex.split(re.sub(r"localhost:\d+", pods.address, first_request)))
        assert (done.returncode, done.stderr) == (0, ""), "the command that Helm prints"
        assert len(done.stdout.split()) > 10
        with Client(pods.address) as client:
            expected = client.generate(PROMPT, max_tokens=300, ignore_eos=True, temperature=0).token_ids
            (first,) = client.cluster.groups()
            assert (first.group_id, first.state, len(first.ranks)) == (f"{MODEL}-0", "READY", 1)

            # Scale, as docs/operate.md says: more worker pods, nothing else changes, then `quire scale`.
            (model,) = yaml.safe_load((CHART / "values.yaml").read_text())["models"]
            scaled = release(models=[{**model, "groups": 2}])
            assert pod_templates(scaled) == pod_templates(rendered)
            replicas = scaled.one("RayCluster")["spec"]["workerGroupSpecs"][0]["replicas"]
            assert (worker["replicas"], replicas) == (1, 2)
            with start_quire("scale", f"{MODEL}=2", "--wait", str(TIMEOUT_S), address=pods.address) as scaling:
                assert scaling.stderr is not None
                assert "room for 0 more" in scaling.stderr.readline(), "`helm upgrade` is done, and its pod is not there yet"
                second_node = hosts.start_worker(hosts.ray_address)
                output, errors = scaling.communicate(timeout=2 * TIMEOUT_S)
            assert scaling.returncode == 0, output + errors
            assert [each.state for each in client.cluster.groups()] == ["READY", "READY"]

            # Lose a node under load: what it ran goes on elsewhere, and its group comes back on the next one.
            with client.stream(PROMPT, max_tokens=300, ignore_eos=True, temperature=0) as stream:
                token_ids = list(next(iter(stream)).token_ids)
                second_node.terminate()
                for delta in stream:
                    token_ids += delta.token_ids
            assert tuple(token_ids) == expected
            second_node.wait(TIMEOUT_S)
            hosts.start_worker(hosts.ray_address)
            back = [("READY", 0), ("READY", 1)]
            wait_for(lambda: [(each.state, each.num_restarts) for each in client.cluster.groups()] == back, timeout_s=TIMEOUT_S)
            assert client.generate(PROMPT, max_tokens=300, ignore_eos=True, temperature=0).token_ids == expected
