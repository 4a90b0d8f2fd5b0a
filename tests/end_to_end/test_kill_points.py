"""Ranks that die at every point of their work, under 64 streams on pools so small that swapping never ends."""

import os
import re
from pathlib import Path
from typing import Final

import pytest
from serving import ServeProcess, wait_for
from streams import Streams, are_known, undisturbed

from quire.client import Client

pytestmark = pytest.mark.chaos

NUM_STREAMS: Final = 64
NUM_TOKENS: Final = 40
# Of 16 tokens each: a story takes four, so that a pool holds the ends of four stories, and more than that run at once.
NUM_BLOCKS: Final = 18
TIMEOUT_S: Final = 60.0
FAULTS: Final = Path(__file__).parents[1] / "support" / "rank_faults"
# Which operation of a kind kills: swaps are fewer than steps.
POINTS: Final = (("prefill", 3), ("decode", 10), ("swap_out", 3), ("swap_in", 3))


@pytest.mark.parametrize("arguments", [("--groups", "2"), ("--tensor-parallel-size", "2")], ids=["two groups", "two ranks"])
def test_a_rank_may_die_at_any_point_of_its_work(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    if not are_known(num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS):
        large = tmp_path / "large"
        large.mkdir()
        with ServeProcess(large) as serve:
            undisturbed(serve.wait_ready(), num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
    fault = tmp_path / "fault"
    environ = {"RANK_FAULT_FILE": str(fault), "PYTHONPATH": f"{FAULTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    settings = (*arguments, "--gpu-blocks", str(NUM_BLOCKS), "--preemption", "swap")
    with ServeProcess(tmp_path, *settings, environ=environ) as serve, Client(serve.wait_ready()) as client:
        address = serve.wait_ready()
        # Of a pool that holds all of them: here they would be preempted even without deaths.
        expected = undisturbed(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        for num_deaths, (kind, number) in enumerate(POINTS, start=1):
            fault.write_text(f"{kind} {number}")
            streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            assert streams.wait() == expected, kind
            assert not fault.exists(), f"no rank came to its {kind} number {number}"
            # The pause is not only that of the restart: most streams wait for blocks all the time.
            pauses = f"longest pause {streams.longest_pause_s:.1f} s, of all streams {streams.longest_silence_s:.1f} s"
            print(f"killed in {kind}: {pauses}, {streams.num_preemptions} preemptions")
            wait_for(lambda: all(group.state == "READY" for group in client.cluster.groups()), timeout_s=TIMEOUT_S)
            assert sum(group.num_restarts for group in client.cluster.groups()) == num_deaths
            wait_for(lambda: all(blocks.gpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=TIMEOUT_S)
            wait_for(lambda: all(blocks.cpu_blocks.num_held == 0 for blocks in client.cluster.blocks()), timeout_s=TIMEOUT_S)


def test_ranks_that_drift_apart_end_their_term(tmp_path: Path) -> None:
    """A rank whose table is another one computes with wrong keys from the next step on: the checks, which all tests here turn on, see
    it before that."""
    fault = tmp_path / "fault"
    environ = {"RANK_FAULT_FILE": str(fault), "PYTHONPATH": f"{FAULTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with ServeProcess(tmp_path, "--tensor-parallel-size", "2", environ=environ) as serve, Client(serve.wait_ready()) as client:
        expected = client.generate("Once upon a time", max_tokens=60, ignore_eos=True, temperature=0).token_ids
        fault.write_text("drift 20")
        assert client.generate("Once upon a time", max_tokens=60, ignore_eos=True, temperature=0).token_ids == expected
        assert not fault.exists(), "no rank drifted"
        wait_for(lambda: client.cluster.groups()[0].state == "READY", timeout_s=TIMEOUT_S)
        (group,) = client.cluster.groups()
        assert group.num_restarts == 1
        logs = " ".join(path.read_text(errors="replace") for path in serve.temporary.rglob("*.log"))
        assert re.search(r"the block tables of ranks \d and \d differ after step \d+", logs)
