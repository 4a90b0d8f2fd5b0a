import random

import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.write_runs import write_runs, write_runs_reference


@pytest.mark.kernel
def test_runs_of_all_lengths_land_where_they_belong_and_nowhere_else() -> None:
    chance = random.Random(0)
    counts = [1, 2, 1023, 1024, 1025, 3000, 7, 1]
    targets, place = [], 0
    for count in counts:
        place += chance.randrange(1, 50)
        targets.append(place)
        place += count
    is_pinned = kernel_device().type == "cuda"
    payload = torch.arange(1, sum(counts) + 1, pin_memory=is_pinned)
    table = [[target, sum(counts[:index]), count] for index, (target, count) in enumerate(zip(targets, counts, strict=True))]
    chance.shuffle(table)
    runs = torch.tensor(table, pin_memory=is_pinned)
    actual, expected = (torch.full((place + 20,), -5, dtype=torch.int64, device=kernel_device()) for _ in range(2))
    write_runs(actual, runs, payload, max_count=max(counts))
    write_runs_reference(expected, runs, payload)
    assert torch.equal(actual, expected)
    assert int((actual == -5).sum()) == place + 20 - sum(counts)
