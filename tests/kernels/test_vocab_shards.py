"""Draws of ranks that hold a part of the vocabulary each, as processes with interpreted kernels."""

import math
from typing import Any

import pytest
import torch
from draws import FILTERS, inputs_of, logits_of
from peer_ranks import draw_from_shards, run_ranks

from quire.kernels.backend import IS_INTERPRETED
from quire.kernels.sample import sample_reference
from quire.kernels.vocab_shards import MAX_GROUPS, VocabShards, group_tokens, shard_width


@pytest.mark.parametrize("vocab_size", [256, 1000, 4099, 32000, 50257, 128256, 131071, 151936, 262144, 522000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_every_token_and_every_group_belong_to_one_rank(vocab_size: int, num_ranks: int) -> None:
    width, group = shard_width(vocab_size, num_ranks), group_tokens(vocab_size, num_ranks)
    parts = [max(0, min(width, vocab_size - rank * width)) for rank in range(num_ranks)]
    assert sum(parts) == vocab_size
    assert min(parts) > 0
    assert group & (group - 1) == 0
    assert -(-vocab_size // group) <= MAX_GROUPS
    if num_ranks > 1:
        assert width % group == 0
        assert width % 4 == 0
    if vocab_size >= 32000 and num_ranks > 1:
        assert width % 128 == 0
        assert group >= 32
        assert max(parts) <= vocab_size / num_ranks + 128


@pytest.mark.kernel
@pytest.mark.skipif(not IS_INTERPRETED, reason="test_interpreted.py runs it")
@pytest.mark.parametrize(
    ("size", "vocab_size", "num_turns", "dtype"), [(2, 3001, 1, torch.float32), (3, 129, 2, torch.float16), (4, 700, 1, torch.float32)]
)
def test_ranks_draw_from_their_parts_what_the_sort_draws_from_all(size: int, vocab_size: int, num_turns: int, dtype: torch.dtype) -> None:
    options: list[dict[str, float]] = [*FILTERS.values(), {"temperature": 0.0, "top_p": 0.5}, {"top_k": 1500}, {"top_p": 0.3}, {}, {}, {}]
    columns = inputs_of([{**each, "seed": 7 * row - 2**63, "position": row, "sequence_index": 2} for row, each in enumerate(options)])
    columns.rows[-1] = -1
    logits = logits_of(len(options), vocab_size).to(dtype)
    logits[:, ::5] = -math.inf
    logits[10] = (logits[10] * 0.01).masked_fill(logits[10].isinf(), 0.0)  # flat: groups rule out little
    logits[11, vocab_size - 1] = math.nan
    logits[12] = -math.inf
    logits[12, vocab_size - 2] = math.inf
    num_bytes = VocabShards.num_bytes(vocab_size=vocab_size, num_ranks=size, max_rows=len(options), dtype=dtype)
    arguments: tuple[Any, ...] = (logits, columns, dtype, num_turns)
    of_ranks = run_ranks(draw_from_shards, size, *arguments, area_bytes=num_bytes)
    expected = []
    for turn in range(num_turns):
        broken = torch.zeros(len(options), dtype=torch.bool)
        token_ids = sample_reference(logits.roll(turn, 0), columns, purpose=1, broken=broken)
        expected.append((token_ids.tolist(), broken.tolist()))
    assert of_ranks == [expected] * size
    assert sum(expected[0][1]) == 2
