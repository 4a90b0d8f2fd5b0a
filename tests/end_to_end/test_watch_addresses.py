"""What `quire serve` says of where it can be watched, with more than one gateway."""

import json
import urllib.request
from pathlib import Path

import pytest
from serving import ServeProcess, wait_for

from quire.cluster.controller.gateways import metrics_address


def test_no_gateway_takes_the_controllers_port() -> None:
    assert [metrics_address("127.0.0.1:9400", index) for index in range(3)] == ["127.0.0.1:9400", "127.0.0.1:9402", "127.0.0.1:9403"]
    assert metrics_address("[::1]:0", 2) == "[::1]:0"


@pytest.mark.slow
def test_each_gateway_and_the_controller_have_a_page_that_is_named(tmp_path: Path) -> None:
    pages = ("--metrics-listen", "127.0.0.1:0", "--controller-metrics-listen", "127.0.0.1:0")
    with ServeProcess(tmp_path, "--gateways", "2", *pages) as serve:
        serve.wait_ready()
        metrics = json.loads((tmp_path / "ready.json").read_text())["metrics"]
        assert metrics.keys() == {"gateway 0", "gateway 1", "controller"}
        for address in metrics.values():
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
                assert b"quire_build_info" in response.read()
        wait_for(lambda: "try:" in serve.output, timeout_s=10)
        assert f"watch: http://{metrics['gateway 0']}/ in a browser" in serve.output
        assert serve.process.poll() is None
