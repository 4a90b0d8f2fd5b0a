import math
from dataclasses import replace

import pytest
import torch
from draws import FILTERS, inputs_of, logits_of
from paged_cases import kernel_device
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from quire.kernels.sample import (
    SamplingInputs,
    broken_rows,
    filter_min_p,
    filter_top_k_top_p,
    filter_typical_p,
    gumbel_noise,
    gumbel_noise_reference,
    sample,
    sample_reference,
)


@pytest.mark.parametrize("vocab_size", [1, 7, 129, 1000])
@pytest.mark.parametrize("top_k", [0, 1, 5, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.31, 1e-6])
def test_top_k_then_top_p_keep_what_transformers_keeps(vocab_size: int, top_k: int, top_p: float) -> None:
    logits = logits_of(3, vocab_size)
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    inputs = inputs_of([{"top_k": top_k, "top_p": top_p}] * 3)
    assert torch.equal(filter_top_k_top_p(logits, top_k=inputs.top_k, top_p=inputs.top_p), expected)


@pytest.mark.parametrize("vocab_size", [1, 7, 129])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(vocab_size: int, min_p: float) -> None:
    logits = logits_of(3, vocab_size)
    expected = MinPLogitsWarper(min_p)(None, logits)
    assert torch.equal(filter_min_p(logits, min_p=inputs_of([{"min_p": min_p}] * 3).min_p), expected)


@pytest.mark.parametrize("vocab_size", [1, 7, 129, 1000])
@pytest.mark.parametrize("typical_p", [0.999999, 0.9, 0.31, 1e-6])
@pytest.mark.parametrize("top_k", [0, 5])
def test_typical_p_keeps_what_transformers_keeps(vocab_size: int, typical_p: float, top_k: int) -> None:
    logits = logits_of(3, vocab_size)
    if top_k:  # most tokens are forbidden already
        logits = TopKLogitsWarper(top_k)(None, logits)
    expected = TypicalLogitsWarper(typical_p)(None, logits)
    assert torch.equal(filter_typical_p(logits, typical_p=inputs_of([{"typical_p": typical_p}] * 3).typical_p), expected)


def test_typical_p_keeps_the_same_tokens_alone_and_in_a_crowd() -> None:
    logits = logits_of(9, 1003)
    typical_p = torch.tensor([0.2, 1.0, 0.9, 0.5, 0.3, 1.0, 0.99, 0.6, 0.8])
    together = filter_typical_p(logits, typical_p=typical_p)
    for row in range(9):
        assert torch.equal(filter_typical_p(logits[row : row + 1], typical_p=typical_p[row : row + 1])[0], together[row])
    assert torch.equal(together[[1, 5]], logits[[1, 5]])


def test_draws_come_from_the_typical_tokens() -> None:
    logits = logits_of(1, 129).expand(400, 129) / 4
    drawn = sample(logits, inputs_of([{"typical_p": 0.1, "position": i} for i in range(400)]), purpose=0, has_typical=True)
    kept = TypicalLogitsWarper(0.1)(None, logits[:1])[0].isfinite().nonzero()[:, 0]
    assert 1 < len(kept) < 40
    assert set(drawn.tolist()) == set(kept.tolist())


def test_rows_are_filtered_each_by_its_own_settings() -> None:
    logits = logits_of(4, 129)
    rows: list[dict[str, float]] = [{"top_k": 3}, {}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.8}]
    inputs = inputs_of(rows)
    together = filter_top_k_top_p(logits, top_k=inputs.top_k, top_p=inputs.top_p)
    for index, row in enumerate(rows):
        alone = inputs_of([row])
        assert torch.equal(together[index : index + 1], filter_top_k_top_p(logits[index : index + 1], top_k=alone.top_k, top_p=alone.top_p))
    assert torch.equal(together[1], logits[1])


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = logits_of(7, 129)
    inputs = inputs_of([{"temperature": 0.0, "seed": i} for i in range(7)])
    assert torch.equal(sample(logits, inputs, purpose=0), logits.argmax(-1))


@pytest.mark.parametrize("vocab_size", [1, 7, 129, 4096])
def test_noise_is_keyed_by_seed_token_position_sequence_and_purpose(vocab_size: int) -> None:
    seed = 2**63 + 12345
    inputs = inputs_of([{"seed": seed - 2**64, "position": 77, "sequence_index": 3}])
    noise = gumbel_noise(vocab_size, inputs, purpose=1)
    for token_id in {0, vocab_size // 2, vocab_size - 1}:
        expected = gumbel_noise_reference(token_id, seed=seed, position=77, sequence_index=3, purpose=1)
        assert noise[0, token_id] == pytest.approx(float(expected), abs=1e-6)
    if vocab_size > 100:
        for changed in ({"seed": 1}, {"position": 78}, {"sequence_index": 4}):
            other = inputs_of([{"seed": seed - 2**64, "position": 77, "sequence_index": 3, **changed}])
            assert not torch.equal(gumbel_noise(vocab_size, other, purpose=1), noise)
        assert not torch.equal(gumbel_noise(vocab_size, inputs, purpose=0), noise)


def test_the_largest_word_gives_finite_noise() -> None:
    uniform = (torch.tensor(0xFFFFFFFF >> 9).float() + 0.5) * 2.0**-23
    assert uniform < 1
    assert (-(-uniform.log()).log()).isfinite()


def test_a_row_draws_the_same_alone_and_in_a_crowd() -> None:
    rows = [
        {"seed": i, "position": 5 * i, "temperature": 0.7 + 0.1 * (i % 3), "top_k": i % 4 * 10, "top_p": 1 - 0.1 * (i % 2)}
        for i in range(9)
    ]
    rows[4]["temperature"] = 0.0
    logits = logits_of(9, 1003)
    together = sample(logits, inputs_of(rows), purpose=0)
    for index, row in enumerate(rows):
        assert sample(logits[index : index + 1], inputs_of([row]), purpose=0).tolist() == [int(together[index])]
        assert torch.equal(gumbel_noise(1003, inputs_of(rows), purpose=0)[index], gumbel_noise(1003, inputs_of([row]), purpose=0)[0])


def test_draws_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    count = 20_000
    inputs = inputs_of([{"seed": 11, "position": i} for i in range(count)])
    drawn = sample(probabilities.log().expand(count, 5), inputs, purpose=0).bincount(minlength=5) / count
    for share, probability in zip(drawn.tolist(), probabilities.tolist(), strict=True):
        assert abs(share - probability) < 5 * math.sqrt(probability / count)


def test_a_tiny_temperature_neither_overflows_nor_forgets_the_order() -> None:
    logits = logits_of(3, 129) * 100
    inputs = inputs_of([{"temperature": 1e-38, "top_p": 0.9}] * 3)
    assert torch.equal(sample(logits, inputs, purpose=0), logits.argmax(-1))


def test_broken_rows_are_those_with_nan_with_infinity_or_without_anything_finite() -> None:
    logits = torch.zeros(5, 7)
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    logits[3, 0] = float("inf")
    logits[4, :6] = float("-inf")
    assert broken_rows(logits).tolist() == [False, True, True, True, False]


def test_a_broken_row_does_not_change_the_others() -> None:
    logits = logits_of(3, 129)
    rows: list[dict[str, float]] = [{"seed": 1, "top_p": 0.9}, {"seed": 2, "top_k": 5, "min_p": 0.1}, {"seed": 3}]
    whole = sample(logits, inputs_of(rows), purpose=0)
    logits[1, 64] = float("nan")
    assert sample(logits, inputs_of(rows), purpose=0)[[0, 2]].tolist() == whole[[0, 2]].tolist()


def on_kernel_device(inputs: SamplingInputs) -> SamplingInputs:
    return SamplingInputs(*(getattr(inputs, name).to(kernel_device()) for name in SamplingInputs.__slots__))


@pytest.mark.kernel
@pytest.mark.parametrize("vocab_size", [1, 7, 129, 3001])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_drawing_without_a_sort_takes_the_token_that_the_sort_takes(vocab_size: int, spread: float) -> None:
    rows = [
        {**options, "seed": 7 * index - 2**63, "position": index, "sequence_index": 2} for index, options in enumerate(FILTERS.values())
    ]
    rows.append({"temperature": 0.0, "top_p": 0.5})
    inputs = on_kernel_device(inputs_of(rows))
    logits = (logits_of(len(rows), vocab_size) * spread).to(kernel_device())
    logits[:, ::5] = -math.inf if vocab_size > 1 else 0.0
    assert sample(logits, inputs, purpose=1).tolist() == sample_reference(logits, inputs, purpose=1).tolist()


@pytest.mark.kernel
@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.3}, {"min_p": 0.9}, {"top_k": 90}, {"top_k": 1500}, {"top_p": 0.5, "min_p": 0.8}, {"top_k": 1500, "top_p": 0.2}],
    ids=str,
)
def test_flat_rows_whose_groups_rule_out_little_draw_as_the_sort_does(options: dict[str, float]) -> None:
    inputs = on_kernel_device(inputs_of([{**options, "seed": index, "position": index} for index in range(6)]))
    logits = (logits_of(6, 5001) * 0.05).to(kernel_device())
    logits[0] = 1.0
    logits[1, 7:] = -math.inf  # fewer tokens than a group has
    logits[2, 9:] = torch.finfo(torch.float32).min  # what some masks use for -inf
    assert sample(logits, inputs, purpose=0).tolist() == sample_reference(logits, inputs, purpose=0).tolist()


@pytest.mark.kernel
def test_ties_are_kept_and_dropped_as_the_sort_does() -> None:
    rows = [{**options, "seed": index} for index, options in enumerate(list(FILTERS.values()) * 2)]
    inputs = on_kernel_device(inputs_of(rows))
    logits = (logits_of(len(rows), 129) / 4).round().to(kernel_device())
    assert sample(logits, inputs, purpose=0).tolist() == sample_reference(logits, inputs, purpose=0).tolist()


@pytest.mark.kernel
def test_broken_rows_are_told_on_the_way_and_change_no_other() -> None:
    inputs = on_kernel_device(inputs_of([{"seed": index, **FILTERS["all"]} for index in range(5)]))
    logits = logits_of(5, 129).to(kernel_device())
    whole = sample(logits, inputs, purpose=0)
    logits[1, 3], logits[2], logits[3, 0] = math.nan, -math.inf, math.inf
    broken = torch.zeros(5, dtype=torch.bool, device=kernel_device())
    token_ids = sample(logits, inputs, purpose=0, broken=broken)
    assert broken.tolist() == [False, True, True, True, False]
    assert token_ids[[0, 4]].tolist() == whole[[0, 4]].tolist()
    assert token_ids[1:4].tolist() == [0, 0, 0]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_read_their_own_place_and_padding_draws_nothing(dtype: torch.dtype) -> None:
    columns = inputs_of([{**options, "seed": index, "position": index} for index, options in enumerate(FILTERS.values())])
    places = [5, -1, 2, 2, 7, -1, 0]
    logits = logits_of(len(places), 129).to(dtype)
    logits[1], logits[4, 7] = math.nan, math.nan
    expected = [
        0 if place in (-1, 7) else int(sample_reference(logits[row : row + 1], replace(columns, rows=torch.tensor([place])), purpose=0))
        for row, place in enumerate(places)
    ]
    inputs = on_kernel_device(replace(columns, rows=torch.tensor(places)))
    token_ids = torch.full((7,), -5, device=kernel_device())
    broken = torch.ones(7, dtype=torch.bool, device=kernel_device())
    assert sample(logits.to(kernel_device()), inputs, purpose=0, token_ids=token_ids, broken=broken) is token_ids
    assert token_ids.tolist() == expected
    assert broken.tolist() == [False, False, False, False, True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_captured_graph_draws_for_whatever_rows_come(dtype: torch.dtype) -> None:
    """Capturing fails on anything that waits for the device."""
    inputs = inputs_of([{**options, "seed": index, "position": index} for index, options in enumerate(FILTERS.values())])
    logits = logits_of(4, 32000).to(dtype)
    on_device, static = on_kernel_device(inputs_of([{}] * len(FILTERS))), logits.cuda()
    token_ids = torch.empty(4, dtype=torch.int64, device="cuda")
    broken = torch.empty(4, dtype=torch.bool, device="cuda")
    on_device = replace(on_device, rows=on_device.rows[:4].clone())
    sample(static, on_device, purpose=0, token_ids=token_ids, broken=broken)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(static, on_device, purpose=0, token_ids=token_ids, broken=broken)
    for name in SamplingInputs.__slots__[1:]:
        getattr(on_device, name).copy_(getattr(inputs, name))
    for places in ([0, 1, 2, 3], [7, -1, 4, 6], [5, 5, 3, -1]):
        on_device.rows.copy_(torch.tensor(places))
        graph.replay()
        expected = sample_reference(static, on_device, purpose=0)
        assert token_ids.tolist() == expected.tolist()
        assert not broken.any()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [32000, 128256, 151936])
def test_large_vocabularies_draw_as_the_cpu_does(vocab_size: int) -> None:
    rows = [{**options, "seed": index, "position": index} for index, options in enumerate(list(FILTERS.values()) * 8)]
    logits = logits_of(len(rows), vocab_size)
    expected = sample_reference(logits, inputs_of(rows), purpose=0)
    actual = sample(logits.cuda(), on_kernel_device(inputs_of(rows)), purpose=0).cpu()
    assert int((actual != expected).sum()) <= 1  # two scores closer than the rounding of their logarithms
