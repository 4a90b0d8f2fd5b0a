"""Requests and results against the message descriptors: nothing of the contract is out of the SDK's reach."""

import json
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest
from google.protobuf import duration_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from quire.client import InvalidRequest, Message, wire
from quire.client.options import ChatOptions, GenerateOptions, RequestOptions
from quire.v1 import cluster_pb2, inference_pb2

EVERY_OPTION: dict[str, Any] = {
    "model": "m",
    "adapter": "a",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 0,
    "min_p": 0.1,
    "typical_p": 0.8,
    "repetition_penalty": 1.1,
    "presence_penalty": -1.0,
    "frequency_penalty": 1.0,
    "seed": 2**64 - 1,
    "logit_bias": {5: -3.5},
    "allowed_token_ids": [1, 2],
    "bad_token_ids": [3],
    "bad_words": ["bad"],
    "max_tokens": 8,
    "min_tokens": 0,
    "stop": ["end"],
    "stop_token_ids": [0],
    "ignore_eos": False,
    "include_stop_string": True,
    "n": 2,
    "best_of": 3,
    "logprobs": 0,
    "prompt_logprobs": 1,
    "echo_prompt": True,
    "skip_special_tokens": False,
    "num_beams": 4,
    "length_penalty": 0.5,
    "early_stopping": "never",
    "truncate_prompt_tokens": 16,
    "priority": "high",
    "cache_salt": "salt",
    "request_id": "r1",
}
EVERY_FORM: dict[str, Any] = {
    "json": True,
    "json_schema": {"type": "object"},
    "regex": "a+",
    "choices": ["yes", "no"],
    "grammar": "root ::= 'a'",
}
CONVERSATION: list[Message] = [
    {"role": "user", "content": "Hello", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    {"role": "tool", "content": "1", "tool_call_id": "c1"},
]
TOKENIZE_UNSET: dict[str, Any] = {
    "model": None,
    "add_special_tokens": None,
    "parse_special_tokens": None,
    "tools": None,
    "add_generation_prompt": None,
}


def leaves(descriptor: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field that holds a value, through all messages of a message."""
    for field in descriptor.fields:
        here = (*path, field.name)
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            yield here
        else:
            yield from leaves(field.message_type, here)


def set_leaves(message: ProtoMessage, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field, value in message.ListFields():
        here = (*path, field.name)
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            yield here
        else:
            for inner in [value] if isinstance(value, ProtoMessage) else value:
                yield from set_leaves(inner, here)


def test_every_field_of_a_generate_request_can_be_set() -> None:
    requests = [
        wire.generate_request("text", {**EVERY_OPTION, "add_special_tokens": False, "parse_special_tokens": True}),
        wire.generate_request([1, 2, 3], {}),
        wire.chat_request(CONVERSATION, {"tools": [{"name": "f"}], "add_generation_prompt": False}),
        *(wire.generate_request("text", {name: value}) for name, value in EVERY_FORM.items()),
    ]
    reached = {leaf for request in requests for leaf in set_leaves(request)}
    assert reached == set(leaves(inference_pb2.GenerateRequest.DESCRIPTOR))


def test_every_field_of_the_small_requests_can_be_set() -> None:
    given: dict[str, Any] = {
        "model": "m",
        "add_special_tokens": False,
        "parse_special_tokens": True,
        "tools": ["{}"],
        "add_generation_prompt": False,
    }
    tokenize = [wire.tokenize_request(prompt, **given) for prompt in ("text", CONVERSATION)]
    detokenize = wire.detokenize_request([1], model="m", skip_special_tokens=False)
    assert {leaf for request in tokenize for leaf in set_leaves(request)} == set(leaves(inference_pb2.TokenizeRequest.DESCRIPTOR))
    assert set(set_leaves(detokenize)) == set(leaves(inference_pb2.DetokenizeRequest.DESCRIPTOR))


def test_the_typed_options_are_exactly_those_that_are_understood() -> None:
    assert set(get_type_hints(RequestOptions)) == {*EVERY_OPTION, *EVERY_FORM, "timeout_s"}
    assert set(get_type_hints(GenerateOptions)) - set(get_type_hints(RequestOptions)) == {"add_special_tokens", "parse_special_tokens"}
    assert set(get_type_hints(ChatOptions)) - set(get_type_hints(RequestOptions)) == {"tools", "add_generation_prompt"}


def test_what_is_not_given_is_not_on_the_wire() -> None:
    assert list(set_leaves(wire.generate_request("x", dict.fromkeys(EVERY_OPTION)))) == [("text",)]
    assert wire.chat_request([], {}).WhichOneof("prompt") == "chat"
    assert not wire.chat_request([("user", "x")], {}).chat.HasField("add_generation_prompt")
    assert list(set_leaves(wire.tokenize_request("x", **TOKENIZE_UNSET))) == [("text",)]


def test_what_is_given_is_on_the_wire_even_when_it_is_zero_false_or_empty() -> None:
    request = wire.generate_request([], {"temperature": 0, "seed": 0, "ignore_eos": False, "allowed_token_ids": []})
    assert request.WhichOneof("prompt") == "token_ids"
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert request.sampling.HasField("allowed_token_ids")
    assert request.stopping.HasField("ignore_eos")


def test_one_text_is_one_text_where_several_may_be_given() -> None:
    request = wire.generate_request("x", {"stop": "end", "bad_words": "bad"})
    assert list(request.stopping.stop_strings) == ["end"]
    assert list(request.sampling.bad_words) == ["bad"]
    assert list(wire.generate_request("x", {"choices": "yes"}).structured_output.choices.texts) == ["yes"]


def test_a_schema_and_tools_may_be_mappings_or_json_text() -> None:
    for schema in ({"type": "integer"}, '{"type": "integer"}'):
        request = wire.generate_request("x", {"json_schema": schema})
        assert json.loads(request.structured_output.json_schema) == {"type": "integer"}
    chat = wire.chat_request([("user", "x")], {"tools": [{"a": 1}, '{"b": 2}']}).chat
    assert [json.loads(tool) for tool in chat.tools_json] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"temperature": "hot"}, "temperature", "temperature is of type str; it takes a number"),
        ({"top_k": -1}, "top_k", "top_k is -1; it takes a whole number from 0 to 2**32 - 1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5; it takes a whole number"),
        ({"seed": 2**64}, "seed", "2**64 - 1"),
        ({"stop": 5}, "stop", "stop is 5; it takes a list of texts"),
        ({"stop": [5]}, "stop", "a list of texts"),
        ({"bad_token_ids": ["a"]}, "bad_token_ids", "a list of whole numbers"),
        ({"logit_bias": [1]}, "logit_bias", "a mapping of token ids to numbers"),
        ({"priority": "urgent"}, "priority", "'low' or 'normal' or 'high'"),
        ({"early_stopping": True}, "early_stopping", "'heuristic' or 'first' or 'never'"),
        ({"ignore_eos": "no"}, "ignore_eos", "true or false"),
        ({"regex": "a", "json": True}, "json", "a completion has one form"),
    ],
)
def test_a_value_that_the_field_cannot_hold_is_refused_by_name(options: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.generate_request("x", options)
    assert caught.value.field == field
    assert says in caught.value.message


def test_an_option_that_does_not_exist_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(TypeError, match="no option 'temprature'; did you mean 'temperature'"):
        wire.generate_request("x", {"temprature": 1})
    for name in ("sampling", "text", "chat", "tools"):
        with pytest.raises(TypeError, match="no option"):
            wire.generate_request("x", {name: "y"})


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "takes a list of messages"),
        ({"role": "user", "content": "x"}, "takes a list of messages"),
        (["hello"], r"messages\[0\] takes \(role, content\)"),
        ([{"role": "user", "text": "x"}], r"messages\[0\] has a key 'text'; it takes role, content"),
        ([("user", "x"), {"content": "x"}], r"messages\[1\] has no role"),
        ([("user", 5)], r"messages\[0\].content is 5; it takes text"),
    ],
)
def test_a_malformed_message_is_refused_by_its_place(messages: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        wire.chat_request(messages, {})


def test_a_prompt_that_is_neither_text_nor_ids_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt is of type list; it takes a list of whole numbers"):
        wire.generate_request(["text"], {})  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="prompt is 5"):
        wire.generate_request(5, {})  # type: ignore[arg-type]


def test_half_a_character_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt has half a character"):
        wire.generate_request("a\ud83d", {})
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content has half a character"):
        wire.chat_request([("user", "a\ud83d")], {})


RESPONSES: list[tuple[type[ProtoMessage], Callable[[Any], Any]]] = [
    (inference_pb2.GenerateResponse, wire.generation),
    (inference_pb2.GenerateStreamResponse, wire.delta),
    (inference_pb2.ListModelsResponse, wire.models),
    (inference_pb2.TokenizeResponse, wire.tokenized_prompt),
    (cluster_pb2.ListGroupsResponse, lambda response: wire.groups(response.groups)),
    (cluster_pb2.GetQueueResponse, wire.queue),
    (cluster_pb2.GetBlocksResponse, wire.group_blocks),
]


@pytest.mark.parametrize(("response_class", "parse"), RESPONSES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_a_response_reaches_the_result(response_class: type[ProtoMessage], parse: Callable[[Any], Any]) -> None:
    for path in leaves(response_class.DESCRIPTOR):
        empty, filled = response_class(), response_class()
        put(empty, path, filled=False)
        put(filled, path, filled=True)
        assert parse(empty) != parse(filled), f"{'.'.join(path)} is lost"


def put(message: ProtoMessage, path: tuple[str, ...], *, filled: bool) -> None:
    """Make every message on the way to a leaf, and give the leaf itself a value if `filled`."""
    for name in path[:-1]:
        field = getattr(message, name)
        if hasattr(field, "add"):
            message = field.add()
        else:
            field.SetInParent()
            message = field
    field = getattr(message, path[-1])
    descriptor: FieldDescriptor = message.DESCRIPTOR.fields_by_name[path[-1]]  # type: ignore[assignment]
    if not filled:
        return
    if hasattr(field, "update"):
        field.update({1: 1.0})
    elif hasattr(field, "extend"):
        field.extend([b"a" if isinstance(field, bytes) else "a" if descriptor.cpp_type == FieldDescriptor.CPPTYPE_STRING else 1])
    else:
        setattr(message, path[-1], "a" if isinstance(field, str) else b"a" if isinstance(field, bytes) else type(field)(1))


def test_choices_carry_their_own_index_log_probabilities_and_their_sum() -> None:
    def entry(token_id: int, logprob: float) -> inference_pb2.TokenLogprobs:
        token = inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob, rank=1, text="a")
        return inference_pb2.TokenLogprobs(token=token, top=[token])

    response = inference_pb2.GenerateResponse(
        completions=[
            inference_pb2.Completion(index=0, token_ids=[5], logprobs=[entry(5, -0.5)], cumulative_logprob=-0.5),
            inference_pb2.Completion(index=1, token_ids=[6]),
        ],
        prompt_logprobs=[entry(7, -2.0)],
    )
    first, second = wire.generation(response).choices
    (logprobs,) = first.logprobs
    assert (first.index, logprobs.token.token_id, logprobs.token.logprob, logprobs.top) == (0, 5, -0.5, (logprobs.token,))
    assert (first.cumulative_logprob, second.cumulative_logprob, second.logprobs) == (-0.5, None, ())
    assert [each.token.token_id for each in wire.generation(response).prompt_logprobs] == [7]
    news = inference_pb2.GenerateStreamResponse(index=2, logprobs=[entry(5, -0.5)], cumulative_logprob=0.0)
    assert (wire.delta(news).index, wire.delta(news).logprobs, wire.delta(news).cumulative_logprob) == (2, (logprobs,), 0.0)


def test_durations_become_seconds() -> None:
    timings = inference_pb2.Timings(total=duration_pb2.Duration(seconds=1, nanos=500_000_000), queue=duration_pb2.Duration(nanos=1))
    parsed = wire.generation(inference_pb2.GenerateResponse(timings=timings)).timings
    assert parsed.total_s == 1.5
    assert parsed.queue_s == 1e-9


def test_values_newer_than_this_sdk_are_unknown() -> None:
    response = inference_pb2.GenerateStreamResponse.FromString(b"\x30\x63")  # finish_reason = 99
    assert wire.delta(response).finish_reason == "unknown"
    groups = cluster_pb2.ListGroupsResponse.FromString(b"\x0a\x02\x18\x63")  # state = 99
    assert wire.groups(groups.groups)[0].state == "UNKNOWN"
