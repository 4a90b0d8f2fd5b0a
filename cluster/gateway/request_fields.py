"""Which request fields are honoured. A set field that is not in HONOURED is refused by name, new ones included."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from google.protobuf.message import Message

from quire.common.errors import NotSupported
from quire.v1 import inference_pb2

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
        "sampling",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.top_k",
        "sampling.min_p",
        "sampling.seed",
        "stopping",
        "stopping.max_tokens",
        "stopping.min_tokens",
        "stopping.stop_strings",
        "stopping.stop_token_ids",
        "stopping.ignore_eos",
        "stopping.include_stop_string",
        "output",
        "output.skip_special_tokens",
        "cache_salt",
        "request_id",
    }
)

# Fields that no code honours yet, with the values that change nothing and are therefore taken.
REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "adapter": ("",),
    "truncate_prompt_tokens": (),
    "sampling.typical_p": (1.0,),
    "sampling.repetition_penalty": (1.0,),
    "sampling.presence_penalty": (0.0,),
    "sampling.frequency_penalty": (0.0,),
    "sampling.logit_bias": (),
    "sampling.allowed_token_ids": (),
    "sampling.bad_token_ids": (),
    "sampling.bad_words": (),
    "output.logprobs": (),
    "output.prompt_logprobs": (),
    "output.echo_prompt": (False,),
    "beam_search": (),
    "structured_output": (),
    "n": (1,),
    "best_of": (1,),
    "priority": (inference_pb2.PRIORITY_UNSPECIFIED, inference_pb2.PRIORITY_NORMAL),
}


def refuse_unsupported(message: Message, *, prefix: str = "") -> None:
    """Refuse the first set field that no code honours, at any depth, unless its value changes nothing.

    Raises:
        NotSupported: names the field.
    """
    for name, values in _set_fields(message):
        path = prefix + name
        if path in HONOURED:
            for value in values:
                if isinstance(value, Message):
                    refuse_unsupported(value, prefix=path + ".")
        elif not all(value in REFUSED.get(path, ()) for value in values):
            raise not_supported(_first_leaf(path, values), neutral=REFUSED.get(path, ()))


def not_supported(path: str, *, neutral: tuple[object, ...] = (), why: str = "") -> NotSupported:
    """The refusal of a field, by name."""
    alternative = f" or set it to {neutral[-1]}" if neutral and isinstance(neutral[-1], int | float) else ""
    return NotSupported(f"{path} is not supported yet{why}; leave it unset{alternative}", field=path, metadata={"field": path})


def _set_fields(message: Message) -> Iterator[tuple[str, list[Any]]]:
    """Each set field with its value, or its values if it is repeated. A map's values are its keys: none of them is honoured."""
    for descriptor, value in message.ListFields():
        is_single = isinstance(value, Message | str | bytes) or not isinstance(value, Iterable)
        yield descriptor.name, [value] if is_single else list(value)


def _first_leaf(path: str, values: list[Any]) -> str:
    for value in values:
        if isinstance(value, Message):
            for name, inner in _set_fields(value):
                return _first_leaf(f"{path}.{name}", inner)
    return path
