"""The SDK's two translations, side by side: arguments to request messages, and response messages to results.

Pure: no channel, no clock. `Client` and `AsyncClient` share it. A request sets exactly the fields that were given; each is
found by its option's name in the message descriptors, so that the options are listed in one place only (options.py).
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from google.protobuf import duration_pb2
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from quire.client.options import Message
from quire.client.results import (
    BlockPool,
    Choice,
    Delta,
    FinishReason,
    Generation,
    Group,
    GroupBlocks,
    GroupState,
    Model,
    Queue,
    Rank,
    Timings,
    TokenizedPrompt,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from quire.common.errors import InvalidRequest
from quire.v1 import cluster_pb2, inference_pb2

# Parts of a GenerateRequest whose fields are options of their own.
_SECTIONS: Final = ("", "sampling", "stopping", "output", "beam_search", "structured_output")
# Options that are shorter than the names of their fields.
_FIELD_NAMES: Final = {"stop": "stop_strings", "num_beams": "beam_count"}
# At most one of these: they are one oneof, where protobuf would silently keep the last.
_FORMS: Final = tuple(field.name for field in inference_pb2.StructuredOutput.DESCRIPTOR.fields)
_MESSAGE_KEYS: Final = ("role", "content", "name", "tool_call_id", "tool_calls")


# --- requests ------------------------------------------------------------------------------------------------------------


def generate_request(prompt: str | Sequence[int], options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """A request that continues a text or token ids.

    Raises:
        InvalidRequest: a value that the field cannot hold, or two forms of structured output.
        TypeError: an option that does not exist.
    """
    request = inference_pb2.GenerateRequest()
    _set_field(request, "text" if isinstance(prompt, str) else "token_ids", prompt, option="prompt")
    _set_options(request, options)
    return request


def chat_request(messages: Sequence[Message], options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """A request for the next turn of a conversation. Raises as `generate_request`."""
    rest = dict(options)
    tools, add_generation_prompt = rest.pop("tools", None), rest.pop("add_generation_prompt", None)
    request = inference_pb2.GenerateRequest(chat=_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt))
    _set_options(request, rest)
    return request


def tokenize_request(
    prompt: str | Sequence[Message],
    *,
    model: str | None,
    add_special_tokens: bool | None,
    parse_special_tokens: bool | None,
    tools: Sequence[str | Mapping[str, Any]] | None,
    add_generation_prompt: bool | None,
) -> inference_pb2.TokenizeRequest:
    request = inference_pb2.TokenizeRequest()
    if isinstance(prompt, str):
        _set_field(request, "text", prompt, option="prompt")
    else:
        request.chat.CopyFrom(_chat(prompt, tools=tools, add_generation_prompt=add_generation_prompt))
    given = {"model": model, "add_special_tokens": add_special_tokens, "parse_special_tokens": parse_special_tokens}
    _set_given(request, given)
    return request


def detokenize_request(token_ids: Sequence[int], *, model: str | None, skip_special_tokens: bool | None) -> inference_pb2.DetokenizeRequest:
    request = inference_pb2.DetokenizeRequest()
    _set_given(request, {"token_ids": token_ids, "model": model, "skip_special_tokens": skip_special_tokens})
    return request


def _set_options(request: inference_pb2.GenerateRequest, options: Mapping[str, Any]) -> None:
    given = {name: value for name, value in options.items() if value is not None and name != "timeout_s"}
    forms = [name for name in given if name in _FORMS]
    if len(forms) > 1:
        raise InvalidRequest(f"a completion has one form; {' and '.join(forms)} are {len(forms)}; give one of them", field=forms[1])
    for name, value in given.items():
        section = _SECTION_OF.get(name)
        if section is None:
            close = difflib.get_close_matches(name, _SECTION_OF, n=1)
            raise TypeError(f"there is no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        message = getattr(request, section) if section else request
        _set_field(message, _FIELD_NAMES.get(name, name), value, option=name)


def _section_by_option() -> dict[str, str]:
    """Where in a GenerateRequest each option's field is: the name of the part, "" for the request itself."""
    elsewhere = {"text", "token_ids", "chat", *_SECTIONS}  # the prompt, and the parts themselves
    options = {field: option for option, field in _FIELD_NAMES.items()}
    request = inference_pb2.GenerateRequest()
    return {
        options.get(field.name, field.name): section
        for section in _SECTIONS
        for field in (getattr(request, section) if section else request).DESCRIPTOR.fields
        if section or field.name not in elsewhere
    }


_SECTION_OF: Final[Mapping[str, str]] = _section_by_option()


def _set_given(message: ProtoMessage, values: Mapping[str, Any]) -> None:
    """Set the fields that are not None, each by its own name."""
    for name, value in values.items():
        if value is not None:
            _set_field(message, name, value, option=name)


def _set_field(message: ProtoMessage, name: str, value: Any, *, option: str) -> None:
    """Set a field of any kind; a text counts as one text where several may be given."""
    field = cast(FieldDescriptor, message.DESCRIPTOR.fields_by_name[name])
    current = getattr(message, name)
    try:
        if field.enum_type is not None:
            setattr(message, name, _enum_value(field.enum_type, value))
        elif hasattr(current, "update"):  # a map
            current.update(value)
        elif hasattr(current, "extend"):
            current.extend([value] if isinstance(value, str) else value)
        elif field.message_type is not None:  # TokenIds or Choices: a list in a message of its own, which may be empty
            current.SetInParent()
            _set_field(current, field.message_type.fields[0].name, value, option=option)
        else:
            setattr(message, name, _as_json(value) if isinstance(value, Mapping) else value)
    except UnicodeError as error:
        raise InvalidRequest(f"{option} has half a character (a lone surrogate), which UTF-8 cannot hold", field=option) from error
    except (TypeError, ValueError, AttributeError) as error:
        shown = repr(value) if isinstance(value, (int, float)) else f"of type {type(value).__name__}"
        raise InvalidRequest(f"{option} is {shown}; it takes {_takes(field, several=hasattr(current, 'extend'))}", field=option) from error


def _enum_value(enum: EnumDescriptor, name: str) -> int:
    """The number of an enum's value by its short name: "low" is PRIORITY_LOW."""
    numbers = _enum_numbers(enum)
    if name not in numbers:
        raise ValueError(name)
    return numbers[name]


def _enum_numbers(enum: EnumDescriptor) -> dict[str, int]:
    """All values but the unspecified one, by short name."""
    unspecified, *values = sorted(enum.values, key=lambda value: value.number)
    prefix = unspecified.name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix).lower(): value.number for value in values}


def _takes(field: FieldDescriptor, *, several: bool) -> str:
    """What a field takes, in words."""
    if field.enum_type is not None:
        return " or ".join(repr(name) for name in _enum_numbers(field.enum_type))
    if field.message_type is not None:
        return "a mapping of token ids to numbers"
    one, many = {
        FieldDescriptor.CPPTYPE_UINT32: ("a whole number from 0 to 2**32 - 1", "a list of whole numbers from 0 to 2**32 - 1"),
        FieldDescriptor.CPPTYPE_UINT64: ("a whole number from 0 to 2**64 - 1", "a list of whole numbers from 0 to 2**64 - 1"),
        FieldDescriptor.CPPTYPE_STRING: ("text", "a list of texts"),
        FieldDescriptor.CPPTYPE_BOOL: ("true or false", "a list of true or false"),
        FieldDescriptor.CPPTYPE_DOUBLE: ("a number", "a list of numbers"),
    }[field.cpp_type]
    return many if several else one


def _chat(
    messages: Sequence[Message], *, tools: Sequence[str | Mapping[str, Any]] | None, add_generation_prompt: bool | None
) -> inference_pb2.Chat:
    if isinstance(messages, (str, Mapping)):
        raise InvalidRequest("messages is one message; it takes a list of messages", field="messages")
    chat = inference_pb2.Chat(
        messages=[_chat_message(message, index=index) for index, message in enumerate(messages)],
        tools_json=[_as_json(tool) for tool in tools or ()],
    )
    _set_given(chat, {"add_generation_prompt": add_generation_prompt})
    return chat


def _chat_message(message: Message, *, index: int) -> inference_pb2.ChatMessage:
    where = f"messages[{index}]"
    if isinstance(message, Mapping):
        values = dict(message)
    elif isinstance(message, (tuple, list)) and len(message) == 2:
        values = {"role": message[0], "content": message[1]}
    else:
        raise InvalidRequest(f'{where} takes (role, content) or {{"role": ..., "content": ...}}', field=where)
    unknown = [key for key in values if key not in _MESSAGE_KEYS]
    if unknown:
        raise InvalidRequest(f"{where} has a key {unknown[0]!r}; it takes {', '.join(_MESSAGE_KEYS)}", field=where)
    if "role" not in values:
        raise InvalidRequest(f"{where} has no role; it takes one such as 'user'", field=f"{where}.role")
    proto = inference_pb2.ChatMessage(tool_calls_json=[_as_json(call) for call in values.pop("tool_calls", None) or ()])
    for key, value in values.items():
        if value is not None:  # as in the assistant turns of tool calls, whose content is None elsewhere
            _set_field(proto, key, value, option=f"{where}.{key}")
    return proto


def _as_json(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- responses -----------------------------------------------------------------------------------------------------------


def generation(response: inference_pb2.GenerateResponse) -> Generation:
    return Generation(
        request_id=response.request_id,
        model=response.model,
        choices=tuple(_choice(completion) for completion in response.completions),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
        seed=response.seed,
        prompt_logprobs=_logprobs(response.prompt_logprobs),
    )


def delta(response: inference_pb2.GenerateStreamResponse) -> Delta:
    return Delta(
        request_id=response.request_id,
        model=response.model,
        index=response.index,
        text=response.text_delta,
        token_ids=tuple(response.token_ids),
        finish_reason=_finish_reason(response.finish_reason),
        stopped_by=_stopped_by(response.stop_cause),
        logprobs=_logprobs(response.logprobs),
        prompt_logprobs=_logprobs(response.prompt_logprobs),
        usage=_usage(response.usage) if response.HasField("usage") else None,
        timings=_timings(response.timings) if response.HasField("timings") else None,
        seed=response.seed if response.HasField("seed") else None,
        cumulative_logprob=response.cumulative_logprob if response.HasField("cumulative_logprob") else None,
    )


def models(response: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(
        Model(
            name=model.name,
            is_default=model.default,
            model_type=model.model_type,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            has_chat_template=model.chat,
            default_sampling={field.name: _plain(value) for field, value in model.default_sampling.ListFields()},
            eos_token_ids=tuple(model.eos_token_ids),
            adapters=tuple(model.adapters),
            block_size=model.block_size,
        )
        for model in response.models
    )


def tokenized_prompt(response: inference_pb2.TokenizeResponse) -> TokenizedPrompt:
    return TokenizedPrompt(token_ids=tuple(response.token_ids), rendered=response.rendered if response.HasField("rendered") else None)


def groups(messages: Iterable[cluster_pb2.Group]) -> tuple[Group, ...]:
    return tuple(map(group, messages))


def restart_request(group_id: str | None, model: str | None) -> cluster_pb2.RestartGroupsRequest:
    """
    Raises:
        InvalidRequest: not one of the two is named.
    """
    if group_id is not None and model is None:
        return cluster_pb2.RestartGroupsRequest(group_id=group_id)
    if model is not None and group_id is None:
        return cluster_pb2.RestartGroupsRequest(model=model)
    raise InvalidRequest("restart takes a group_id or a model, one of the two", reason="NO_RESTART_TARGET")


def group(message: cluster_pb2.Group) -> Group:
    return Group(
        group_id=message.group_id,
        model=message.model,
        state=_GROUP_STATES.get(message.state, "UNKNOWN"),
        term=message.term,
        tensor_parallel_size=message.tensor_parallel_size,
        num_restarts=message.restart_count,
        detail=message.detail,
        ranks=tuple(Rank(rank=rank.rank, device=rank.device, pid=rank.pid, host=rank.host) for rank in message.ranks),
        num_running_sequences=message.running_sequence_count,
        num_preempted_requests=message.preempted_request_count,
        gpu_blocks=_block_pool(message.gpu_blocks),
        cpu_blocks=_block_pool(message.cpu_blocks),
        num_steps=message.step_count,
    )


def queue(response: cluster_pb2.GetQueueResponse) -> Queue:
    return Queue(
        num_waiting_requests=response.waiting_request_count,
        num_waiting_tokens=response.waiting_token_count,
        max_waiting_requests=response.max_waiting_request_count,
        max_waiting_tokens=response.max_waiting_token_count,
        oldest_wait_s=_seconds(response.oldest_wait),
        num_running_requests=response.running_request_count,
        num_waiting_by_priority={
            inference_pb2.Priority.Name(entry.priority).removeprefix("PRIORITY_"): entry.waiting_request_count
            for entry in response.priorities
        },
    )


def group_blocks(response: cluster_pb2.GetBlocksResponse) -> tuple[GroupBlocks, ...]:
    return tuple(
        GroupBlocks(
            group_id=blocks.group_id,
            gpu_blocks=_block_pool(blocks.gpu_blocks),
            cpu_blocks=_block_pool(blocks.cpu_blocks),
            gpu_ref_counts=blocks.gpu_ref_counts,
            gpu_states=blocks.gpu_block_states,
            cpu_states=blocks.cpu_block_states,
        )
        for blocks in response.groups
    )


_GROUP_STATES: Final[Mapping[int, GroupState]] = {
    cluster_pb2.GROUP_STATE_STARTING: "STARTING",
    cluster_pb2.GROUP_STATE_READY: "READY",
    cluster_pb2.GROUP_STATE_DRAINING: "DRAINING",
    cluster_pb2.GROUP_STATE_STOPPED: "STOPPED",
}
_FINISH_REASONS: Final[Mapping[int, FinishReason | None]] = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: None,
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


def _finish_reason(value: int) -> FinishReason | None:
    return _FINISH_REASONS.get(value, "unknown")


def _choice(completion: inference_pb2.Completion) -> Choice:
    return Choice(
        index=completion.index,
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        finish_reason=_finish_reason(completion.finish_reason),
        stopped_by=_stopped_by(completion.stop_cause),
        logprobs=_logprobs(completion.logprobs),
        cumulative_logprob=completion.cumulative_logprob if completion.HasField("cumulative_logprob") else None,
    )


def _stopped_by(cause: inference_pb2.StopCause) -> int | str | None:
    kind = cause.WhichOneof("cause")
    return None if kind is None else cause.token_id if kind == "token_id" else cause.string


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(
        num_prompt_tokens=usage.prompt_token_count,
        num_cached_tokens=usage.cached_token_count,
        num_completion_tokens=usage.completion_token_count,
    )


def _timings(timings: inference_pb2.Timings) -> Timings:
    return Timings(
        queue_s=_seconds(timings.queue),
        prefill_s=_seconds(timings.prefill),
        decode_s=_seconds(timings.decode),
        preempted_s=_seconds(timings.preempted),
        time_to_first_token_s=_seconds(timings.time_to_first_token),
        total_s=_seconds(timings.total),
        num_preemptions=timings.preemption_count,
    )


def _logprobs(messages: Sequence[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token=_logprob(each.token), top=tuple(_logprob(top) for top in each.top)) for each in messages)


def _logprob(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, rank=message.rank, text=message.text)


def _block_pool(pool: cluster_pb2.BlockPoolState) -> BlockPool:
    return BlockPool(
        num_blocks=pool.total,
        num_free=pool.free,
        num_cached=pool.cached,
        num_held=pool.held,
        num_shared=pool.shared,
        block_size=pool.block_size,
        block_bytes=pool.block_bytes,
    )


def _plain(value: Any) -> Any:
    """A field's value of a SamplingParams without protobuf in it."""
    if isinstance(value, inference_pb2.TokenIds):
        return tuple(value.ids)
    if isinstance(value, (bool, int, float, str)):
        return value
    return dict(value) if isinstance(value, Mapping) or hasattr(value, "items") else tuple(value)


def _seconds(duration: duration_pb2.Duration) -> float:
    return float(duration.seconds + duration.nanos * 1e-9)
