"""Token ids that are too many are seen before they are decoded; nothing else is."""

import random

import pytest

from quire.cluster.gateway.wire_scan import MAX_FIELDS, check_num_ids, field_sizes
from quire.common.errors import InvalidRequest
from quire.v1.inference_pb2 import Chat, ChatMessage, DetokenizeRequest, GenerateRequest, SamplingParams, StoppingParams, TokenIds

LIMIT = 2048
GENERATE, STREAM, DETOKENIZE = (f"/quire.v1.InferenceService/{name}" for name in ("Generate", "GenerateStream", "Detokenize"))


def ids(count: int, token_id: int = 7) -> TokenIds:
    return TokenIds(ids=[token_id] * count)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (GENERATE, GenerateRequest(token_ids=ids(1_000_000))),
        (STREAM, GenerateRequest(token_ids=ids(1_000_000, 2**32 - 1), stopping=StoppingParams(max_tokens=3), request_id="x")),
        (GENERATE, GenerateRequest(token_ids=ids(6 * LIMIT))),
        (DETOKENIZE, DetokenizeRequest(token_ids=[7] * 1_000_000)),
    ],
)
def test_far_too_many_ids_are_refused(method: str, request_: GenerateRequest | DetokenizeRequest) -> None:
    with pytest.raises(InvalidRequest, match=r"more than 2048 token ids, in \d+ bytes") as refused:
        check_num_ids(method, request_.SerializeToString(), max_model_len=LIMIT)
    assert refused.value.reason == ("INVALID_REQUEST" if method == DETOKENIZE else "PROMPT_TOO_LONG")


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(token_ids=ids(LIMIT, 2**32 - 1)),  # as many bytes as allowed ids can take
        GenerateRequest(token_ids=ids(1_000_000), truncate_prompt_tokens=5),
        GenerateRequest(text="x" * 1_000_000),
        GenerateRequest(chat=Chat(messages=[ChatMessage(role="user")] * 10_000)),
        GenerateRequest(text="x", sampling=SamplingParams(bad_token_ids=ids(1_000_000))),
        GenerateRequest(),
    ],
)
def test_everything_else_is_left_to_the_validator(request_: GenerateRequest) -> None:
    check_num_ids(GENERATE, request_.SerializeToString(), max_model_len=LIMIT)


def test_nothing_is_refused_while_no_model_is_known() -> None:
    check_num_ids(GENERATE, GenerateRequest(token_ids=ids(1_000_000)).SerializeToString(), max_model_len=0)


def test_ids_that_no_client_of_ours_would_write_cost_no_longer_look() -> None:
    """Each id a field of its own, or the ids in many pieces: the look ends, and the decoder's limits count."""
    unpacked = b"\x10\x07" * 1_000_000  # field 2 of DetokenizeRequest, one by one
    check_num_ids(DETOKENIZE, unpacked, max_model_len=LIMIT)
    assert field_sizes(unpacked) == {2: 0}
    pieces = GenerateRequest(token_ids=ids(1)).SerializeToString() * 1_000_000
    assert sum(field_sizes(pieces).values()) <= MAX_FIELDS * 5
    check_num_ids(GENERATE, pieces, max_model_len=LIMIT)


def test_bytes_that_are_no_message_end_the_look() -> None:
    chance = random.Random(7)
    whole = GenerateRequest(token_ids=ids(3 * LIMIT), request_id="r", text="x").SerializeToString()
    for message in (b"", b"\xff" * 50_000, b"\x0b" + whole, *(chance.randbytes(20_000) for _ in range(200))):
        field_sizes(message)
    for length in range(0, len(whole), 97):
        field_sizes(whole[:length])
