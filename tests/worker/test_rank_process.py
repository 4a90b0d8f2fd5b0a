"""A rank as the child process that it is, planned for over a real socket."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import zmq

from quire.common.child_process import start_child
from quire.common.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    Chunk,
    RankHello,
    RowAdd,
    SamplingState,
    StepPlan,
    StepResult,
    decode_rank_up,
    encode,
)
from quire.common.model_folder import read_model_folder

START_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 20


class Rank:
    """The scheduler's end of a rank process."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, **changes: Any) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.spec = {
            "group_id": "g", "term": 3, "rank": 0, "tensor_parallel_size": 1, "model_path": str(folder), "device": "cpu",
            "dtype": "float32", "num_gpu_blocks": 64, "num_cpu_blocks": 0, "block_size": 4, "max_model_len": 200, "max_sequences": 8,
            "max_batched_tokens": 128, "scheduler_address": f"tcp://127.0.0.1:{port}", "rank_lease_s": 30.0, "num_threads": 1,
            "log_level": "info", "report_path": "", **changes,
        }  # fmt: skip
        self.name = f"g/{self.spec['rank']}".encode()
        self.process = start_child("quire.worker.rank_process", self.spec)

    def receive(self) -> Any:
        """What it answers; hellos again, which come until it has a plan, are left out."""
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        while isinstance(message := self._receive(ANSWER_TIMEOUT_S), RankHello):
            assert time.monotonic() < deadline_s, "the rank says nothing but hello"
        return message

    def hello(self) -> Any:
        return self._receive(START_TIMEOUT_S)

    def _receive(self, timeout_s: int) -> Any:
        assert self.socket.poll(timeout_s * 1000), "the rank is silent"
        identity, frame = self.socket.recv_multipart()
        assert identity == self.name
        return decode_rank_up(frame)

    def send(self, plan: StepPlan) -> None:
        self.socket.send_multipart([self.name, encode(plan)])

    def step(self, plan: StepPlan) -> StepResult:
        self.send(plan)
        result, ack = self.receive(), self.receive()
        assert isinstance(result, StepResult)
        assert (ack.term, ack.step_id, ack.rank, ack.error) == (plan.term, plan.step_id, 0, "")
        return result

    def wait(self) -> int:
        return self.process.wait(ANSWER_TIMEOUT_S)


StartRank: TypeAlias = Callable[..., Rank]


@pytest.fixture
def start(tiny_folder: Path) -> Iterator[StartRank]:
    """Starts ranks; none outlives the test."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ranks: list[Rank] = []

    @contextmanager
    def closing() -> Iterator[None]:
        yield
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
            rank.socket.close()
        context.term()

    def make(folder: Path = tiny_folder, **changes: Any) -> Rank:
        ranks.append(Rank(context, folder, **changes))
        return ranks[-1]

    with closing():
        yield make


def a_prompt(row: int = 0, count: int = 6, first_block: int = 0) -> dict[str, Any]:
    added = RowAdd(row, tuple(range(5, 5 + count)), count, 0, tuple(range(first_block, first_block + 4)), 0, SamplingState(temperature=0.0))
    return {"add_rows": (added,), "chunks": (Chunk(row, 0, count, True),), "samples": ((row, row),)}


def test_a_rank_says_hello_until_it_has_a_plan(start: StartRank) -> None:
    """The scheduler may not know its group yet, and then heeds no hello."""
    rank = start()
    hellos = [rank.hello() for _ in range(3)]
    assert hellos[0] == hellos[1] == hellos[2]
    assert rank.step(StepPlan(3, 0, **a_prompt())).counts == (1,)
    while rank.socket.poll(1500):
        assert not isinstance(decode_rank_up(rank.socket.recv_multipart()[1]), RankHello)


def test_a_rank_says_hello_obeys_plans_in_order_and_leaves_when_asked(start: StartRank, tiny_folder: Path) -> None:
    started_s = time.monotonic()
    rank = start()
    hello = rank.hello()
    print(f"hello after {time.monotonic() - started_s:.2f} s")
    assert isinstance(hello, RankHello)
    assert (hello.version, hello.group_id, hello.term, hello.rank) == (PROTOCOL_VERSION, "g", 3, 0)
    assert (hello.num_gpu_blocks, hello.num_cpu_blocks, hello.max_rows, hello.layout_version) == (64, 0, 8, LAYOUT_VERSION)
    assert hello.block_bytes == 4 * read_model_folder(tiny_folder).kv_bytes_per_token(dtype="float32", tensor_parallel_size=1)
    assert hello.model_fingerprint == read_model_folder(tiny_folder).fingerprint
    assert (hello.device, hello.pid, hello.h2d_bytes_per_s) == ("cpu", rank.process.pid, 0.0)
    lengths = [length for length, _ in hello.prefill_tokens_per_s]
    assert lengths in ([16], [16, 64]), "the longer one is left out where the time is spent"
    assert all(speed > 0 for _, speed in hello.prefill_tokens_per_s)

    assert rank.step(StepPlan(3, 0)).counts == ()
    first = rank.step(StepPlan(3, 1, **a_prompt()))
    second = rank.step(StepPlan(3, 2))
    assert first.counts == second.counts == (1,)
    rank.send(StepPlan(2, 77))  # of an older term: not obeyed, not answered
    assert rank.step(StepPlan(3, 3, remove_rows=(0,))).counts == ()
    assert rank.step(StepPlan(3, 4)).device_s == 0.0
    assert rank.step(StepPlan(3, 5, **a_prompt(row=7, first_block=60))).token_ids == first.token_ids

    # A higher term begins at step 0 with an empty batch.
    again = rank.step(StepPlan(4, 0, **a_prompt()))
    assert again.token_ids == first.token_ids
    # Two plans may be on their way.
    rank.send(StepPlan(4, 1))
    rank.send(StepPlan(4, 2, remove_rows=(0,)))
    assert [rank.receive().step_id for _ in range(4)] == [1, 1, 2, 2]

    os.kill(rank.process.pid, signal.SIGTERM)
    assert rank.wait() == 0


def test_two_ranks_hold_half_the_heads_each_and_draw_what_one_draws(start: StartRank, tiny_folder: Path, tmp_path: Path) -> None:
    alone = start(num_cpu_blocks=3)
    split = {"num_cpu_blocks": 3, "tensor_parallel_size": 2, "rendezvous_path": str(tmp_path / "meet")}
    ranks = [start(rank=rank, **split) for rank in range(2)]
    hellos = [rank.hello() for rank in (alone, *ranks)]
    assert [(hello.rank, hello.block_bytes) for hello in hellos[1:]] == [(rank, hellos[0].block_bytes // 2) for rank in range(2)]
    lengths = [[length for length, _ in hello.prefill_tokens_per_s] for hello in hellos[1:]]
    assert lengths[0] == lengths[1], "ranks that measure different lengths would wait for each other for ever"

    assert [hello.num_cpu_blocks for hello in hellos] == [3, 3, 3]

    # The first block goes to CPU memory and comes back, each rank's half to and from its own.
    copies: dict[int, dict[str, Any]] = {2: {"swap_out": ((5, 0, 1),)}, 4: {"swap_in": ((6, 0, 1),), "wait_copies": (6,)}}
    plans = [StepPlan(3, 0, **a_prompt(), debug_checksum=True)]
    plans += [StepPlan(3, step, debug_checksum=True, **copies.get(step, {})) for step in range(1, 6)]
    for plan in plans:
        for rank in ranks:
            rank.send(plan)
        expected, result, acks = alone.step(plan), ranks[0].receive(), [rank.receive() for rank in ranks]
        assert result.token_ids == expected.token_ids
        assert [(ack.rank, ack.error) for ack in acks] == [(0, ""), (1, "")]
        assert acks[0].checksum == acks[1].checksum != 0
        assert [ack.copies_done for ack in acks] == [{2: (5,), 4: (6,)}.get(plan.step_id, ())] * 2

    # One that dies takes the other with it, in the middle of a step or before.
    ranks[1].process.kill()
    ranks[0].send(StepPlan(3, len(plans)))
    assert "rank 1 (process" in ranks[0].receive().error
    assert ranks[0].wait() == 1
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "meet"])


def test_a_rank_without_plans_ends_when_its_lease_does(start: StartRank) -> None:
    rank = start(rank_lease_s=0.5)
    rank.hello()
    assert rank.wait() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpu_blocks": 10**10}, "the KV pool needs 10000000000 blocks of 2048 bytes"),
        ({"model_path": "/nowhere"}, "/nowhere is not a folder"),
        ({"num_gpu_blocks": 10**9, "tensor_parallel_size": 2}, "blocks of 1024 bytes on each of 2 ranks"),
        ({"device": "cuda"}, "sees no GPU here; use device cpu"),
    ],
)
def test_a_rank_that_cannot_start_leaves_its_reason(start: StartRank, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    report = tmp_path / "report.json"
    rank = start(report_path=str(report), **changes)
    assert rank.process.wait(START_TIMEOUT_S) == 1
    assert message in json.loads(report.read_text())["error"]
    assert list(tmp_path.iterdir()) == [report]
