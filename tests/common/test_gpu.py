import pytest

from quire.common.gpu import visible_gpus


@pytest.mark.parametrize(
    ("gpus", "rank", "expected"),
    [
        (["0"], 0, "0"),
        (["0", "1"], 0, "0,1"),
        (["0", "1"], 1, "1,0"),
        (["4", "2", "7"], 2, "7,4,2"),
        (["GPU-a", "MIG-b"], 1, "MIG-b,GPU-a"),
    ],
)
def test_a_rank_sees_its_own_gpu_first_and_then_those_of_its_group(gpus: list[str], rank: int, expected: str) -> None:
    assert visible_gpus(gpus, rank=rank) == expected
