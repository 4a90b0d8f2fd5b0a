"""One validator: what is honoured, what is refused, and with which words."""

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_scheduler import demo_files, model_entry
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hosted_templates import TEMPLATES

from quire.cluster.gateway.request_fields import HONOURED, MAX_ENTRIES, REFUSED, refuse_unsupported
from quire.cluster.gateway.sequence_fields import SequenceCounts
from quire.cluster.gateway.served_model import ServedModel, load_served_model
from quire.cluster.gateway.validation import (
    ChatPrompt,
    CheckedFields,
    LengthLimit,
    ResolvedRequest,
    check_fields,
    length_limit,
    request_id_of,
    resolve,
)
from quire.common.errors import InvalidRequest, NotSupported, QuireError
from quire.common.messages import BeamSearch, SamplingState
from quire.v1 import inference_pb2
from quire.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, OutputParams, SamplingParams, StoppingParams, TokenIds

LIMIT = LengthLimit(100, "max_model_len")


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return served()


def served(**settings: Any) -> ServedModel:
    files = demo_files()
    return load_served_model(model_entry(files, **({"logits_size": 4100} | settings)), files, TEMPLATES)


def check(model: ServedModel, **fields: Any) -> CheckedFields:
    if not {"text", "chat", "token_ids"} & fields.keys():
        fields["text"] = "hello"
    request = GenerateRequest(**fields)
    return check_fields(request, model, request_id=request_id_of(request))


def resolved(model: ServedModel, num_prompt_tokens: int = 10, **fields: Any) -> ResolvedRequest:
    return resolve(check(model, **fields), [5] * num_prompt_tokens, limit=LIMIT, vocab_size=4096, drawn_seed=77)


def test_a_prompt_is_cut_to_its_last_tokens_before_anything_is_counted(model: ServedModel) -> None:
    ids = list(range(3, 3003))
    fields: dict[str, Any] = {"token_ids": TokenIds(ids=ids), "truncate_prompt_tokens": 40}
    checked = check(model, **fields)
    assert checked.prompt == tuple(ids[-40:])
    cut = resolve(checked, ids[-40:], limit=LIMIT, vocab_size=4096, drawn_seed=1)
    assert (cut.prompt_ids, cut.max_tokens) == (tuple(ids[-40:]), 60)
    text = check(model, text="hello", truncate_prompt_tokens=2)
    assert resolve(text, [7, 8, 9], limit=LIMIT, vocab_size=4096, drawn_seed=1).prompt_ids == (8, 9)
    assert resolve(text, [9], limit=LIMIT, vocab_size=4096, drawn_seed=1).prompt_ids == (9,)
    for count in (0, 2049, 2**32 - 1):
        with pytest.raises(InvalidRequest, match=f"truncate_prompt_tokens is {count}; it takes 1 to 2048"):
            check(model, text="hello", truncate_prompt_tokens=count)


# -- every field of the request is either honoured or refused by name -------------------------------------------------


def walk(descriptor: Descriptor, prefix: str = "") -> Iterator[tuple[str, list[FieldDescriptor]]]:
    """Each field at any depth, with the fields that lead to it."""

    def inner(descriptor: Descriptor, prefix: str, way: list[FieldDescriptor]) -> Iterator[tuple[str, list[FieldDescriptor]]]:
        for field in descriptor.fields:
            path = prefix + field.name
            yield path, [*way, field]
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                yield from inner(field.message_type, path + ".", [*way, field])

    yield from inner(descriptor, prefix, [])


def set_field(message: Message, way: list[FieldDescriptor]) -> None:
    """Set the last field of the way to a value that is not neutral, and what is above it as far as it must be."""
    field, rest = way[0], way[1:]
    target = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        target[1] = 2.0
    elif field.message_type is not None and field.is_repeated:
        entry = target.add()
        if rest:
            set_field(entry, rest)
    elif field.message_type is not None:
        target.SetInParent()
        if rest:
            set_field(target, rest)
    else:
        value: Any = {
            FieldDescriptor.CPPTYPE_STRING: "x",
            FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
            FieldDescriptor.CPPTYPE_BOOL: True,
            FieldDescriptor.CPPTYPE_UINT32: 3,
            FieldDescriptor.CPPTYPE_UINT64: 3,
            FieldDescriptor.CPPTYPE_ENUM: 3,
        }[field.cpp_type]
        if field.is_repeated:
            target.append(value)
        else:
            setattr(message, field.name, value)


PATHS = dict(walk(GenerateRequest.DESCRIPTOR))


def is_refused(path: str) -> bool:
    return any(path == refused or path.startswith(refused + ".") for refused in REFUSED)


def test_the_tables_name_only_fields_that_exist() -> None:
    assert PATHS.keys() >= HONOURED
    assert PATHS.keys() >= REFUSED.keys()


@pytest.mark.parametrize("path", PATHS)
def test_each_field_is_either_honoured_or_refused_by_name(path: str) -> None:
    request = GenerateRequest()
    set_field(request, PATHS[path])
    assert (path in HONOURED) != is_refused(path)
    if path in HONOURED:
        refuse_unsupported(request)
    else:
        with pytest.raises(NotSupported, match=path.replace(".", r"\.")) as refused:
            refuse_unsupported(request)
        assert (refused.value.field, refused.value.reason) == (path, "NOT_SUPPORTED")


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": ""},
        {"n": 1, "best_of": 1},
        {"priority": inference_pb2.PRIORITY_UNSPECIFIED},
        {"sampling": SamplingParams(typical_p=1, repetition_penalty=1, presence_penalty=0, frequency_penalty=-0.0)},
        {"output": OutputParams(echo_prompt=False)},
    ],
)
def test_a_value_that_changes_nothing_is_taken(model: ServedModel, fields: dict[str, Any]) -> None:
    check(model, **fields)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"adapter": "a"}, "adapter"),
        ({"structured_output": inference_pb2.StructuredOutput(regex="a")}, "structured_output.regex"),
    ],
)
def test_what_no_code_honours_is_refused(model: ServedModel, fields: dict[str, Any], path: str) -> None:
    with pytest.raises(NotSupported) as refused:
        check(model, **fields)
    assert refused.value.field == path


def test_the_models_own_penalties_count_and_are_held_to_the_same_limits() -> None:
    penalized = served(default_sampling=SamplingParams(repetition_penalty=1.05, typical_p=0.9))
    assert (resolved(penalized).sampling.repetition_penalty, resolved(penalized).sampling.typical_p) == (1.05, 0.9)
    assert resolved(penalized, sampling=SamplingParams(repetition_penalty=1)).sampling.repetition_penalty == 1
    broken = served(default_sampling=SamplingParams(repetition_penalty=0))
    with pytest.raises(InvalidRequest, match="repetition_penalty is 0"):
        check(broken)
    check(broken, sampling=SamplingParams(repetition_penalty=1))


# -- fields that this server has no name for --------------------------------------------------------------------------


def with_unknown(message: Message, number: int, *, count: int = 1) -> Any:
    """The same message as a newer client sends it: with `count` fields of a number that ours does not have."""
    tag = number << 3
    return type(message).FromString(message.SerializeToString() + (bytes([tag & 0x7F | 0x80, tag >> 7]) + b"\x01") * count)


@pytest.mark.parametrize(
    ("request_", "message", "field"),
    [
        (with_unknown(GenerateRequest(text="x"), 99), "the request has a field of number 99", None),
        (with_unknown(GenerateRequest(text="x"), 99, count=1_000_000), "the request has a field of number 99", None),
        (GenerateRequest(text="x", sampling=with_unknown(SamplingParams(top_k=3), 1000)), "sampling has .* 1000", "sampling"),
        (
            GenerateRequest(chat=Chat(messages=[ChatMessage(role="user"), with_unknown(ChatMessage(role="user"), 77)])),
            "chat.messages has a field of number 77, which this server does not know; leave it unset",
            "chat.messages",
        ),
    ],
    ids=range(4),
)
def test_a_field_without_a_name_is_refused_by_its_number(
    model: ServedModel, request_: GenerateRequest, message: str, field: str | None
) -> None:
    with pytest.raises(NotSupported, match=message) as refused:
        check_fields(request_, model, request_id="r")
    assert (refused.value.reason, refused.value.field) == ("UNKNOWN_FIELD", field)


def test_the_advice_names_a_value_as_the_client_writes_it(model: ServedModel) -> None:
    for fields, advice in (
        ({"adapter": "a"}, "adapter is not supported yet; leave it unset$"),
        ({"structured_output": inference_pb2.StructuredOutput(json=True)}, "structured_output.json is not supported yet; leave it unset$"),
    ):
        with pytest.raises(NotSupported, match=advice):
            check(model, **fields)


# -- limits -----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    """A JSON object so many levels deep."""
    return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def calls(*tool_calls_json: str) -> ChatMessage:
    return ChatMessage(role="assistant", tool_calls_json=tool_calls_json)


CHAT = Chat(messages=[ChatMessage(role="user", content="hi")])
MANY = Chat(messages=[ChatMessage(role="user")] * 2049)


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        *[({"sampling": SamplingParams(temperature=value)}, "temperature is", "sampling.temperature") for value in (-0.1, 100.1)],
        *[({"sampling": SamplingParams(temperature=value)}, "temperature is", "sampling.temperature") for value in (math.nan, math.inf)],
        *[
            ({"sampling": SamplingParams(top_p=value)}, "above 0 to 1", "sampling.top_p")
            for value in (0.0, -1.0, 1.01, math.nan, -math.inf)
        ],
        *[({"sampling": SamplingParams(min_p=value)}, "it takes 0 to 1", "sampling.min_p") for value in (-0.01, 1.01, math.nan)],
        ({"n": 0}, "n is 0; it takes 1 to 8", "n"),
        ({"best_of": 0}, "best_of is 0", "best_of"),
        ({"priority": 9}, "priority 9", "priority"),
        ({"stopping": StoppingParams(max_tokens=0)}, "max_tokens is 0; it must be at least 1", "stopping.max_tokens"),
        ({"stopping": StoppingParams(stop_strings=["a"] * 5)}, "5 entries; it takes 4", "stopping.stop_strings"),
        ({"stopping": StoppingParams(stop_strings=[""])}, "0 characters", "stopping.stop_strings"),
        ({"stopping": StoppingParams(stop_strings=["x" * 257])}, "257 characters; it takes 1 to 256", "stopping.stop_strings"),
        ({"stopping": StoppingParams(stop_token_ids=range(65))}, "65 entries; it takes 64", "stopping.stop_token_ids"),
        ({"stopping": StoppingParams(stop_token_ids=[4100])}, "token id 4100; this model's ids are below 4100", "stopping.stop_token_ids"),
        *[({"cache_salt": salt}, "cache_salt has", "cache_salt") for salt in ("", "a b", "x" * 65, "ä", "a/b", "a\n")],
        *[({"request_id": name}, "request_id has", "request_id") for name in ("", "x" * 65, "é", "a\x00")],
        ({"text": ""}, "text is empty", "text"),
        ({"text": "x" * (8 * 2048 + 1)}, "16385 characters; this model takes 16384", "text"),
        ({"token_ids": TokenIds()}, "token_ids is empty", "token_ids.ids"),
        ({"token_ids": TokenIds(ids=[1] * 2049)}, r"prompt has 2049 tokens; this model takes 2048 \(max_model_len\); shorten it", None),
        ({"token_ids": TokenIds(ids=[1]), "parse_special_tokens": True}, "is for text prompts", "parse_special_tokens"),
        ({"chat": CHAT, "add_special_tokens": True}, "is for text prompts", "add_special_tokens"),
        ({"chat": Chat()}, "chat.messages has 0 entries", "chat.messages"),
        ({"chat": MANY}, "chat.messages has 2049 entries", "chat.messages"),
        ({"chat": Chat(messages=[ChatMessage()])}, "a role has 0 characters", "chat.messages.role"),
        ({"chat": Chat(messages=CHAT.messages, tools_json=["{}"] * 129)}, "129 entries", "chat.tools_json"),
        ({"chat": Chat(messages=CHAT.messages, tools_json=["["])}, "not a JSON object", "chat.tools_json"),
        ({"chat": Chat(messages=CHAT.messages, tools_json=["[1]"])}, "not a JSON object", "chat.tools_json"),
        ({"chat": Chat(messages=CHAT.messages, tools_json=["[" * 9000])}, "more than 64 levels deep", "chat.tools_json"),
        ({"chat": Chat(messages=CHAT.messages, tools_json=[nested(65)])}, "more than 64 levels deep", "chat.tools_json"),
        ({"chat": Chat(messages=[calls(nested(600))])}, "more than 64 levels deep", "chat.messages.tool_calls_json"),
        ({"chat": Chat(messages=[calls(*["{}"] * 129)])}, "129 entries; it takes 128", "chat.messages.tool_calls_json"),
        ({"chat": Chat(messages=[calls(*["{}"] * 128)] * 33)}, "4224 tool calls; it takes 4096", "chat.messages.tool_calls_json"),
        *[
            ({"chat": Chat(messages=[ChatMessage(**({"role": "tool"} | {name: "x" * 16385}))])}, "chat has 163", "chat")
            for name in ("role", "content", "name", "tool_call_id")
        ],
    ],
)
def test_values_outside_their_limits_are_refused_with_the_numbers(
    model: ServedModel, fields: dict[str, Any], message: str, field: str | None
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        check(model, **fields)
    assert refused.value.field == field


def test_json_of_the_greatest_depth_is_taken(model: ServedModel) -> None:
    prompt = check(model, chat=Chat(messages=[calls(nested(64))])).prompt
    assert isinstance(prompt, ChatPrompt)


def test_every_repeated_field_that_is_honoured_has_a_bound() -> None:
    repeated = {path for path, way in PATHS.items() if path in HONOURED and way[-1].is_repeated}
    assert repeated == MAX_ENTRIES.keys() | {"token_ids.ids"}


def beams(beam_count: int = 4, **fields: Any) -> inference_pb2.BeamSearchParams:
    return inference_pb2.BeamSearchParams(beam_count=beam_count, **fields)


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        *[({"n": n}, f"n is {n}; it takes 1 to 8", "n") for n in (0, 9, 2**32 - 1)],
        *[({"best_of": n}, f"best_of is {n}; it takes 1 to 8", "best_of") for n in (0, 9, 10**6)],
        ({"n": 3, "best_of": 2}, "best_of is 2 and n is 3; best_of must not be less", "best_of"),
        ({"n": 2, "sampling": SamplingParams(temperature=0)}, "n is 2 and temperature is 0", "n"),
        ({"best_of": 2, "sampling": SamplingParams(temperature=0)}, "best_of is 2 and temperature is 0", "best_of"),
        ({"n": 4, "beam_search": beams(3)}, "n is 4 and beam_count is 3", "n"),
        ({"n": 9, "beam_search": beams(10)}, "n is 9; it takes 1 to 8", "n"),
        ({"best_of": 4, "beam_search": beams()}, "best_of is for sampling", "best_of"),
        ({"beam_search": inference_pb2.BeamSearchParams()}, "has no beam_count; set it to 2 to 16", "beam_search.beam_count"),
        *[({"beam_search": beams(n)}, f"beam_count is {n}; it takes 2 to 16", "beam_search.beam_count") for n in (0, 1, 17)],
        *[
            ({"beam_search": beams(length_penalty=value)}, "it takes -10 to 10", "beam_search.length_penalty")
            for value in (math.nan, math.inf, -10.1, 11)
        ],
        ({"beam_search": beams(early_stopping=9)}, "early_stopping 9 is not one of", "beam_search.early_stopping"),
        *[
            ({"beam_search": beams(), "sampling": sampling}, f"leave {name} unset", f"sampling.{name}")
            for name, sampling in {
                "temperature": SamplingParams(temperature=0.7),
                "top_p": SamplingParams(top_p=0.5),
                "top_k": SamplingParams(top_k=3),
                "min_p": SamplingParams(min_p=0.1),
                "typical_p": SamplingParams(typical_p=0.5),
            }.items()
        ],
        ({"beam_search": beams(), "stopping": StoppingParams(stop_strings=["a"])}, "leave stop_strings unset", "stopping.stop_strings"),
        ({"beam_search": beams(), "output": OutputParams(logprobs=1)}, "leave logprobs unset", "output.logprobs"),
    ],
)
def test_counts_that_cannot_be_are_refused(model: ServedModel, fields: dict[str, Any], message: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        check(model, **fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("sampling", "message", "name"),
    [
        *[({"typical_p": value}, "above 0 to 1", "typical_p") for value in (0.0, -1, 1.01, math.nan, math.inf)],
        *[
            ({"repetition_penalty": value}, "it takes 0.01 to 100", "repetition_penalty")
            for value in (0.0, -1.0, 1e-30, 100.1, math.nan, math.inf, -math.inf)
        ],
        *[
            ({name: value}, "it takes -2 to 2", name)
            for name in ("presence_penalty", "frequency_penalty")
            for value in (-2.01, 2.01, math.nan, math.inf)
        ],
        *[({"logit_bias": {5: value}}, "it takes -100 to 100", "logit_bias") for value in (-100.1, 101, math.nan, math.inf, -math.inf)],
        ({"logit_bias": {4100: 1.0}}, "logit_bias holds token id 4100; this model's ids are below 4100", "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "301 entries; it takes 300", "logit_bias"),
        ({"allowed_token_ids": TokenIds(ids=[1, 4100])}, "allowed_token_ids holds token id 4100", "allowed_token_ids"),
        ({"allowed_token_ids": TokenIds(ids=range(1025))}, "1025 entries; it takes 1024", "allowed_token_ids.ids"),
        ({"allowed_token_ids": TokenIds()}, "0 tokens are allowed and 0 are bad, which leaves none", "allowed_token_ids"),
        (
            {"allowed_token_ids": TokenIds(ids=[5, 6]), "bad_token_ids": TokenIds(ids=[6, 5, 4])},
            "2 tokens are allowed and 3 are bad, which leaves none to draw",
            "allowed_token_ids",
        ),
        ({"bad_token_ids": TokenIds(ids=[2**32 - 1])}, "bad_token_ids holds token id 4294967295", "bad_token_ids"),
        ({"bad_token_ids": TokenIds(ids=range(1025))}, "1025 entries; it takes 1024", "bad_token_ids.ids"),
        ({"bad_words": [""]}, "a bad word has 0 characters; it takes 1 to 256", "bad_words"),
        ({"bad_words": ["  "]}, "not all of them spaces", "bad_words"),
        ({"bad_words": ["x" * 257]}, "a bad word has 257 characters", "bad_words"),
        ({"bad_words": ["x"] * 301}, "301 entries; it takes 300", "bad_words"),
    ],
)
def test_rules_and_penalties_outside_their_limits_are_refused(
    model: ServedModel, sampling: dict[str, Any], message: str, name: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        check(model, sampling=SamplingParams(**sampling))
    assert refused.value.field == f"sampling.{name}"


def test_rules_that_leave_only_end_tokens_are_refused_with_min_tokens(model: ServedModel) -> None:
    only_the_end = SamplingParams(allowed_token_ids=TokenIds(ids=[0]))
    assert resolved(model, sampling=only_the_end).sampling.allowed_ids == (0,)
    with pytest.raises(InvalidRequest, match="only 1 tokens may be drawn, all of which end the sequence, and min_tokens is 1"):
        check(model, sampling=only_the_end, stopping=StoppingParams(min_tokens=1))
    tiny = served(logits_size=3)
    with pytest.raises(InvalidRequest, match="3 tokens are allowed and 3 are bad"):
        check(tiny, sampling=SamplingParams(bad_token_ids=TokenIds(ids=[0, 1, 2])))


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("count", [21, 128, 2**32 - 1])
def test_more_log_probabilities_than_20_are_refused(model: ServedModel, name: str, count: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is .*; it takes 0 to 20") as refused:
        check(model, output=OutputParams(**{name: count}))  # type: ignore[arg-type]
    assert refused.value.field == f"output.{name}"
    with pytest.raises(InvalidRequest, match="it takes 0 to 5"):
        check(served(logits_size=5), output=OutputParams(**{name: 6}))  # type: ignore[arg-type]


def test_a_prompts_log_probabilities_must_fit_into_one_message(model: ServedModel) -> None:
    fields = check(model, output=OutputParams(prompt_logprobs=20))
    limit = LengthLimit(10_000, "max_model_len")
    resolve(fields, [5] * 3120, limit=limit, vocab_size=4096, drawn_seed=0)
    with pytest.raises(InvalidRequest, match=r"prompt_logprobs is 20 and prompt has 3121 tokens, 65541 log .* one answer takes 65536"):
        resolve(fields, [5] * 3121, limit=limit, vocab_size=4096, drawn_seed=0)


def test_what_is_within_the_limits_is_taken_as_it_is(model: ServedModel) -> None:
    sampling = SamplingParams(
        typical_p=0.5,
        repetition_penalty=100,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={4099: -100, 3: 100},
        allowed_token_ids=TokenIds(ids=[7, 3, 7]),
        bad_token_ids=TokenIds(ids=[9, 9]),
    )
    request = resolved(
        model,
        sampling=sampling,
        output=OutputParams(logprobs=20, prompt_logprobs=0, echo_prompt=True),
        n=2,
        best_of=8,
        priority=inference_pb2.PRIORITY_LOW,
    )
    assert request.sampling == SamplingState(
        temperature=0.8,
        top_p=0.95,
        typical_p=0.5,
        repetition_penalty=100.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        seed=77,
        stop_ids=(0,),
        bias=((3, 100.0), (4099, -100.0)),
        allowed_ids=(7, 3),
        bad_ids=(9,),
        num_logprobs=20,
        num_prompt_logprobs=0,
    )
    assert (request.counts, request.priority, request.shows_logprobs, request.echo_prompt) == (SequenceCounts(2, 8), 1, True, True)
    assert (resolved(model).counts, resolved(model).priority) == (SequenceCounts(), 2)


def test_a_best_of_has_its_log_probabilities_computed(model: ServedModel) -> None:
    for fields, computed, shown in (
        ({"n": 2}, None, False),
        ({"n": 2, "best_of": 2}, None, False),
        ({"best_of": 2}, 0, False),
        ({"best_of": 2, "output": OutputParams(logprobs=3)}, 3, True),
    ):
        request = resolved(model, **fields)
        assert (request.sampling.num_logprobs, request.shows_logprobs) == (computed, shown)


def test_a_beam_search_is_taken_with_the_models_own_defaults_for_drawing(model: ServedModel) -> None:
    assert resolved(model, beam_search=beams()).counts == SequenceCounts(1, 1, BeamSearch(4, 1.0, 1))
    for temperature in (0.0, 1.0):
        search = beams(16, length_penalty=-1, early_stopping=inference_pb2.EARLY_STOPPING_FIRST)
        request = resolved(model, n=8, beam_search=search, sampling=SamplingParams(temperature=temperature, repetition_penalty=2))
        assert request.counts == SequenceCounts(8, 1, BeamSearch(16, -1.0, 2))


def test_a_bad_word_counts_at_the_start_of_a_text_and_behind_a_space(model: ServedModel) -> None:
    state = resolved(model, sampling=SamplingParams(bad_words=["fox", " fox", "xyzzy"], bad_token_ids=TokenIds(ids=[5]))).sampling
    expected = {tuple(model.tokenizer.encode(form, add_special_tokens=False, parse_special_tokens=False)) for form in
                ("fox", " fox", "xyzzy", " xyzzy")}  # fmt: skip
    assert state.bad_ids[0] == 5
    assert {*((token_id,) for token_id in state.bad_ids[1:]), *state.bad_sequences} == expected
    assert all(len(sequence) > 1 for sequence in state.bad_sequences)


LARGEST = 4 * 2**20  # bytes of a request


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (GenerateRequest(chat=Chat(messages=[ChatMessage()] * (LARGEST // 2))), "2097152 entries"),
        (GenerateRequest(chat=Chat(tools_json=[""] * (LARGEST // 2))), "2097152 entries"),
        (GenerateRequest(chat=Chat(messages=[calls(*[""] * (LARGEST // 2))])), "2097152 entries"),
        (GenerateRequest(token_ids=TokenIds(ids=[1] * LARGEST)), "4194304 tokens"),
        (GenerateRequest(text="x", stopping=StoppingParams(stop_strings=[""] * (LARGEST // 2))), "2097152 entries"),
        (GenerateRequest(text="x", stopping=StoppingParams(stop_token_ids=[1] * LARGEST)), "4194304 entries"),
        (GenerateRequest(text="x", sampling=SamplingParams(bad_words=[""] * (LARGEST // 2))), "2097152 entries; it takes 300"),
        (GenerateRequest(text="x", sampling=SamplingParams(bad_token_ids=TokenIds(ids=[1] * LARGEST))), "4194304 entries"),
        (GenerateRequest(text="x", sampling=SamplingParams(allowed_token_ids=TokenIds(ids=[1] * LARGEST))), "4194304 entries"),
        (GenerateRequest(text="x", sampling=SamplingParams(logit_bias=dict.fromkeys(range(300_000), 1.0))), "300000 entries; it takes 300"),
    ],
    ids=range(10),
)
def test_a_request_of_millions_of_entries_is_refused_without_a_look_at_them(
    model: ServedModel, request_: GenerateRequest, error: str
) -> None:
    def measure_s() -> float:
        started_s = time.thread_time()
        with pytest.raises(QuireError, match=error):
            check_fields(request_, model, request_id="r")
        return time.thread_time() - started_s

    assert min(measure_s() for _ in range(3)) < 0.005  # 0.00002 s on a 2-core x86 machine; a look at them takes 0.5 s


def test_a_request_without_a_prompt_is_refused(model: ServedModel) -> None:
    with pytest.raises(InvalidRequest, match="no prompt"):
        check_fields(GenerateRequest(), model, request_id="r")


@pytest.mark.parametrize(
    ("num_prompt_tokens", "stopping", "message"),
    [
        (0, {}, "has no tokens"),
        (101, {}, r"^prompt has 101 tokens; this model takes 100 \(max_model_len\); shorten it$"),
        (100, {}, "leaves none of 100"),
        (10, {"max_tokens": 91}, "prompt has 10 tokens and max_tokens is 91, 101 together; .* lower max_tokens to 90"),
        (10, {"max_tokens": 5, "min_tokens": 6}, "min_tokens is 6 and max_tokens is 5"),
        (10, {"min_tokens": 91}, "min_tokens is 91 and max_tokens is 90"),  # the default of max_tokens counts too
    ],
)
def test_lengths_that_do_not_fit_are_refused(model: ServedModel, num_prompt_tokens: int, stopping: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        resolved(model, num_prompt_tokens, stopping=StoppingParams(**stopping))


def test_prompt_ids_are_held_against_the_models_width(model: ServedModel) -> None:
    with pytest.raises(InvalidRequest, match="token id 4096; this model's ids are below 4096"):
        resolve(check(model), [1, 4096], limit=LIMIT, vocab_size=4096, drawn_seed=0)


@pytest.mark.parametrize(
    ("discovered", "scheduler", "expected"),
    [(2048, 0, 2048), (0, 0, 2048), (500, 0, 500), (500, 400, 400), (0, 300, 300), (9999, 9999, 2048)],
)
def test_the_smallest_limit_counts(discovered: int, scheduler: int, expected: int) -> None:
    limit = length_limit(served(max_request_tokens=discovered), scheduler_max_request_tokens=scheduler)
    assert limit.num_tokens == expected
    assert limit.name.startswith("max_model_len" if expected == 2048 else "max_request_tokens")


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_the_request_goes_before_the_models_defaults_and_those_before_neutral_ones() -> None:
    model = served(default_sampling=SamplingParams(temperature=0.8, top_p=0.95, top_k=20), eos_token_ids=(0, 3))
    assert resolved(model).sampling == SamplingState(temperature=0.8, top_p=0.95, top_k=20, seed=77, stop_ids=(0, 3))
    given = SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0.1, seed=2**64 - 1)
    stopping = StoppingParams(stop_token_ids=[7, 3, 7, 4099], min_tokens=2)
    assert resolved(model, sampling=given, stopping=stopping).sampling == SamplingState(
        temperature=0.0, min_p=0.1, seed=2**64 - 1, min_tokens=2, stop_ids=(0, 3, 7, 4099)
    )
    assert resolved(model, stopping=StoppingParams(ignore_eos=True)).sampling.stop_ids == ()
    neutral = served(default_sampling=SamplingParams())
    assert resolved(neutral).sampling == SamplingState(seed=77, stop_ids=(0,))


def test_what_is_left_after_the_prompt_is_the_default_of_max_tokens(model: ServedModel) -> None:
    assert resolved(model, 10).max_tokens == 90
    assert resolved(model, 99).max_tokens == 1
    assert resolved(model, 10, stopping=StoppingParams(max_tokens=90)).max_tokens == 90


def test_a_turn_without_content_has_none_if_it_calls_tools_and_is_empty_if_not(model: ServedModel) -> None:
    call = '{"type": "function", "function": {"name": "f"}}'
    for fields, content in (
        ({"tool_calls_json": [call]}, None),
        ({"tool_calls_json": [call], "content": ""}, ""),
        ({"tool_calls_json": [call], "content": "a"}, "a"),
        ({}, ""),
    ):
        message = ChatMessage(role="assistant", **fields)
        prompt = check(model, chat=Chat(messages=[message])).prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.messages[0]["content"] == content


def test_the_server_names_a_request_that_has_no_name(model: ServedModel) -> None:
    assert check(model, request_id="my-1.a_B").request_id == "my-1.a_B"
    assert check(model).request_id != check(model).request_id


def test_an_error_never_quotes_what_the_client_wrote(model: ServedModel) -> None:
    secret = "my_secret words"
    for fields in (
        {"cache_salt": secret},
        {"request_id": secret},
        {"stopping": StoppingParams(stop_strings=[secret * 100])},
        {"chat": Chat(messages=CHAT.messages, tools_json=[secret])},
        {"text": secret * 5000},
        {"sampling": SamplingParams(bad_words=[secret * 100])},
    ):
        with pytest.raises(QuireError) as refused:
            check(model, **fields)
        assert "secret" not in f"{refused.value.message} {refused.value.metadata}"
