"""Sizes of CUDA graphs: each step finds one that is not much larger, and small models have them for all of their steps."""

import pytest

from quire.worker.graph_sizes import decode_sizes, launch_bound_tokens, max_chunks, mixed_sizes, warmed

# Weights of a layer: Llama 3 8B, Qwen3 0.6B.
LARGE, SMALL = 218_103_808, 15_728_640


def test_a_large_model_computes_longer_than_it_is_launched_and_a_small_one_does_not() -> None:
    assert 1024 < launch_bound_tokens(layer_parameters=LARGE) < 2048
    assert launch_bound_tokens(layer_parameters=SMALL) > 8192
    assert mixed_sizes(8192, launch_bound_tokens=launch_bound_tokens(layer_parameters=SMALL))[-1] == 8192
    assert mixed_sizes(8192, launch_bound_tokens=0)[-1] == 1024


@pytest.mark.parametrize("bound", [0, 1500, 3000, 100_000])
@pytest.mark.parametrize("max_tokens", [16, 100, 1024, 2000, 8192])
def test_a_step_is_padded_by_an_eighth_at_most_where_padding_costs(bound: int, max_tokens: int) -> None:
    sizes = mixed_sizes(max_tokens, launch_bound_tokens=bound)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= max_tokens
    assert all(size % 16 == 0 for size in sizes)
    for num_tokens in range(1024, min(sizes[-1], max_tokens) + 1):
        size = next(size for size in sizes if size >= num_tokens)
        assert size - num_tokens <= num_tokens / 8
    if bound > max_tokens > 1024:
        assert sizes[-1] > max_tokens - max_tokens / 8


def test_every_row_of_a_batch_has_a_size() -> None:
    for max_rows in (1, 3, 256, 1000):
        sizes = decode_sizes(max_rows)
        assert sizes[-1] == max_rows
        assert sizes == sorted(set(sizes))


def test_a_graph_of_prompts_takes_as_many_as_fill_it() -> None:
    assert (max_chunks(16), max_chunks(8192)) == (16, 64)


def test_what_is_compiled_for_a_size_was_compiled_by_one_that_ran() -> None:
    sizes = decode_sizes(256)
    ran = warmed(sizes)
    assert ran == warmed(sizes[::-1])
    assert max(sizes) in ran
    assert {1, 2, 4, 8} <= ran
    assert len(ran) < len(sizes) / 2
    for size in sizes:
        kind = ((size - 1).bit_length(), size % 16 == 0)
        assert any(((other - 1).bit_length(), other % 16 == 0) == kind and other >= size for other in ran)
