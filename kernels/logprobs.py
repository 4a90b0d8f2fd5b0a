"""Log probabilities of chosen tokens, their ranks, and the most likely tokens beside them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token per row."""

    logprobs: Tensor  # [num_rows] float32
    ranks: Tensor  # [num_rows] int64; 1 + the number of tokens that are more likely
    top_ids: Tensor  # [num_rows, num_top] int64, most likely first
    top_logprobs: Tensor  # [num_rows, num_top] float32


def token_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> TokenLogprobs:
    """Log probabilities under the softmax of each row of logits.

    logits:    [num_rows, vocab_size] float32
    token_ids: [num_rows] int64
    num_top:   of most likely tokens; no more than the vocabulary has come back
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    top_logprobs, top_ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return TokenLogprobs(chosen[:, 0], (logprobs > chosen).sum(dim=-1) + 1, top_ids, top_logprobs)


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, *, num_top: int) -> TokenLogprobs:
    """The same, row by row, by sorting; its logarithms are of float64."""
    rows = []
    for row, token_id in zip(logits.double(), token_ids.tolist(), strict=True):
        logprobs = row - row.exp().sum().log()
        order = sorted(range(len(row)), key=lambda i, row=row: (-float(row[i]), i))[:num_top]  # type: ignore[misc]
        rank = 1 + sum(float(other) > float(row[token_id]) for other in row)
        rows.append((logprobs[token_id], torch.tensor(rank), torch.tensor(order, dtype=torch.int64), logprobs[order]))
    logprobs, ranks, top_ids, top_logprobs = (torch.stack(column) for column in zip(*rows, strict=True))
    return TokenLogprobs(logprobs.float(), ranks, top_ids, top_logprobs.float())
