"""`quire top`: the view as lines, and the command in its own process."""

import dataclasses
import os
import pty
import select
import signal
import subprocess
import time

import pytest
from fake_inference_server import FakeServer
from quire_command import QUIRE, environment, quire

from quire.cli.block_map import ASCII_CHARACTERS, CHARACTERS, block_map
from quire.cli.top import View, render
from quire.client import BlockPool, Group, GroupBlocks, Queue

GPU = BlockPool(num_blocks=6, num_free=2, num_cached=1, num_held=3, num_shared=1, block_size=16, block_bytes=1024)
CPU = BlockPool(num_blocks=2, num_free=1, num_cached=0, num_held=1, num_shared=0, block_size=16, block_bytes=1024)
GROUP = Group("g0", "m", "READY", 1, 1, 0, "", (), 3, 1, GPU, CPU, num_steps=100)
QUEUE = Queue(2, 50, 4096, 8_000_000, 1.25, 3, {"LOW": 1, "HIGH": 1})
VIEW = View("127.0.0.1:1", 10.0, (GROUP,), QUEUE, (GroupBlocks("g0", GPU, CPU, b"", bytes([0, 1, 2, 3, 2, 0]), bytes([2, 0])),))


def test_each_block_is_a_character_in_the_order_of_ids() -> None:
    assert block_map(bytes([0, 1, 2, 3]), width=3, max_lines=2) == ["·░▓", "█"]
    assert block_map(b"", width=3, max_lines=2) == []


def test_a_place_shows_what_most_of_its_blocks_are_and_the_busier_of_two() -> None:
    states = bytes([0, 0, 2, 0, 1, 1, 3, 3])
    assert block_map(states, width=2, max_lines=1, characters=ASCII_CHARACTERS) == [".#"]


@pytest.mark.parametrize("num_blocks", [1, 79, 80, 81, 640, 641, 100_000])
def test_a_map_keeps_within_its_bounds(num_blocks: int) -> None:
    lines = block_map(bytes(num_blocks), width=80, max_lines=8)
    assert 1 <= len(lines) <= 8
    assert max(map(len, lines)) <= 80


def test_a_view_tells_of_the_queue_the_groups_and_their_blocks() -> None:
    text = "\n".join(render(VIEW, None, width=120))
    assert "3 running, 2 of 4096 waiting (1 low, 1 high; the oldest for 1.2 s)" in text
    assert "g0  READY  - steps/s, 3 sequences, 1 swapped out" in text
    assert "6 blocks: 3 held (1 shared), 1 cached, 2 free; 50% in use\n  ·░▓█▓·" in text
    assert "2 blocks: 1 swapped, 0 cached, 1 free; 50% in use\n  ▓·" in text


def test_the_step_rate_comes_from_two_views_of_one_term() -> None:
    later = dataclasses.replace(VIEW, now_s=12.0, groups=(dataclasses.replace(GROUP, num_steps=150),))
    assert "25 steps/s" in "\n".join(render(later, VIEW, width=120))
    new_term = dataclasses.replace(later, groups=(dataclasses.replace(GROUP, num_steps=150, term=2),))
    assert "- steps/s" in "\n".join(render(new_term, VIEW, width=120))


@pytest.mark.parametrize("width", [20, 40, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, render(VIEW, None, width=width))) <= width


def test_once_prints_one_view_and_ends(server: FakeServer) -> None:
    done = quire("top", "--once", "--ascii", address=server.address)
    assert done.returncode == 0, done.stderr
    assert "group-0" in done.stdout
    assert "\x1b" not in done.stdout


def test_characters_that_a_terminal_lacks_are_not_used() -> None:
    assert len(CHARACTERS) == len(ASCII_CHARACTERS) == 4
    assert ASCII_CHARACTERS.isascii()


def test_a_cluster_that_is_not_there_is_said_in_one_line() -> None:
    done = quire("top", "--once", address="127.0.0.1:1", timeout_s=60)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_in_a_terminal_it_draws_again_and_again_until_ctrl_c(server: FakeServer) -> None:
    terminal, inner = pty.openpty()
    command = [*QUIRE, "top", "--every", "0.1"]
    process = subprocess.Popen(
        command,
        stdin=inner,
        stdout=inner,
        env=environment(server.address, {"TERM": "xterm"}),
        cwd="/",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inner)
    shown = b""
    try:
        deadline_s = time.monotonic() + 30
        while shown.count(b"group-0") < 3 and time.monotonic() < deadline_s:
            if select.select([terminal], [], [], 1.0)[0]:
                shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        if select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert shown.count(b"group-0") >= 3
    assert shown.count(b"\x1b[H") >= 3, "each view goes over the one before"
    assert shown.rstrip().endswith(b"\x1b[?25h"), "the cursor is back"
