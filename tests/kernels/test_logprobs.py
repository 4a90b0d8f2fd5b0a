import pytest
import torch

from quire.kernels.logprobs import token_logprobs, token_logprobs_reference


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("vocab_size", [1, 7, 129])
@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_log_probabilities_ranks_and_top_tokens_are_those_of_the_reference(num_rows: int, vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 4
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    actual = token_logprobs(logits, token_ids, num_top=num_top)
    expected = token_logprobs_reference(logits, token_ids, num_top=num_top)
    torch.testing.assert_close(actual.logprobs, expected.logprobs)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs)
    assert torch.equal(actual.ranks, expected.ranks)
    assert torch.equal(actual.top_ids, expected.top_ids)
    assert actual.top_ids.shape == (num_rows, min(num_top, vocab_size))


def test_equally_likely_tokens_share_the_best_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]] * 4)
    assert token_logprobs(logits, torch.arange(4), num_top=0).ranks.tolist() == [4, 1, 1, 3]


def test_a_row_gives_the_same_bits_alone_and_in_a_crowd() -> None:
    logits = torch.randn(9, 1003, generator=torch.Generator().manual_seed(1))
    token_ids = torch.arange(9)
    together = token_logprobs(logits, token_ids, num_top=3)
    for row in range(9):
        alone = token_logprobs(logits[row : row + 1].clone(), token_ids[row : row + 1], num_top=3)
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row])
