import json
import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gloo_rank
import pytest
import torch
from thread_ranks import run_ranks

from quire.common.errors import Unavailable
from quire.worker import collectives
from quire.worker.collectives import Collective, all_agree, connect
from quire.worker.collectives_cuda import is_for_one_shot
from quire.worker.collectives_shared_memory import SharedMemoryCollective

SLOT_BYTES = 64  # so that tensors of a test take many rounds


def numbers(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 3, 129)])
def test_every_rank_gets_the_same_sum(size: int, shape: tuple[int, ...]) -> None:
    def work(collective: Collective) -> torch.Tensor:
        total = numbers(collective.rank, *shape)
        collective.all_reduce(total)
        return total

    results = run_ranks(size, work, slot_bytes=SLOT_BYTES)
    torch.testing.assert_close(results[0], sum(numbers(rank, *shape) for rank in range(size)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_numbers_are_rounded_once(size: int, dtype: torch.dtype) -> None:
    def work(collective: Collective) -> torch.Tensor:
        total = numbers(collective.rank, 200).to(dtype)
        collective.all_reduce(total)
        return total

    exact = torch.stack([numbers(rank, 200).to(dtype).float() for rank in range(size)]).sum(0).to(dtype)
    assert torch.equal(run_ranks(size, work, slot_bytes=SLOT_BYTES)[0], exact)


@pytest.mark.parametrize("widths", [(4, 4), (1, 40, 7), (3, 0)])
def test_columns_of_any_widths_are_put_side_by_side(widths: tuple[int, ...]) -> None:
    def work(collective: Collective) -> torch.Tensor:
        return collective.gather_columns(numbers(collective.rank, 3, widths[collective.rank]), widths)

    expected = torch.cat([numbers(rank, 3, width) for rank, width in enumerate(widths)], dim=1)
    assert all(torch.equal(result, expected) for result in run_ranks(len(widths), work, slot_bytes=SLOT_BYTES))


def test_many_rounds_in_a_row_never_see_the_numbers_of_another_round() -> None:
    def work(collective: Collective) -> list[float]:
        totals = []
        for step in range(300):
            total = torch.full((3,), float(step * (collective.rank + 1)))
            collective.all_reduce(total)
            totals.append(float(total[0]))
        return totals

    assert run_ranks(3, work) == [[step * 6.0 for step in range(300)]] * 3


def test_ranks_agree_only_if_all_do() -> None:
    assert run_ranks(2, lambda collective: all_agree(collective, True)) == [True, True]
    assert run_ranks(2, lambda collective: all_agree(collective, collective.rank == 0)) == [False, False]
    assert all_agree(None, True)
    assert not all_agree(None, False)


def test_a_rank_that_dies_is_named_to_those_who_wait_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        memory = mmap.mmap(-1, 2 * (64 + 2 * SLOT_BYTES))
        collective = SharedMemoryCollective(memory, rank=0, pids=[os.getpid(), other.pid], timeout_s=60.0, slot_bytes=SLOT_BYTES)
        other.kill()
        with pytest.raises(Unavailable, match=rf"rank 1 \(process {other.pid}\) is gone") as caught:
            collective.all_reduce(torch.ones(1))
        assert caught.value.reason == "RANK_LOST"
        collective.close()


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    memory = mmap.mmap(-1, 2 * (64 + 2 * SLOT_BYTES))
    collective = SharedMemoryCollective(memory, rank=1, pids=[os.getpid()] * 2, timeout_s=0.05, slot_bytes=SLOT_BYTES)
    with pytest.raises(Unavailable, match=r"rank 0 did not come within 0.05 s"):
        collective.all_reduce(torch.ones(1))


def test_ranks_that_meet_at_a_file_share_memory(tmp_path: Path) -> None:
    def work(rank: int) -> float:
        collective = connect(rendezvous_path=tmp_path / "meet", rank=rank, size=2)
        assert isinstance(collective, SharedMemoryCollective)
        total = torch.tensor([rank + 1.0])
        collective.all_reduce(total)
        collective.close()
        return float(total)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [3.0, 3.0]


def test_gloo_gives_the_same_between_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-P", gloo_rank.__file__, str(tmp_path / "meet")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([*command, str(rank), "2"], stdout=subprocess.PIPE, env=environment) for rank in range(2)]
    outputs = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0]["total"] == [[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]]
    assert outputs[0]["short"] == [2.015625] * 3
    assert outputs[0]["gathered"] == [[0.0, 1.0, 1.0]] * 2


def test_ranks_of_different_machines_take_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, float]] = []
    monkeypatch.setattr(collectives, "_memory_domain", lambda: f"kernel {len(taken)}")
    monkeypatch.setattr(collectives, "GlooCollective", lambda store, **sizes: taken.append(sizes))
    store = {"rank/1": json.dumps({"pid": 1, "host": "elsewhere", "machine": "x86_64", "memory_domain": "another kernel"})}

    class Store:
        def set_timeout(self, _: object) -> None: ...

        def set(self, key: str, value: str) -> None:
            store[key] = value

        def get(self, key: str) -> str:
            return store[key]

    monkeypatch.setattr(torch.distributed, "FileStore", lambda *_: Store())
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    connect(rendezvous_path=tmp_path / "meet", rank=0, size=2)
    assert taken == [{"rank": 0, "size": 2, "timeout_s": collectives.WAIT_TIMEOUT_S}]
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(("num_ranks", "most_bytes"), [(3, 1_572_864), (4, 699_050), (8, 199_728)])
def test_more_ranks_turn_to_two_shots_sooner_and_two_never(num_ranks: int, most_bytes: int) -> None:
    assert is_for_one_shot(most_bytes, num_ranks=num_ranks)
    assert not is_for_one_shot(most_bytes + 1, num_ranks=num_ranks)
    assert is_for_one_shot(2**40, num_ranks=2)
