"""Which request fields are honoured, and how many entries each may have. What is not honoured is refused by name or number.

A request of 4 MiB can hold two million messages. So every count is checked before anything walks over the entries, and
numbers are never walked over here.
"""

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from quire.common.errors import InvalidRequest, NotSupported

HONOURED: Final = frozenset(
    {
        "model",
        "text",
        "token_ids",
        "token_ids.ids",
        "chat",
        "chat.messages",
        "chat.messages.role",
        "chat.messages.content",
        "chat.messages.name",
        "chat.messages.tool_call_id",
        "chat.messages.tool_calls_json",
        "chat.tools_json",
        "chat.add_generation_prompt",
        "add_special_tokens",
        "parse_special_tokens",
        "truncate_prompt_tokens",
        "sampling",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.top_k",
        "sampling.min_p",
        "sampling.typical_p",
        "sampling.repetition_penalty",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "sampling.seed",
        "sampling.logit_bias",
        "sampling.allowed_token_ids",
        "sampling.allowed_token_ids.ids",
        "sampling.bad_token_ids",
        "sampling.bad_token_ids.ids",
        "sampling.bad_words",
        "stopping",
        "stopping.max_tokens",
        "stopping.min_tokens",
        "stopping.stop_strings",
        "stopping.stop_token_ids",
        "stopping.ignore_eos",
        "stopping.include_stop_string",
        "output",
        "output.skip_special_tokens",
        "output.logprobs",
        "output.prompt_logprobs",
        "output.echo_prompt",
        "beam_search",
        "beam_search.beam_count",
        "beam_search.length_penalty",
        "beam_search.early_stopping",
        "n",
        "best_of",
        "priority",
        "cache_salt",
        "request_id",
    }
)

# Fields that no code honours yet, with the values that change nothing and are therefore taken.
REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "adapter": ("",),
    "structured_output": (),
}


# Most entries of the repeated fields that are honoured. token_ids.ids is bounded by the model's length.
MAX_ENTRIES: Final[Mapping[str, int]] = {
    "chat.messages": 2048,  # 16 tokens each fill a window of 32,768
    "chat.messages.tool_calls_json": 128,  # a turn that calls each tool once
    "chat.tools_json": 128,  # as many as public APIs take
    "sampling.logit_bias": 300,  # as the proto says
    "sampling.allowed_token_ids.ids": 1024,  # each travels to every rank
    "sampling.bad_token_ids.ids": 1024,
    "sampling.bad_words": 300,  # each is looked for behind every token
    "stopping.stop_strings": 4,  # as the proto says; each is searched for in every piece of text
    "stopping.stop_token_ids": 64,  # as the proto says
}


def refuse_unsupported(message: Message) -> None:
    """Refuse the first set field that no code honours, at any depth, unless its value changes nothing.

    Raises:
        NotSupported: names the field, or the number of one that this server has never heard of.
        InvalidRequest: a field has too many entries.
    """
    _refuse_known(message, prefix="")
    refuse_unknown(message)


def refuse_unknown(message: Message) -> None:
    """Refuse fields that the message has no name for: a newer client set them.

    Raises:
        NotSupported: names the number of the first one.
    """
    if _num_unknown_bytes(message):
        path, number = _first_unknown(message, prefix="")
        raise NotSupported(
            f"{path or 'the request'} has a field of number {number}, which this server does not know; leave it unset",
            reason="UNKNOWN_FIELD",
            field=path or None,
            metadata={"field_number": str(number)},
        )


def not_supported(path: str, *, instead: object = None, why: str = "") -> NotSupported:
    """The refusal of a field, by name. instead: a value that would be taken."""
    alternative = "" if instead is None else f" or set it to {instead}"
    return NotSupported(f"{path} is not supported yet{why}; leave it unset{alternative}", field=path, metadata={"field": path})


def _refuse_known(message: Message, *, prefix: str) -> None:
    for field, value in message.ListFields():
        path = prefix + field.name
        if path not in HONOURED:
            neutral = REFUSED.get(path, ())
            if field.is_repeated or field.message_type is not None or value not in neutral:
                raise not_supported(_first_leaf(path, field, value), instead=_example(field, neutral))
        elif field.is_repeated:
            if len(value) > MAX_ENTRIES.get(path, len(value)):
                text = f"{path} has {len(value)} entries; it takes {MAX_ENTRIES[path]}"
                raise InvalidRequest(text, field=path, metadata={"entries": str(len(value)), "max_entries": str(MAX_ENTRIES[path])})
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                for entry in value:
                    _refuse_known(entry, prefix=path + ".")
        elif field.message_type is not None:
            _refuse_known(value, prefix=path + ".")


def _first_leaf(path: str, field: FieldDescriptor, value: Any) -> str:
    """The first field that is set inside a message, or the field itself."""
    if field.message_type is None or field.is_repeated:
        return path
    return next((_first_leaf(f"{path}.{inner.name}", inner, given) for inner, given in value.ListFields()), path)


def _example(field: FieldDescriptor, neutral: tuple[object, ...]) -> object:
    """A neutral value as the client would write it, if it is worth a word."""
    example = neutral[-1] if neutral else None
    if field.enum_type is not None and isinstance(example, int):
        return field.enum_type.values_by_number[example].name
    return example if isinstance(example, int | float) else None


def _num_unknown_bytes(message: Message) -> int:
    """At any depth. The library does the walking, in a copy."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return message.ByteSize() - known.ByteSize()


def _first_unknown(message: Message, *, prefix: str) -> tuple[str, int]:
    """Where the first unknown field is, and its number. There is one.

    Not by UnknownFieldSet, which makes an object of each of them.
    """
    unknown = type(message)()
    unknown.CopyFrom(message)
    for field, _ in message.ListFields():
        unknown.ClearField(field.name)
    if raw := unknown.SerializePartialToString():
        return prefix, _first_number(raw)
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for entry in value if field.is_repeated else (value,):
                if _num_unknown_bytes(entry):
                    return _first_unknown(entry, prefix=f"{prefix}.{field.name}" if prefix else field.name)
    raise AssertionError("no field is unknown")


def _first_number(raw: bytes) -> int:
    """The field number in the first tag of an encoded message: a varint, of which the lowest three bits are the wire type."""
    tag = 0
    for position, byte in enumerate(raw):
        tag |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            break
    return tag >> 3
