"""The keyword arguments of `generate`, `stream`, `chat` and `chat_stream`, written once.

An option that is left out, or None, is not sent: the model's or the server's default then holds. Each option bears the
name of its field in proto/quire/v1/inference.proto, where its range and default are told; `wire.py` finds the field by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

# One turn of a conversation: (role, content), or a mapping with role, content, name, tool_call_id, tool_calls.
Message = Mapping[str, Any] | tuple[str, str]


class RequestOptions(TypedDict, total=False):
    """What every generation takes."""

    model: str | None
    adapter: str | None

    # How the next token is drawn.
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None

    # When a sequence ends.
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_string: bool | None

    # What comes back.
    n: int | None
    best_of: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    echo_prompt: bool | None
    skip_special_tokens: bool | None

    # Beam search instead of sampling.
    num_beams: int | None
    length_penalty: float | None
    early_stopping: Literal["heuristic", "first", "never"] | None

    # The form of the completion: at most one of these. A schema is JSON text or a mapping.
    json: bool | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None

    # How the request is treated.
    truncate_prompt_tokens: int | None
    priority: Literal["low", "normal", "high"] | None
    cache_salt: str | None
    request_id: str | None

    # The call's deadline, retries included; None takes the client's.
    timeout_s: float | None


class GenerateOptions(RequestOptions, total=False):
    """What `generate` and `stream` take beside the prompt."""

    add_special_tokens: bool | None
    parse_special_tokens: bool | None


class ChatOptions(RequestOptions, total=False):
    """What `chat` and `chat_stream` take beside the messages."""

    # Each a mapping, or JSON text, in the form that the model's chat template expects.
    tools: Sequence[str | Mapping[str, Any]] | None
    add_generation_prompt: bool | None
