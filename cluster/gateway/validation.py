"""The one validator: a request as it came, to one in which everything is decided and within its limits.

Two steps, because lengths are known only after tokenizing: `check_fields` needs the request alone, `resolve` needs the prompt's
tokens. Every entry point uses both. What they cost grows with the request, so they run on a worker thread.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from msgspec.structs import replace

from quire.cluster.gateway.field_checks import check_token_ids, in_range
from quire.cluster.gateway.request_fields import refuse_unsupported
from quire.cluster.gateway.sampling_fields import bad_words, check_drawable, sampling_state
from quire.cluster.gateway.sequence_fields import SequenceCounts, check_fits_beams, sequence_counts
from quire.cluster.gateway.served_model import ServedModel
from quire.common.errors import InvalidRequest
from quire.common.messages import SamplingState
from quire.v1 import inference_pb2

# A text longer than this many characters per token of the model's length cannot fit, so it is not even tokenized.
MAX_CHARS_PER_TOKEN: Final = 8
MAX_STOP_STRING_CHARS: Final = 256
MAX_TOOL_CALLS: Final = 4096  # of a whole conversation
MAX_JSON_DEPTH: Final = 64  # templates and our own walks recurse; 600 levels are more than Python's stack takes
MAX_ROLE_CHARS: Final = 64
# Entries (tokens and the most likely ones beside them) of the log probabilities of a prompt, about 30 bytes each: they travel in
# one message, and clients take 4 MiB by default.
MAX_PROMPT_ENTRIES: Final = 65_536
# The same for a whole answer, the prompt's and those of the most tokens that may come: 64 bytes for each are left.
MAX_ANSWER_ENTRIES: Final = 65_536

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str
    add_special_tokens: bool
    parse_special_tokens: bool


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: tuple[Mapping[str, Any], ...]  # as templates expect them
    tools: tuple[Any, ...] | None
    add_generation_prompt: bool


Prompt = TextPrompt | ChatPrompt | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckedFields:
    """A request whose every field is honoured and within its own limits; what the prompt's length decides is still open."""

    request_id: str
    prompt: Prompt
    truncate_prompt_tokens: int | None  # keep this many last ones; token ids are cut already
    sampling: SamplingState  # seed and min_tokens are as the client gave them, else 0
    counts: SequenceCounts
    priority: int  # 1 low, 2 normal, 3 high
    shows_logprobs: bool
    echo_prompt: bool
    seed: int | None
    max_tokens: int | None
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    skip_special_tokens: bool
    cache_salt: str


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """A request in which nothing is open."""

    # Invariant: 1 <= max_tokens, sampling.min_tokens <= max_tokens, len(prompt_ids) + max_tokens <= the limit.
    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingState
    counts: SequenceCounts
    priority: int
    shows_logprobs: bool  # a best_of has them computed, but does not show them
    echo_prompt: bool
    max_tokens: int
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    skip_special_tokens: bool
    cache_salt: str


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Most tokens of prompt and completion together, and what sets that limit."""

    num_tokens: int
    name: str


def length_limit(model: ServedModel, *, scheduler_max_request_tokens: int) -> LengthLimit:
    """The smallest of what the model, discovery and the scheduler allow; 0 means that one of them does not know."""
    pools = [tokens for tokens in (model.max_request_tokens, scheduler_max_request_tokens) if tokens > 0]
    if pools and min(pools) < model.max_model_len:
        return LengthLimit(min(pools), "max_request_tokens, by the KV blocks of one group")
    return LengthLimit(model.max_model_len, "max_model_len")


def request_id_of(request: inference_pb2.GenerateRequest) -> str:
    """The name that the client gave the request, else one of our own. Cheap.

    Raises:
        InvalidRequest: it is no name.
    """
    return check_name(request, "request_id") or uuid.uuid4().hex


def check_fields(request: inference_pb2.GenerateRequest, model: ServedModel, *, request_id: str) -> CheckedFields:
    """Check what needs no tokenizing, and take defaults from the model where the client gave none.

    Raises:
        NotSupported: a field is set that no code honours yet.
        InvalidRequest: a value is outside its limits.
    """
    truncate_prompt_tokens = _truncate_prompt_tokens(request, model)
    if truncate_prompt_tokens is None and len(request.token_ids.ids) > model.max_model_len:  # before millions of them are looked at
        raise _too_long(len(request.token_ids.ids), LengthLimit(model.max_model_len, "max_model_len"))
    refuse_unsupported(request)
    stopping, output = request.stopping, request.output
    sampling = replace(sampling_state(request, model), min_tokens=stopping.min_tokens, stop_ids=_stop_ids(stopping, model))
    counts = sequence_counts(request, is_greedy=sampling.temperature == 0)
    if counts.beam is not None:
        check_fits_beams(request)
    elif not counts.are_all_returned and sampling.num_logprobs is None:
        sampling = replace(sampling, num_logprobs=0)  # by which the best are found
    check_drawable(sampling, logits_size=model.logits_size)
    stop_strings = _stop_strings(stopping)
    bad_ids, bad_sequences = bad_words(request.sampling.bad_words, model)
    return CheckedFields(
        request_id=request_id,
        prompt=_prompt(request, model),
        truncate_prompt_tokens=truncate_prompt_tokens,
        sampling=replace(sampling, bad_ids=tuple(dict.fromkeys((*sampling.bad_ids, *bad_ids))), bad_sequences=bad_sequences),
        counts=counts,
        priority=_priority(request),
        shows_logprobs=output.HasField("logprobs"),
        echo_prompt=output.echo_prompt,
        seed=request.sampling.seed if request.sampling.HasField("seed") else None,
        max_tokens=_max_tokens(stopping),
        stop_strings=stop_strings,
        include_stop_string=stopping.include_stop_string,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        cache_salt=check_name(request, "cache_salt") or "",
    )


def encode_prompt(prompt: Prompt, model: ServedModel) -> tuple[list[int], str | None]:
    """The prompt's token ids and, for a conversation, its text. Slow: call it from a worker thread.

    Raises:
        InvalidRequest: the prompt is far too long, or cannot be tokenized.
    """
    max_chars = MAX_CHARS_PER_TOKEN * model.max_model_len
    match prompt:
        case TextPrompt(text, add_special_tokens, parse_special_tokens):
            check_num_chars(len(text), model, field="text")
            return model.tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special_tokens=parse_special_tokens), None
        case ChatPrompt(messages, tools, add_generation_prompt):
            assert model.chat is not None, "check_fields refuses a conversation without a template"
            return model.chat.encode(messages, tools=tools, add_generation_prompt=add_generation_prompt, max_chars=max_chars)
        case _:
            return list(prompt), None


def resolve(
    checked: CheckedFields, prompt_ids: Sequence[int], *, limit: LengthLimit, vocab_size: int, drawn_seed: int, is_whole: bool = False
) -> ResolvedRequest:
    """Decide what depends on the prompt's length.

    drawn_seed: for a client that gave none.
    is_whole:   the answer is one message, not a stream of them.

    Raises:
        InvalidRequest: the prompt is empty or holds unknown ids, or the lengths do not fit.
    """
    if checked.truncate_prompt_tokens is not None:
        prompt_ids = prompt_ids[-checked.truncate_prompt_tokens :]
    check_token_ids(prompt_ids, below=vocab_size, field="token_ids.ids", what="prompt")
    if not prompt_ids:
        raise InvalidRequest("the prompt has no tokens; give it at least one", reason="EMPTY_PROMPT")
    max_tokens = _resolve_max_tokens(checked.max_tokens, num_prompt_tokens=len(prompt_ids), limit=limit)
    min_tokens = checked.sampling.min_tokens
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens} and max_tokens is {max_tokens}; min_tokens must not be more",
            field="stopping.min_tokens",
            metadata={"min_tokens": str(min_tokens), "max_tokens": str(max_tokens)},
        )
    _check_prompt_entries(checked.sampling.num_prompt_logprobs, num_prompt_tokens=len(prompt_ids))
    if is_whole:
        _check_answer_entries(checked, num_prompt_tokens=len(prompt_ids))
    return ResolvedRequest(
        request_id=checked.request_id,
        prompt_ids=tuple(prompt_ids),
        sampling=replace(checked.sampling, seed=drawn_seed if checked.seed is None else checked.seed),
        counts=checked.counts,
        priority=checked.priority,
        shows_logprobs=checked.shows_logprobs,
        echo_prompt=checked.echo_prompt,
        max_tokens=max_tokens,
        stop_strings=checked.stop_strings,
        include_stop_string=checked.include_stop_string,
        skip_special_tokens=checked.skip_special_tokens,
        cache_salt=checked.cache_salt,
    )


def text_prompt(request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, model: ServedModel) -> TextPrompt:
    """The text prompt of a request that has one."""
    check_num_chars(len(request.text), model, field="text")
    if not request.text:
        raise InvalidRequest("text is empty; give it at least one character", reason="EMPTY_PROMPT", field="text")
    return TextPrompt(
        text=request.text,
        add_special_tokens=request.add_special_tokens if request.HasField("add_special_tokens") else True,
        parse_special_tokens=request.parse_special_tokens,
    )


def chat_prompt(chat: inference_pb2.Chat, model: ServedModel) -> ChatPrompt:
    """A conversation as templates expect it; refuse_unsupported has checked the number of its entries.

    Raises:
        InvalidRequest: the model has no template, or the conversation is empty or outside its limits.
    """
    if model.chat is None:
        raise InvalidRequest(f"model {model.name} has no chat template; send text or token_ids", reason="NO_CHAT_TEMPLATE", field="chat")
    if not chat.messages:
        text = "chat.messages has 0 entries; it takes at least 1"
        raise InvalidRequest(text, reason="EMPTY_PROMPT", field="chat.messages")
    num_calls = sum(len(message.tool_calls_json) for message in chat.messages)
    if num_calls > MAX_TOOL_CALLS:
        text = f"chat.messages has {num_calls} tool calls; it takes {MAX_TOOL_CALLS}"
        raise InvalidRequest(text, field="chat.messages.tool_calls_json")
    check_num_chars(sum(map(_num_chars, chat.messages)) + sum(map(len, chat.tools_json)), model, field="chat")
    return ChatPrompt(
        messages=tuple(_message(message) for message in chat.messages),
        tools=tuple(_json_object(text, "chat.tools_json") for text in chat.tools_json) or None,
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
    )


def check_num_chars(num_chars: int, model: ServedModel, *, field: str) -> None:
    """Refuse a text that cannot fit, before any work is done on it."""
    max_chars = MAX_CHARS_PER_TOKEN * model.max_model_len
    if num_chars > max_chars:
        raise InvalidRequest(
            f"{field} has {num_chars} characters; this model takes {max_chars}, {MAX_CHARS_PER_TOKEN} per token of max_model_len; "
            "shorten it",
            reason="PROMPT_TOO_LONG",
            field=field,
            metadata={"chars": str(num_chars), "max_chars": str(max_chars)},
        )


def check_name(request: inference_pb2.GenerateRequest, field: str) -> str | None:
    """A field that names something; None when it is not set."""
    if not request.HasField(field):  # type: ignore[arg-type]  # the stubs take literal names only
        return None
    value: str = getattr(request, field)
    if _NAME.fullmatch(value) is None:
        raise InvalidRequest(f"{field} has {len(value)} characters; it takes 1 to 64 of A-Z a-z 0-9 _ . -", field=field)
    return value


# -- prompts ----------------------------------------------------------------------------------------------------------


def _prompt(request: inference_pb2.GenerateRequest, model: ServedModel) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("the request has no prompt; set text, token_ids or chat", reason="EMPTY_PROMPT", field="prompt")
    if kind == "text":
        return text_prompt(request, model)
    for name in ("add_special_tokens", "parse_special_tokens"):
        if getattr(request, name):
            raise InvalidRequest(f"{name} is for text prompts; this prompt is {kind}; leave it unset", field=name)
    if kind == "chat":
        return chat_prompt(request.chat, model)
    ids = request.token_ids.ids
    if not ids:
        raise InvalidRequest("token_ids is empty; give it at least one id", reason="EMPTY_PROMPT", field="token_ids.ids")
    last = request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else len(ids)
    return tuple(ids[-last:])


def _truncate_prompt_tokens(request: inference_pb2.GenerateRequest, model: ServedModel) -> int | None:
    if not request.HasField("truncate_prompt_tokens"):
        return None
    return int(in_range("truncate_prompt_tokens", request.truncate_prompt_tokens, low=1, high=model.max_model_len))


def _num_chars(message: inference_pb2.ChatMessage) -> int:
    texts = (message.role, message.content, message.name, message.tool_call_id, *message.tool_calls_json)
    return sum(map(len, texts))


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    if not 1 <= len(message.role) <= MAX_ROLE_CHARS:
        text = f"a role has {len(message.role)} characters; it takes 1 to {MAX_ROLE_CHARS}"
        raise InvalidRequest(text, field="chat.messages.role")
    # Without content: None where the turn calls tools, as transformers' users write it; else "".
    has_content = message.HasField("content") or not message.tool_calls_json
    entry: dict[str, Any] = {"role": message.role, "content": message.content if has_content else None}
    if message.HasField("name"):
        entry["name"] = message.name
    if message.HasField("tool_call_id"):
        entry["tool_call_id"] = message.tool_call_id
    if message.tool_calls_json:
        entry["tool_calls"] = [_json_object(text, "chat.messages.tool_calls_json") for text in message.tool_calls_json]
    return entry


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep(field) from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(f"an entry of {field} is not a JSON object", reason="INVALID_JSON", field=field)
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for inner in items for item in inner if isinstance(item, dict | list)]
        if not level:
            return value
    raise _too_deep(field)


def _too_deep(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"an entry of {field} is nested more than {MAX_JSON_DEPTH} levels deep; flatten it",
        reason="INVALID_JSON",
        field=field,
        metadata={"max_depth": str(MAX_JSON_DEPTH)},
    )


# -- the queue, what comes back ----------------------------------------------------------------------------------------


def _priority(request: inference_pb2.GenerateRequest) -> int:
    """The number of a class is that of its enum value; without one it is the normal class."""
    if request.priority not in inference_pb2.Priority.values():
        raise InvalidRequest(f"priority {int(request.priority)} is not one of low, normal, high", field="priority")
    return int(request.priority) or int(inference_pb2.PRIORITY_NORMAL)


def _check_prompt_entries(num_top: int | None, *, num_prompt_tokens: int) -> None:
    num_entries = num_prompt_tokens * (1 + num_top) if num_top is not None else 0
    if num_entries > MAX_PROMPT_ENTRIES:
        text = (
            f"prompt_logprobs is {num_top} and prompt has {num_prompt_tokens} tokens, {num_entries} log probabilities together; "
            f"one answer takes {MAX_PROMPT_ENTRIES}; lower prompt_logprobs or shorten the prompt"
        )
        numbers = {"prompt_tokens": str(num_prompt_tokens), "prompt_logprobs": str(num_top), "limit": str(MAX_PROMPT_ENTRIES)}
        raise InvalidRequest(text, field="output.prompt_logprobs", metadata=numbers)


def _check_answer_entries(checked: CheckedFields, *, num_prompt_tokens: int) -> None:
    """A client that leaves max_tokens open is answered for as long as the answer fits."""
    num_top, num_prompt_top = checked.sampling.num_logprobs, checked.sampling.num_prompt_logprobs
    if not checked.shows_logprobs or num_top is None or checked.max_tokens is None:
        return
    num_prompt_entries = num_prompt_tokens * (1 + num_prompt_top) if num_prompt_top is not None else 0
    num_entries = num_prompt_entries + checked.counts.n * checked.max_tokens * (1 + num_top)
    if num_entries > MAX_ANSWER_ENTRIES:
        text = (
            f"n is {checked.counts.n}, max_tokens is {checked.max_tokens} and logprobs is {num_top}, with the prompt's up to {num_entries} "
            f"log probabilities; one answer takes {MAX_ANSWER_ENTRIES}; lower them, or call GenerateStream"
        )
        numbers = {"entries": str(num_entries), "limit": str(MAX_ANSWER_ENTRIES)}
        raise InvalidRequest(text, reason="ANSWER_TOO_LARGE", field="output.logprobs", metadata=numbers)


# -- stopping ---------------------------------------------------------------------------------------------------------


def _max_tokens(stopping: inference_pb2.StoppingParams) -> int | None:
    if not stopping.HasField("max_tokens"):
        return None
    if stopping.max_tokens == 0:
        raise InvalidRequest("max_tokens is 0; it must be at least 1", field="stopping.max_tokens")
    return stopping.max_tokens


def _resolve_max_tokens(max_tokens: int | None, *, num_prompt_tokens: int, limit: LengthLimit) -> int:
    room = limit.num_tokens - num_prompt_tokens
    if room < 0:
        raise _too_long(num_prompt_tokens, limit)
    numbers = {"prompt_tokens": str(num_prompt_tokens), "limit": str(limit.num_tokens)}
    if room == 0:
        raise InvalidRequest(
            f"prompt has {num_prompt_tokens} tokens, which leaves none of {limit.num_tokens} ({limit.name}) for the completion; shorten it",
            reason="PROMPT_TOO_LONG",
            metadata=numbers,
        )
    if max_tokens is not None and max_tokens > room:
        raise InvalidRequest(
            f"prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, {num_prompt_tokens + max_tokens} together; this model "
            f"takes {limit.num_tokens} ({limit.name}); lower max_tokens to {room} or shorten the prompt",
            reason="REQUEST_TOO_LONG",
            field="stopping.max_tokens",
            metadata={**numbers, "max_tokens": str(max_tokens)},
        )
    return room if max_tokens is None else max_tokens


def _too_long(num_prompt_tokens: int, limit: LengthLimit) -> InvalidRequest:
    return InvalidRequest(
        f"prompt has {num_prompt_tokens} tokens; this model takes {limit.num_tokens} ({limit.name}); shorten it",
        reason="PROMPT_TOO_LONG",
        metadata={"prompt_tokens": str(num_prompt_tokens), "limit": str(limit.num_tokens)},
    )


def _stop_ids(stopping: inference_pb2.StoppingParams, model: ServedModel) -> tuple[int, ...]:
    ids = stopping.stop_token_ids
    check_token_ids(ids, below=model.logits_size, field="stopping.stop_token_ids", what="stop_token_ids")
    own = () if stopping.ignore_eos else model.eos_token_ids
    return tuple(dict.fromkeys((*own, *ids)))


def _stop_strings(stopping: inference_pb2.StoppingParams) -> tuple[str, ...]:
    field = "stopping.stop_strings"
    for text in stopping.stop_strings:
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequest(f"a stop string has {len(text)} characters; it takes 1 to {MAX_STOP_STRING_CHARS}", field=field)
    return tuple(dict.fromkeys(stopping.stop_strings))
