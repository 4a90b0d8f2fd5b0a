"""A standalone pod of the chart, without Kubernetes: its own command line, probes, test hook and end, on files of ours."""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helm_chart import pod_templates, render, value_sets
from quire_command import QUIRE, environment, quire
from serving import ServeProcess, wait_for

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
TEMPLATES = pod_templates(render(value_sets()["secure"]))
SERVER = TEMPLATES["gateway"]["spec"]["containers"][0]


class Pod:
    """What a kubelet would do with the pod. Its Secrets are in a folder of the test, and its ports are this machine's."""

    def __init__(self, folder: Path) -> None:
        self._secrets = folder / "secrets"
        self._make_secrets()
        self.address = ""  # once it serves
        self.serve = ServeProcess(folder, *self.here(SERVER["args"][1:]))

    def here(self, words: Sequence[str]) -> list[str]:
        """Arguments of the chart, for this machine."""
        host = f"localhost:{self.address.rpartition(':')[2]}"
        found = [word.replace("/etc/quire", str(self._secrets)) for word in words]
        found = [word if "metrics-listen=" not in word else f"{word.partition('=')[0]}=127.0.0.1:0" for word in found]
        found = [word if not word.startswith("--address=") else f"--address={host}" for word in found]
        return [word if not word.startswith("--tls-server-name=") else "--tls-server-name=localhost" for word in found]

    def probe(self, kind: str) -> int:
        """The exit code of a probe of the chart."""
        program, *words = SERVER[f"{kind}Probe"]["exec"]["command"]
        assert program == "quire"
        return quire(*self.here(words)).returncode

    def _make_secrets(self) -> None:
        made = quire("token", "new", "--tenant", "acme")
        contents: dict[str, str] = {
            "tokens/tokens": made.stderr,
            "client/token": made.stdout,
            "tls/tls.crt": (SUPPORT / "localhost_certificate.pem").read_text(),
            "tls/tls.key": (SUPPORT / "localhost_key.pem").read_text(),
            "tls/ca.crt": (SUPPORT / "localhost_certificate.pem").read_text(),
        }
        for name, text in contents.items():
            path = self._secrets / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path)
    with pod.serve:
        pod.address = pod.serve.wait_ready()
        yield pod


def test_a_pod_is_probed_tested_and_drained(pod: Pod) -> None:
    assert [pod.probe(kind) for kind in ("startup", "liveness", "readiness")] == [0, 0, 0]

    hook: dict[str, Any] = TEMPLATES["test"]["spec"]["containers"][0]
    done = quire(*pod.here(hook["args"]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip(), "one token"

    without_token = [word for word in pod.here(hook["args"]) if not word.startswith("--api-key-file")]
    assert quire(*without_token).returncode == 1

    stream = [word.replace("--max-tokens=1", "--max-tokens=800") for word in pod.here(hook["args"])]
    with subprocess.Popen([*QUIRE, *stream, "--ignore-eos"], stdout=subprocess.PIPE, text=True, env=environment(), cwd="/") as client:
        assert client.stdout is not None
        text = client.stdout.read(8)
        pod.serve.process.send_signal(signal.SIGTERM)
        wait_for(lambda: pod.probe("readiness") == 1, timeout_s=20)
        assert pod.probe("liveness") == 0, "a drain is no reason for a new process"
        text += client.stdout.read()
        assert client.wait(60) == 0
    assert len(text) > 800, "the stream went on to its end"
    assert pod.serve.wait_end() == 0
    pod.serve.wait_gone(timeout_s=10)
