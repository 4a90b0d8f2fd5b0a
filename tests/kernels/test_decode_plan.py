import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.attention_tiles import DecodeTile
from quire.kernels.decode_plan import DecodePlan, allocate_decode_plan, plan_decode, plan_decode_reference

pytestmark = pytest.mark.kernel

BATCHES = {
    "one token": [1],
    "one row": [700],
    "alike": [300] * 7,
    "one long among short": [5000, 3, 70, 129, 1],
    "more rows than slots": [100, 900] * 20,
}


def empty_plan(num_rows: int, sliding_window: int | None) -> DecodePlan:
    return allocate_decode_plan(
        num_rows=num_rows,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        dtype=torch.float32,
        device=kernel_device(),
        sliding_window=sliding_window,
        tile=DecodeTile(num_keys=16, num_warps=4, num_stages=2, pieces_per_multiprocessor=4, min_piece_tokens=64),
    )


@pytest.mark.parametrize("sliding_window", [None, 256])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_the_plan_equals_the_reference_and_covers_every_token_once(lengths: list[int], sliding_window: int | None) -> None:
    device = kernel_device()
    num_rows = len(lengths) + 1
    rows = torch.tensor([*reversed(range(len(lengths))), -1], device=device)  # the last one is padding
    plan, expected = empty_plan(num_rows, sliding_window), empty_plan(num_rows, sliding_window)
    plan_decode(plan, torch.tensor(lengths, device=device), rows)
    plan_decode_reference(expected, torch.tensor(lengths), rows)
    num_pieces = int(expected.first_pieces[-1])
    assert torch.equal(plan.first_pieces, expected.first_pieces)
    assert torch.equal(plan.split_rows, expected.split_rows)
    assert torch.equal(plan.pieces[:num_pieces], expected.pieces[:num_pieces])
    assert (plan.pieces[num_pieces:, 0] == -1).all()
    for index, row in enumerate(rows.tolist()):
        pieces = plan.pieces[plan.first_pieces[index] : plan.first_pieces[index + 1]].tolist()
        length = lengths[row] if row >= 0 else 0
        seen = 0 if sliding_window is None else max(0, length - sliding_window)
        assert [piece[0] for piece in pieces] == [index] * len(pieces)
        assert [piece[2] for piece in pieces] == [seen, *(piece[3] for piece in pieces[:-1])]
        assert pieces[-1][3] == length


def test_no_piece_is_longer_than_its_share() -> None:
    plan = empty_plan(5, None)
    lengths = torch.tensor(BATCHES["one long among short"], device=kernel_device())
    plan_decode(plan, lengths, torch.arange(5, device=lengths.device))
    share = -(-int(lengths.sum()) // plan.num_slots)
    longest = int((plan.pieces[:, 3] - plan.pieces[:, 2]).max())
    assert longest <= max(share + 63, plan.tile.min_piece_tokens)
