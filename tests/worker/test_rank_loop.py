"""The main loop of a rank in this process, with the scheduler's end of the socket in a thread."""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import zmq
from plan_driver import MakeRunner

from quire.common.messages import PROTOCOL_VERSION, RankHello, StepAck, StepPlan, decode_rank_up, encode
from quire.worker.rank_loop import RankLoop
from quire.worker.rank_spec import RankSpec

HELLO = RankHello(PROTOCOL_VERSION, "g", 3, 0, 256, 0, 1, 0.0, 0.0, (), 10, "", 1)
TIMEOUT_S = 20

RunRank: TypeAlias = Callable[..., tuple[int, list[Any]]]  # the exit code, and the messages after the hello


@pytest.fixture
def run(make_runner: MakeRunner) -> Iterator[RunRank]:
    """Runs a rank on the frames that it is sent after its hello; its exit code and what it answered."""
    handler = signal.getsignal(signal.SIGTERM)

    def run_rank(*frames: bytes, num_answers: int, rank_lease_s: float = TIMEOUT_S) -> tuple[int, list[Any]]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        answers: list[Any] = []

        def receive() -> None:
            while True:
                assert router.poll(TIMEOUT_S * 1000)
                answer = decode_rank_up(router.recv_multipart()[1])
                if not answers or not isinstance(answer, RankHello):  # until it has a plan, it says hello again
                    break
            answers.append(answer)

        def plan() -> None:
            receive()
            for frame in frames:
                router.send_multipart([b"g/0", frame])
            for _ in range(num_answers):
                receive()

        spec = RankSpec(
            "g", 3, 0, 1, "", "cpu", "float32", 256, 0, 4, 200, 10, 128, f"tcp://127.0.0.1:{port}", rank_lease_s, 1, "info", ""
        )  # fmt: skip
        scheduler = threading.Thread(target=plan)
        scheduler.start()
        code = RankLoop(spec, make_runner()).run(HELLO)
        scheduler.join()
        router.close()
        context.term()
        assert answers[0] == HELLO
        return code, answers[1:]

    yield run_rank
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("frames", "term", "step_id", "error"),
    [
        ([encode(StepPlan(3, 1))], 3, 1, "step 1 came where step 0 was due"),
        ([encode(StepPlan(2, 5)), encode(StepPlan(4, 1))], 4, 1, "step 1 came where step 0 was due"),
        (
            [encode(StepPlan(3, 0, swap_in=((0, 1, 2),)))],
            3,
            0,
            "copy 0 is between block 1 of 256 on the device and block 2 of 0",
        ),
        ([encode(StepPlan(3, 0, remove_rows=(4,)))], 3, 0, "row 4 is not in the batch"),
        ([b"\xc1"], 3, 0, "could not be decoded"),
    ],
)
def test_a_plan_that_cannot_be_obeyed_is_answered_with_its_error_and_ends_the_rank(
    run: RunRank, frames: list[bytes], term: int, step_id: int, error: str
) -> None:
    code, (ack,) = run(*frames, num_answers=1)
    assert code == 1
    assert isinstance(ack, StepAck)
    assert (ack.term, ack.step_id) == (term, step_id)
    assert error in ack.error


def test_a_step_sent_twice_is_done_once(run: RunRank) -> None:
    """A scheduler sends plans again to a rank whose link broke."""
    frames = [encode(StepPlan(3, 0)), encode(StepPlan(3, 0)), encode(StepPlan(3, 1)), encode(StepPlan(3, 0)), encode(StepPlan(3, 3))]
    code, answers = run(*frames, num_answers=5)
    assert code == 1
    assert [answer.step_id for answer in answers] == [0, 0, 1, 1, 3]
    assert "step 3 came where step 2 was due; a plan was lost" in answers[4].error


def test_a_heartbeat_extends_the_lease_and_its_end_ends_the_rank(run: RunRank, caplog: pytest.LogCaptureFixture) -> None:
    code, answers = run(encode(StepPlan(3, 0)), num_answers=2, rank_lease_s=0.2)
    assert code == 1
    assert [answer.step_id for answer in answers] == [0, 0]
    assert "no plan for 0.2 s" in caplog.text
