"""The status page of a live cluster, in a real browser."""

import base64
import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from png_pixels import colours
from serving import ServeProcess

from quire.client import Client

pytestmark = pytest.mark.slow

BROWSER: Final = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000")
PHONE: Final = "--window-size=500,900"  # a window of headless Chromium is not narrower


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's address, of a cluster where one long request runs."""
    folder = tmp_path_factory.mktemp("page")
    settings = ("--gpu-blocks", "160", "--swap-memory", "12Mi", "--metrics-listen", "127.0.0.1:0")
    with ServeProcess(folder, *settings) as serve, Client(serve.wait_ready(), max_retries=0) as client:
        stream = client.stream("Once upon a time", max_tokens=2000, ignore_eos=True)
        started = threading.Event()

        def read() -> None:
            for _ in stream:
                started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(60)
        yield f"http://{json.loads((folder / 'ready.json').read_text())['metrics']['gateway']}/"
        stream.cancel()
        reader.join(60)


def _dom(address: str, *arguments: str) -> str:
    done = subprocess.run([*BROWSER, *arguments, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_the_page_draws_the_pools_of_a_live_cluster(page: str) -> None:
    dom = _dom(page)
    assert '<body data-state="live">' in dom
    assert ">READY</span>" in dom
    held = re.search(r'aria-label="GPU: 160 blocks of 16 tokens, \d+ % held; (\d+) held \(0 shared\), (\d+) cached, (\d+) free"', dom)
    assert held is not None
    assert sum(map(int, held.groups())) == 160
    assert int(held[1]) > 0, "a request runs"
    assert 'aria-label="CPU: ' in dom
    assert dom.count("<canvas") == 2


def test_the_maps_are_drawn_and_not_blank(page: str, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    subprocess.run([*BROWSER, PHONE, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    found = colours(picture)
    for colour in ((0xE4, 0xE0, 0xD6), (0x2F, 0x7F, 0x6D)):  # free and held, as the page's style has them; 12 pixels are its legend
        assert found[colour] > 300, colour


def test_the_page_asks_nobody_else_and_takes_nothing_in(page: str) -> None:
    with urllib.request.urlopen(page, timeout=10) as response:
        html, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert re.findall(r"https?://", html) == []
    assert ".innerHTML" not in html


def test_the_view_has_a_state_for_each_block(page: str) -> None:
    with urllib.request.urlopen(f"{page}status.json", timeout=10) as response:
        view = json.load(response)
    (group,) = view["groups"]
    states = base64.b64decode(group["gpu"]["states"])
    counts = [states.count(state) for state in range(4)]
    assert counts[0] == group["gpu"]["free"]
    assert counts[1] == group["gpu"]["cached"]
    assert counts[2] + counts[3] == group["gpu"]["held"]
    assert counts[3] == group["gpu"]["shared"]
