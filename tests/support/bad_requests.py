"""Requests that cannot be served as they are, by name: after what has stopped other servers, or made them leak.

They are written for a model of 4,096 tokens and 256 positions whose pool holds 192 tokens of one request. Every text that a
client writes holds MARKER: no error and no log may repeat it.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from quire.client import wire
from quire.common.errors import InvalidRequest, NotFound, NotSupported, QuireError
from quire.v1 import inference_pb2

MARKER: Final = "ZEBRAFISH"
PROMPT: Final = f"Once upon a {MARKER} time"
VOCABULARY: Final = 4096
MAX_MODEL_LEN: Final = 256
MAX_REQUEST_TOKENS: Final = 192
MAX_CHARS: Final = 8 * MAX_MODEL_LEN
LONG_TEXT: Final = MARKER + "x" * 10**5
MEGABYTE: Final = MARKER + "x" * 10**6
# What the gateway receives for this model; its parts are in common/config.request_bytes.
MAX_BYTES: Final = 256 * 1024 + 8 * MAX_MODEL_LEN + 5 * VOCABULARY
NAN: Final = float("nan")
INFINITY: Final = float("inf")


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A request and what must be said of it."""

    name: str
    words: str  # of the error's message, as a pattern; with the number at fault where there is one
    prompt: Any = PROMPT  # a text, token ids, or the messages of a conversation
    options: dict[str, Any] = field(default_factory=dict)
    raw: bytes = b""  # more of the message, encoded: what the SDK cannot say
    error: type[QuireError] = InvalidRequest
    reason: str = "INVALID_REQUEST"

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list)

    @property
    def is_sayable(self) -> bool:
        """Whether the SDK can say it."""
        return not self.raw and self.prompt is not None

    @property
    def is_for_tokenize(self) -> bool:
        """Whether Tokenize refuses it too: it knows no lengths in tokens, nor options."""
        if not self.is_sayable or self.options.keys() - {"tools"}:
            return False
        return self.is_chat if self.name != "turn of too many tokens" else False

    def request(self) -> inference_pb2.GenerateRequest:
        """It as a message."""
        make = wire.chat_request if self.is_chat else wire.generate_request
        request = inference_pb2.GenerateRequest() if self.prompt is None else make(self.prompt, self.options)
        request.MergeFromString(self.raw)
        return request


def raw(**fields: Any) -> bytes:
    """Fields of a GenerateRequest, encoded."""
    return inference_pb2.GenerateRequest(**fields).SerializeToString()


def unknown(number: int) -> bytes:
    """A field of this number that holds MARKER."""
    head = bytearray()
    tag = number << 3 | 2
    while tag > 127:
        head.append(tag & 127 | 128)
        tag >>= 7
    return bytes([*head, tag, len(MARKER)]) + MARKER.encode()


def inside(name: str, inner: bytes) -> bytes:
    """An encoded message as the field of that name of a GenerateRequest."""
    number = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[name].number
    assert number < 16, "its tag has one byte"
    assert len(inner) < 128, "its length has one byte"
    return bytes([number << 3 | 2, len(inner)]) + inner


def user(content: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def _lengths() -> list[BadRequest]:
    """Prompts and completions that are empty or too long, also by defaults."""
    empty: dict[str, Any] = {"reason": "EMPTY_PROMPT"}
    long: dict[str, Any] = {"reason": "PROMPT_TOO_LONG"}
    too_long: dict[str, Any] = {"reason": "REQUEST_TOO_LONG"}
    too_large: dict[str, Any] = {"reason": "MESSAGE_TOO_LARGE"}
    larger = rf"the request has 10\d{{5}} bytes, and this server takes {MAX_BYTES} \(max_request_bytes\)"
    return [
        BadRequest("empty text", "text is empty; give it at least one", prompt="", **empty),
        BadRequest("empty token ids", "token_ids is empty; give it at least one", prompt=(), **empty),
        BadRequest("no turns", "chat.messages has 0 entries", prompt=(), raw=raw(chat=inference_pb2.Chat()), **empty),
        BadRequest("text of a megabyte", larger, prompt=MEGABYTE, **too_large),
        BadRequest("text of 100,000 characters", f"text has 100009 characters; this model takes {MAX_CHARS}", prompt=LONG_TEXT, **long),
        BadRequest("text of one character too many", f"has {MAX_CHARS + 1} characters", prompt=(MARKER * 300)[: MAX_CHARS + 1], **long),
        BadRequest("text of too many tokens", r"prompt has \d+ tokens; this model takes 192", prompt=MARKER * 150, **long),
        BadRequest("more ids than positions", "prompt has 257 tokens; this model takes 256", prompt=(5,) * 257, **long),
        BadRequest("a million ids", larger, prompt=(5,) * 10**6, **too_large),
        BadRequest("100,000 ids", r"has more than 256 token ids, in 1000\d\d", prompt=(5,) * 10**5, **long),
        BadRequest("more ids than the pool holds", r"has 193 tokens; this model takes 192 \(max_request", prompt=(5,) * 193, **long),
        BadRequest("no room for a completion", "prompt has 192 tokens, which leaves none of 192", prompt=(5,) * 192, **long),
        BadRequest(
            "together one too many", "prompt has 100 tokens and max_tokens is 93, 193 together", (5,) * 100, {"max_tokens": 93}, **too_long
        ),
        BadRequest("max_tokens beyond all", "max_tokens is 4294967295", (5,), {"max_tokens": 2**32 - 1}, **too_long),
        BadRequest("max_tokens 0", "max_tokens is 0; it must be at least 1", options={"max_tokens": 0}),
        BadRequest("min above max", "min_tokens is 9 and max_tokens is 8", options={"min_tokens": 9, "max_tokens": 8}),
        BadRequest("min above the default of max", "min_tokens is 93 and max_tokens is 92", (5,) * 100, {"min_tokens": 93}),
        BadRequest("min beyond all", "min_tokens is 4294967295", options={"min_tokens": 2**32 - 1}),
        BadRequest("truncated to nothing", "truncate_prompt_tokens is 0; it takes 1 to 256", options={"truncate_prompt_tokens": 0}),
        BadRequest("truncated to too much", "truncate_prompt_tokens is 257; it takes", options={"truncate_prompt_tokens": 257}),
        BadRequest("truncated, still too long", "leaves none of 192", (5,) * 400, {"truncate_prompt_tokens": 192}, **long),
        BadRequest("truncated text of 100,000", "has 100009 characters", LONG_TEXT, {"truncate_prompt_tokens": 5}, **long),
    ]


def _token_ids() -> list[BadRequest]:
    """Ids that the model has no row for, too many of them, and too few to draw from."""
    wrong: dict[str, Any] = {"reason": "UNKNOWN_TOKEN_ID"}
    none_left: dict[str, Any] = {"reason": "NO_ALLOWED_TOKEN"}
    cases = []
    for token_id in (VOCABULARY, 2**31, 2**32 - 1):
        words = f"token id {token_id}; this model's ids are below {VOCABULARY}"
        cases += [
            BadRequest(f"id {token_id} in the prompt", words, prompt=(5, token_id), **wrong),
            BadRequest(f"stop id {token_id}", words, options={"stop_token_ids": [token_id]}, **wrong),
            BadRequest(f"bias of id {token_id}", words, options={"logit_bias": {token_id: 1.0}}, **wrong),
            BadRequest(f"allowed id {token_id}", words, options={"allowed_token_ids": [5, token_id]}, **wrong),
            BadRequest(f"bad id {token_id}", words, options={"bad_token_ids": [token_id]}, **wrong),
        ]
    return [
        *cases,
        BadRequest("no allowed id", "0 tokens are allowed", raw=raw(sampling={"allowed_token_ids": {}}), **none_left),
        BadRequest("all allowed ids are bad", "which leaves none", options={"allowed_token_ids": [5], "bad_token_ids": [5]}, **none_left),
        BadRequest(
            "only end tokens before min_tokens",
            "all of which end the sequence, and min_tokens is 2",
            options={"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2},
            **none_left,
        ),
        *(
            BadRequest(f"{count} {name}", f"has {count} entries; it takes {limit}", options={name: [7] * count})
            for name, limit in (("stop_token_ids", 64), ("allowed_token_ids", 1024), ("bad_token_ids", 1024))
            for count in (limit + 1, 10**5)
        ),
        BadRequest("301 biases", "logit_bias has 301 entries; it takes 300", options={"logit_bias": dict.fromkeys(range(301), 1.0)}),
        BadRequest("4096 biases", "logit_bias has 4096 entries; it takes 300", options={"logit_bias": dict.fromkeys(range(4096), 1.0)}),
        *(
            BadRequest(
                f"bias {value:g}", rf"logit_bias is {re.escape(f'{value:g}')}; it takes -100 to 100", options={"logit_bias": {5: value}}
            )
            for value in (NAN, INFINITY, -INFINITY, 100.5, -1e300)
        ),
    ]


def _numbers() -> list[BadRequest]:
    """Numbers outside their limits or without a value, and those that do not go together."""
    wrong: dict[str, tuple[float, ...]] = {
        "temperature": (NAN, INFINITY, -INFINITY, -0.1, 100.5),
        "top_p": (NAN, INFINITY, 0.0, -0.5, 1.01),
        "min_p": (NAN, INFINITY, -0.01, 1.01),
        "typical_p": (NAN, 0.0, 1.5),
        "repetition_penalty": (NAN, INFINITY, 0.0, -1.0, 1e-9, 101.0),
        "presence_penalty": (NAN, INFINITY, 2.1, -2.1),
        "frequency_penalty": (NAN, -INFINITY, 2.1, -2.1),
    }
    beams = {"num_beams": 2}
    return [
        *(
            BadRequest(f"{name} {value:g}", f"{name} is {value:g}; it takes", options={name: value})
            for name, values in wrong.items()
            for value in values
        ),
        *(BadRequest(f"n {n}", f"n is {n}; it takes 1 to 8", options={"n": n, "temperature": 1.0}) for n in (0, 9, 10**6, 2**32 - 1)),
        *(BadRequest(f"best_of {n}", f"best_of is {n}; it takes 1 to 8", options={"best_of": n}) for n in (0, 9, 2**32 - 1)),
        BadRequest("best_of below n", "best_of is 2 and n is 3", options={"best_of": 2, "n": 3}),
        BadRequest("n of greedy", "n is 2 and temperature is 0", options={"n": 2, "temperature": 0.0}),
        BadRequest("best_of of greedy", "best_of is 4 and temperature is 0", options={"best_of": 4, "temperature": 0.0}),
        *(BadRequest(f"logprobs {k}", f"logprobs is {k}; it takes 0 to 20", options={"logprobs": k}) for k in (21, 2**32 - 1)),
        *(BadRequest(f"prompt_logprobs {k}", f"logprobs is {k}; it takes 0 to", options={"prompt_logprobs": k}) for k in (21, VOCABULARY)),
        *(BadRequest(f"{k} beams", f"beam_count is {k}; it takes 2 to 16", options={"num_beams": k}) for k in (0, 1, 17, 2**32 - 1)),
        BadRequest("beams without a number", "has no beam_count", raw=raw(beam_search={})),
        BadRequest("n above beams", "n is 3 and beam_count is 2", options={**beams, "n": 3}),
        BadRequest("beams and best_of", "best_of is for sampling", options={**beams, "best_of": 2}),
        BadRequest("beams and temperature", "leave temperature unset", options={**beams, "temperature": 0.5}),
        BadRequest("beams and stop strings", "leave stop_strings unset", options={**beams, "stop": [MARKER]}),
        BadRequest("beams and logprobs", "leave logprobs unset", options={**beams, "logprobs": 1}),
        *(
            BadRequest(f"length_penalty {value:g}", f"length_penalty is {value:g}", options={**beams, "length_penalty": value})
            for value in (NAN, INFINITY, 10.5)
        ),
        BadRequest("beams ended oddly", "early_stopping 9 is not one of", raw=raw(beam_search={"beam_count": 2, "early_stopping": 9})),
    ]


def _texts() -> list[BadRequest]:
    """Stop strings, bad words and names."""
    long = MARKER + "x" * 300
    return [
        BadRequest("5 stop strings", "stop_strings has 5 entries; it takes 4", options={"stop": [f"{MARKER}{n}" for n in range(5)]}),
        BadRequest("empty stop string", "a stop string has 0 characters; it takes 1 to 256", options={"stop": ["", MARKER]}),
        BadRequest("long stop string", "a stop string has 309 characters; it takes 1 to 256", options={"stop": [long]}),
        BadRequest("301 bad words", "bad_words has 301 entries; it takes 300", options={"bad_words": [MARKER] * 301}),
        BadRequest("empty bad word", "a bad word has 0 characters", options={"bad_words": [""]}),
        BadRequest("bad word of spaces", "a bad word has 3 characters; it takes 1 to 256, not all", options={"bad_words": ["   "]}),
        BadRequest("long bad word", "a bad word has 309 characters", options={"bad_words": [long]}),
        *(
            BadRequest(f"{name} {what}", f"{name} has {len(value)} characters; it takes 1 to 64 of", options={name: value})
            for name in ("request_id", "cache_salt")
            for what, value in {
                "of none": "",
                "of 65": (MARKER * 8)[:65],
                "with a space": f"{MARKER} x",
                "with a line": f"{MARKER}\nx",
                "with a path": f"../{MARKER}",
                "with a letter": f"{MARKER}é",
            }.items()
        ),
    ]


def _chats() -> list[BadRequest]:
    """Conversations and their tools."""
    bad_json: dict[str, Any] = {"reason": "INVALID_JSON"}
    deep = json.loads("[" * 70 + "]" * 70)
    nested = '{"a":' * 300 + "1" + "}" * 300
    tool = {"type": "function", "function": {"name": MARKER}}
    return [
        BadRequest("role of none", "a role has 0 characters; it takes 1 to 64", [{"role": "", "content": PROMPT}]),
        BadRequest("long role", "a role has 72 characters; it takes 1 to 64", [{"role": MARKER * 8, "content": PROMPT}]),
        BadRequest("2049 turns", "chat.messages has 2049 entries; it takes 2048", [user("x")] * 2049),
        BadRequest("long turn", f"chat has 9004 characters; this model takes {MAX_CHARS}", [user(MARKER * 1000)], reason="PROMPT_TOO_LONG"),
        BadRequest("turn of too many tokens", r"prompt has \d+ tokens", [user(MARKER * 150)], reason="PROMPT_TOO_LONG"),
        BadRequest("tools without a place", "no place for tools", [user()], {"tools": [tool]}, reason="NO_TOOLS"),
        BadRequest("129 tools", "tools_json has 129 entries; it takes 128", [user()], {"tools": [tool] * 129}),
        BadRequest("tool of no JSON", "is not a JSON object", [user()], {"tools": [MARKER]}, **bad_json),
        BadRequest("tool of a list", "is not a JSON object", [user()], {"tools": [json.dumps([MARKER])]}, **bad_json),
        BadRequest("deep tool", "nested more than 64 levels", [user()], {"tools": [{MARKER: deep}]}, **bad_json),
        BadRequest("deeper tool", "nested more than 64 levels", [user()], {"tools": [nested]}, **bad_json),
        BadRequest("129 tool calls", "has 129 entries; it takes 128", [user(), {"role": "assistant", "tool_calls": [tool] * 129}]),
        BadRequest("tool call of no JSON", "is not a JSON object", [{"role": "assistant", "tool_calls": [MARKER]}], **bad_json),
        BadRequest("tool call with half a surrogate", "surrogate", [{"role": "assistant", "tool_calls": ['{"a": "\\ud800"}']}]),
        BadRequest("special tokens added to a chat", "add_special_tokens is for text", [user()], raw=raw(add_special_tokens=True)),
        BadRequest("special tokens read in a chat", "parse_special_tokens is for text", [user()], raw=raw(parse_special_tokens=True)),
        BadRequest("special tokens added to ids", "this prompt is token_ids", (5,), raw=raw(add_special_tokens=True)),
    ]


def _kinds() -> list[BadRequest]:
    """What is not served yet, and messages that only a stranger sends."""
    later: dict[str, Any] = {"error": NotSupported, "reason": "NOT_SUPPORTED"}
    strange: dict[str, Any] = {"error": NotSupported, "reason": "UNKNOWN_FIELD"}
    forms: dict[str, Any] = {
        "json": True,
        "json_schema": {"title": MARKER},
        "regex": f"{MARKER}+",
        "grammar": MARKER,
        "choices": [MARKER],
    }
    return [
        BadRequest("unknown model", "model", options={"model": "no-such-model"}, error=NotFound, reason="MODEL_NOT_FOUND"),
        BadRequest("adapter", "adapter is not supported yet", options={"adapter": MARKER}, **later),
        *(BadRequest(f"form {name}", f"structured_output.{name}", options={name: value}, **later) for name, value in forms.items()),
        *(BadRequest(f"unknown field {number}", f"number {number}", raw=unknown(number), **strange) for number in (19, 1000, 2**20)),
        *(
            BadRequest(f"unknown field in {name}", f"{name} has a field of number 100", raw=inside(name, unknown(100)), **strange)
            for name in ("sampling", "stopping", "output")
        ),
        *(BadRequest(f"priority {value}", f"priority {value} is not one of", raw=raw(priority=value)) for value in (4, -1, 2**31 - 1)),
        BadRequest("no prompt", "the request has no prompt", prompt=None, reason="EMPTY_PROMPT"),
    ]


CASES: Final = (*_lengths(), *_token_ids(), *_numbers(), *_texts(), *_chats(), *_kinds())
