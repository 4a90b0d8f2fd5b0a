import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.prepare_inputs import (
    allocate_step_tokens,
    append_tokens,
    append_tokens_reference,
    prepare_inputs,
    prepare_inputs_reference,
)

pytestmark = pytest.mark.kernel


def test_chunks_decodes_and_padding_are_looked_up() -> None:
    device = kernel_device()
    tokens = torch.randint(0, 99, (6, 300), device=device)
    lengths = torch.tensor([5, 200, 17, 0, 300, 1], device=device)
    block_tables = torch.randint(0, 50, (6, 80), device=device)
    # A chunk of 150 tokens from token 20 of row 1 on, the last token of row 2, padding, the last token of row 0.
    spans = torch.tensor([[1, 20, 150, 0], [2, -1, 1, 150], [-1, 0, 1, 151], [0, -1, 1, 152]], dtype=torch.int32, device=device)
    actual, expected = allocate_step_tokens(154, device), allocate_step_tokens(154, device)
    for step in (actual, expected):
        step.token_ids.fill_(77)
    prepare_inputs(actual, tokens, lengths, block_tables, spans, block_size=4, max_count=150)
    prepare_inputs_reference(expected, tokens, lengths, block_tables, spans, block_size=4)
    assert torch.equal(actual.token_ids, expected.token_ids)
    assert torch.equal(actual.positions, expected.positions)
    assert torch.equal(actual.slot_mapping, expected.slot_mapping)
    assert actual.token_ids[153] == 77, "no span covers it"
    assert actual.slot_mapping[151] == -1
    assert actual.positions[150] == 16


@pytest.mark.parametrize("num_rows", [1, 7, 129])
def test_sampled_tokens_are_appended_to_their_rows(num_rows: int) -> None:
    device = kernel_device()
    tokens = torch.zeros(200, 9, dtype=torch.int64, device=device)
    lengths = torch.randint(0, 8, (200,), device=device)
    rows = torch.randperm(200, device=device)[:num_rows]
    rows[num_rows // 2] = -1
    token_ids = torch.arange(num_rows, device=device) + 1
    expected, expected_lengths = tokens.clone(), lengths.clone()
    append_tokens(tokens, lengths, rows, token_ids)
    append_tokens_reference(expected, expected_lengths, rows, token_ids)
    assert torch.equal(tokens, expected)
    assert torch.equal(lengths, expected_lengths)
