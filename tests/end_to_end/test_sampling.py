"""What a request may ask beside plain sampling, through real processes: it comes out as transformers has it."""

import asyncio
import random
from pathlib import Path

import pytest

from quire.client import AsyncClient, Client, Generation, TokenLogprobs

MAX_TOKENS = 24
PROMPT = [random.Random(5).randrange(3, 4096) for _ in range(21)]


def reference(folder: Path, prompt: list[int], **options: object) -> list[list[int]]:
    """What transformers generates without drawing, in float32: completions, end token included."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, temperature=None,
                            top_p=None, top_k=None, **options)  # fmt: skip
    return [row[len(prompt) :].tolist() for row in output]


def reference_logprobs(folder: Path, token_ids: list[int]) -> list[list[float]]:
    """The log probabilities of each token of a text but the first, over the vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    rows: list[list[float]] = logits.log_softmax(dim=-1).tolist()
    return rows


def assert_near(entries: tuple[TokenLogprobs, ...], token_ids: list[int], rows: list[list[float]], *, num_top: int) -> None:
    assert [entry.token.token_id for entry in entries] == token_ids
    for entry, token_id, row in zip(entries, token_ids, rows, strict=True):
        assert entry.token.logprob == pytest.approx(row[token_id], abs=1e-4)
        assert entry.token.rank == 1 + sum(other > row[token_id] for other in row)
        best = sorted(row, reverse=True)[:num_top]
        assert [top.logprob for top in entry.top] == pytest.approx(best, abs=1e-4)
        assert [row[top.token_id] for top in entry.top] == pytest.approx(best, abs=1e-4)


def test_each_of_n_sequences_is_the_one_that_its_seed_and_index_draw(tiny: str) -> None:
    """Draws are keyed by (seed, sequence index): the last of k sequences is the k-th of four, alone or in a crowd."""
    with Client(tiny) as client:
        four = client.generate(PROMPT, n=4, seed=11, max_tokens=MAX_TOKENS, temperature=1, ignore_eos=True)
        for count in range(1, 5):
            apart = client.generate(PROMPT, n=count, seed=11, max_tokens=MAX_TOKENS, temperature=1, ignore_eos=True, cache_salt=f"s{count}")
            assert apart.choices[-1].token_ids == four.choices[count - 1].token_ids
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in four.choices}) == 4
    assert four.usage.num_completion_tokens == 4 * MAX_TOKENS

    async def crowd() -> list[Generation]:
        async with AsyncClient(tiny) as client:
            calls = [client.generate(PROMPT, n=4, seed=seed, max_tokens=MAX_TOKENS, temperature=1, ignore_eos=True) for seed in (10, 11)]
            return await asyncio.gather(*calls)

    assert asyncio.run(crowd())[1].choices == four.choices


def test_a_stream_of_n_sequences_is_interleaved(tiny: str) -> None:
    options = {"n": 3, "seed": 3, "max_tokens": MAX_TOKENS, "temperature": 1.0, "ignore_eos": True}
    with Client(tiny) as client:
        deltas = list(client.stream(PROMPT, **options))  # type: ignore[arg-type]  # a mapping of several types
        whole = client.generate(PROMPT, **options)  # type: ignore[arg-type]  # a mapping of several types
    for choice in whole.choices:
        own = [delta for delta in deltas if delta.index == choice.index]
        assert tuple(token_id for delta in own for token_id in delta.token_ids) == choice.token_ids
        assert "".join(delta.text for delta in own) == choice.text
        assert [delta.finish_reason for delta in own if delta.finish_reason] == ["length"]
    first_end = next(place for place, delta in enumerate(deltas) if delta.finish_reason)
    assert {delta.index for delta in deltas[:first_end]} == {0, 1, 2}


def test_the_best_of_several_have_the_highest_log_probabilities(tiny: str) -> None:
    with Client(tiny) as client:
        all_four = client.generate(PROMPT, n=4, seed=11, max_tokens=8, temperature=1, logprobs=0)
        best = client.generate(PROMPT, n=2, best_of=4, seed=11, max_tokens=8, temperature=1)
    ranked = sorted(all_four.choices, key=lambda choice: -(choice.cumulative_logprob or 0.0))
    assert [choice.token_ids for choice in best.choices] == [choice.token_ids for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs == ()


@pytest.mark.parametrize("early_stopping", ["heuristic", "first", "never"])
def test_beams_are_those_of_transformers(tiny: str, tiny_llama: Path, early_stopping: str) -> None:
    theirs = {"heuristic": False, "first": True, "never": "never"}[early_stopping]
    expected = reference(tiny_llama, PROMPT, num_beams=4, num_return_sequences=4, early_stopping=theirs)
    with Client(tiny) as client:
        answer = client.generate(PROMPT, num_beams=4, n=4, max_tokens=MAX_TOKENS, early_stopping=early_stopping)  # type: ignore[arg-type]
    lengths = [len(choice.token_ids) for choice in answer.choices]
    assert [list(choice.token_ids) for choice in answer.choices] == [row[:length] for row, length in zip(expected, lengths, strict=True)]
    logprobs = [choice.cumulative_logprob or 0.0 for choice in answer.choices]
    assert [total / length for total, length in zip(logprobs, lengths, strict=True)] == sorted(
        (total / length for total, length in zip(logprobs, lengths, strict=True)), reverse=True
    )


def test_log_probabilities_are_those_of_transformers(tiny: str, tiny_llama: Path) -> None:
    with Client(tiny) as client:
        answer = client.generate(PROMPT, n=2, seed=4, max_tokens=8, temperature=1, logprobs=5, prompt_logprobs=3)
    for choice in answer.choices:
        rows = reference_logprobs(tiny_llama, [*PROMPT, *choice.token_ids])
        assert_near(answer.prompt_logprobs, PROMPT[1:], rows[: len(PROMPT) - 1], num_top=3)
        assert_near(choice.logprobs, list(choice.token_ids), rows[len(PROMPT) - 1 :], num_top=5)
        assert choice.cumulative_logprob == pytest.approx(sum(entry.token.logprob for entry in choice.logprobs))


def test_a_search_may_ask_for_the_log_probabilities_of_its_prompt(tiny: str, tiny_llama: Path) -> None:
    with Client(tiny) as client:
        answer = client.generate(PROMPT, num_beams=3, n=2, max_tokens=4, prompt_logprobs=2)
    assert len(answer.choices) == 2
    assert_near(answer.prompt_logprobs, PROMPT[1:], reference_logprobs(tiny_llama, PROMPT), num_top=2)


def test_greedy_with_a_repetition_penalty_is_that_of_transformers(tiny: str, tiny_llama: Path) -> None:
    (expected,) = reference(tiny_llama, PROMPT, repetition_penalty=1.3)
    with Client(tiny) as client:
        answer = client.generate(PROMPT, temperature=0, repetition_penalty=1.3, max_tokens=MAX_TOKENS)
        plain = client.generate(PROMPT, temperature=0, max_tokens=MAX_TOKENS)
    assert list(answer.token_ids) == expected != list(plain.token_ids)


def test_rules_of_tokens_and_words_are_kept(built_in: str) -> None:
    with Client(built_in) as client:
        prompt = "Once upon a time there was a"
        plain = client.generate(prompt, temperature=0, max_tokens=4)
        word = plain.text.split()[0]
        barred = client.generate(prompt, temperature=0, max_tokens=4, bad_words=[word])
        assert not barred.text.strip().startswith(word)
        first = plain.token_ids[0]
        assert client.generate(prompt, temperature=0, max_tokens=1, bad_token_ids=[first]).token_ids != (first,)
        assert client.generate(prompt, temperature=0, max_tokens=1, logit_bias={first: -100}).token_ids != (first,)
        assert set(client.generate(prompt, max_tokens=9, allowed_token_ids=[7, 8], priority="high").token_ids) <= {7, 8}
        echoed = client.generate(prompt, temperature=0, max_tokens=4, echo_prompt=True)
        assert echoed.text == prompt + plain.text
        assert client.cluster.groups()[0].gpu_blocks.num_held == 0
