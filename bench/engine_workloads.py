"""The requests that `quire bench engine` runs: the same ones each time, made from seeds.

Lengths and seeds are those by which other systems were measured; change none of them.
"""

import csv
import importlib.resources
import random
from collections.abc import Sequence
from typing import Final

from quire.common.errors import ConfigError

# Prompts' token ids and the number of tokens to generate.
Request = tuple[tuple[int, ...], int]
Case = tuple[int, int]  # (requests, prompt tokens of each)

# Both lengths of a request of mixed256 are drawn evenly from this range.
MIXED_TOKENS: Final = (100, 1024)
NUM_MIXED: Final = 256
# The trace holds some prompts that are longer than models of its time took.
MAX_AZURE_PROMPT: Final = 8000
NUM_AZURE: Final = 400
# Ids at both ends of a vocabulary are often special.
NUM_SPARED_IDS: Final = 10


def mixed256(vocab_size: int) -> list[Request]:
    """256 requests of 100 to 1024 prompt tokens and as many to generate."""
    rng = random.Random(0)
    prompts = [rng.randint(*MIXED_TOKENS) for _ in range(NUM_MIXED)]
    outputs = [rng.randint(*MIXED_TOKENS) for _ in range(NUM_MIXED)]
    return [(_token_ids(rng, length, vocab_size), count) for length, count in zip(prompts, outputs, strict=True)]


def azure_conv400(vocab_size: int) -> list[Request]:
    """The first 400 requests of the Azure LLM inference trace 2023, conversation; when they arrived is not asked."""
    rng = random.Random(1)
    trace = importlib.resources.files("quire.bench") / "data" / "azure_conv_head.csv"
    with trace.open(encoding="utf-8") as file:
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    assert len(lengths) == NUM_AZURE, len(lengths)
    return [(_token_ids(rng, min(length, MAX_AZURE_PROMPT), vocab_size), max(1, count)) for length, count in lengths]


def fixed(case: Case, *, num_tokens: int, vocab_size: int) -> list[Request]:
    """Equally long requests with different prompts."""
    rng = random.Random(2)
    return [(_token_ids(rng, case[1], vocab_size), num_tokens) for _ in range(case[0])]


def fit(requests: Sequence[Request], *, max_request_tokens: int) -> tuple[list[Request], int]:
    """The requests as a model takes them, and how many were shortened for it.

    Raises:
        ConfigError: nothing can be generated within max_request_tokens.
    """
    if max_request_tokens < 2:
        raise ConfigError(f"requests may have {max_request_tokens} tokens, which is no prompt with a token behind it; give more gpu_blocks")
    fitted = []
    for prompt, count in requests:
        if len(prompt) + count > max_request_tokens:
            kept = min(len(prompt), max(1, max_request_tokens // 2, max_request_tokens - count))
            fitted.append((prompt[:kept], min(count, max_request_tokens - kept)))
        else:
            fitted.append((prompt, count))
    return fitted, sum(request != given for request, given in zip(fitted, requests, strict=True))


def _token_ids(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(NUM_SPARED_IDS, vocab_size - NUM_SPARED_IDS) for _ in range(length))
