"""What a scheduler that is measured is told: groups, their ranks, and requests like those of a chat service."""

import random
from typing import Final

from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    AttachGroup,
    RankHello,
    SamplingState,
    SequenceStart,
    Submit,
)

MODEL: Final = "bench"
TENANT: Final = "local"
TERM: Final = 1
GATEWAY: Final = b"gateway"
BLOCK_SIZE: Final = 16
MAX_BATCHED_TOKENS: Final = 8192  # the default on a GPU
VOCAB_SIZE: Final = 128_000
# Real requests end at one token at least; it is looked for in every step, and an EchoRank never says it.
STOP_ID: Final = 2
# Nothing expires while it is measured.
TIME_LEFT_S: Final = 86_400.0

_ROOT: Final = cache_root(model=MODEL, adapter="", tenant_scope=TENANT, cache_salt="")
_SAMPLING: Final = SamplingState(stop_ids=(STOP_ID,))


def attach_group(group_id: str, *, max_sequences: int, max_model_len: int, max_batched_tokens: int = MAX_BATCHED_TOKENS) -> AttachGroup:
    """A group of one rank."""
    return AttachGroup(
        version=PROTOCOL_VERSION,
        group_id=group_id,
        term=TERM,
        model=MODEL,
        tensor_parallel_size=1,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        max_batched_tokens=max_batched_tokens,
    )


def rank_hello(group_id: str, *, num_gpu_blocks: int, max_rows: int) -> RankHello:
    """Its rank, without a swap pool."""
    return RankHello(
        version=PROTOCOL_VERSION,
        group_id=group_id,
        term=TERM,
        rank=0,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=0,
        block_bytes=2 << 20,  # 16 tokens of an 8B Llama
        h2d_bytes_per_s=0.0,
        d2h_bytes_per_s=0.0,
        prefill_tokens_per_s=(),
        max_rows=max_rows,
        model_fingerprint=MODEL,
        layout_version=LAYOUT_VERSION,
    )


def submit(number: int, *, num_prompt_tokens: int, max_tokens: int, num_shared_tokens: int = 0) -> Submit:
    """Request `number`: the same one each time, and different from all others behind its first num_shared_tokens tokens."""
    shared = random.Random(-1).choices(range(VOCAB_SIZE), k=num_shared_tokens)
    own = random.Random(number).choices(range(VOCAB_SIZE), k=num_prompt_tokens - num_shared_tokens)
    prompt_ids = (*shared, *own)
    return Submit(
        request_id=f"request-{number}",
        attempt=0,
        tenant=TENANT,
        priority=2,
        model=MODEL,
        adapter="",
        prompt_ids=prompt_ids,
        block_hashes=tuple(hash_full_blocks(_ROOT, prompt_ids, block_size=BLOCK_SIZE)),
        cache_root=_ROOT,
        sequences=(SequenceStart(0),),
        n=1,
        sampling=_SAMPLING,
        max_tokens=max_tokens,
        time_left_s=TIME_LEFT_S,
        age_s=0.0,
    )
