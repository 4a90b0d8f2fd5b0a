"""Prompts become the ids that transformers gives, and what a client writes never becomes a special token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
from fake_scheduler import model_entry, tokenizer_files
from hosted_templates import TEMPLATES
from transformers import AutoTokenizer

from quire.cluster.gateway.chat_template import ChatTemplate
from quire.cluster.gateway.served_model import ServedModel, load_served_model
from quire.common.errors import ConfigError, InvalidRequest

TEXTS = (
    "the quick brown fox",
    "  two  spaces\n\n\tand\ttabs ",
    "你好，世界! 😀 e\u0301",
    "Ω \x00 \u2028 zero",
    "a<b>c <| |> [INST] x [/INST]",
    "",
)
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "hello there"}],
    [{"role": "user", "content": "  hello 😀\n"}, {"role": "assistant", "content": "the fox"}, {"role": "user", "content": "no <b> & 'x'"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "你好 <|"}, {"role": "assistant", "content": "|> a"}, {"role": "user", "content": "<"}],
)
SYSTEM: dict[str, Any] = {"role": "system", "content": "You are a helpful assistant."}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "It's <b>", "parameters": {"x": [1, None, "é"]}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}


def load(make: Callable[[], dict[str, bytes]]) -> ServedModel:
    files = make()
    return load_served_model(model_entry(files, name=make.__name__), files, TEMPLATES)


def load_with_transformers(files: dict[str, bytes], folder: Path) -> Any:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def encode_chat(model: ServedModel, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
    assert model.chat is not None
    options = {"tools": None, "add_generation_prompt": True, "max_chars": 10_000} | options
    return model.chat.encode(messages, **options)


@pytest.mark.parametrize("make", small_tokenizers.ALL)
def test_texts_get_the_ids_that_transformers_gives(make: Callable[[], dict[str, bytes]], tmp_path: Path) -> None:
    model, theirs = load(make), load_with_transformers(make(), tmp_path)
    specials = list(model.tokenizer.escapes)
    for text in (*TEXTS, "x " + specials[0] + " y", specials[-1] + specials[-1], "<|im_end|>\n</s> the"):
        for add in (True, False):
            ours = model.tokenizer.encode(text, add_special_tokens=add, parse_special_tokens=True)
            assert ours == theirs(text, add_special_tokens=add)["input_ids"], text
            ours = model.tokenizer.encode(text, add_special_tokens=add, parse_special_tokens=False)
            assert ours == theirs(text, add_special_tokens=add, split_special_tokens=True)["input_ids"], text


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("make", small_tokenizers.ALL)
def test_chats_get_the_ids_and_the_text_that_transformers_gives(
    make: Callable[[], dict[str, bytes]], add_generation_prompt: bool, tmp_path: Path
) -> None:
    model, theirs = load(make), load_with_transformers(make(), tmp_path)
    chats = list(CHATS)
    if make is not small_tokenizers.llama_like:
        chats += [[SYSTEM, *chat] for chat in CHATS]
    for chat in chats:
        ids, rendered = encode_chat(model, chat, add_generation_prompt=add_generation_prompt)
        assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt)
        assert ids == expected["input_ids"], chat


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("make", [small_tokenizers.chatml, small_tokenizers.llama_like])
def test_tools_and_tool_calls_reach_the_template(make: Callable[[], dict[str, bytes]], content: str | None, tmp_path: Path) -> None:
    model, theirs = load(make), load_with_transformers(make(), tmp_path)
    chat: list[dict[str, Any]] = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": content, "tool_calls": [CALL]}]
    ids, rendered = encode_chat(model, chat, tools=[TOOL])
    assert rendered == theirs.apply_chat_template(chat, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(chat, tools=[TOOL], tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert "get_weather" in rendered


@pytest.mark.parametrize("make", small_tokenizers.ALL)
def test_the_text_of_a_special_token_stays_text_in_a_chat(make: Callable[[], dict[str, bytes]]) -> None:
    """The ids hold exactly the special tokens of the same chat with harmless contents, and the same text all the same."""
    model = load(make)
    special_ids = {model.tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)[0] for text in model.tokenizer.escapes}

    def specials_of(contents: list[str]) -> list[int]:
        roles = ["user", "assistant"] * len(contents)
        chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        ids, rendered = encode_chat(model, chat)
        assert model.tokenizer.decode(ids, skip_special_tokens=False).split() == rendered.split()
        assert all(content.strip() in rendered for content in contents)
        return [token_id for token_id in ids if token_id in special_ids]

    harmless = specials_of(["a", "b"])
    for special in model.tokenizer.escapes:
        assert specials_of([special, f"x{special}{special} y"]) == harmless
        for cut in range(1, len(special)):  # in two halves that the template may put side by side
            assert specials_of([f"a {special[:cut]} ", special[cut:]]) == harmless
            assert specials_of([special[cut:], f"{special[:cut]}"]) == harmless


def test_contents_that_a_template_joins_do_not_become_a_special_token() -> None:
    """The built-in template puts the system text in front of the user's; one that puts nothing between is the worst case."""
    files = small_tokenizers.demo()
    config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps(
        config | {"chat_template": "{% for m in messages %}{{ m.content|trim }}{% endfor %}"}
    ).encode()
    model = load_served_model(model_entry(files), files, TEMPLATES)
    ids, rendered = encode_chat(model, [{"role": "user", "content": "<|us  "}, {"role": "user", "content": " er|>"}])
    assert rendered == "<|user|>"
    assert 1 not in ids
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_special_tokens_that_overlap_or_have_one_character_stay_text() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(small_tokenizers.demo()["tokenizer.json"].decode())
    tokenizer.add_special_tokens(["aba", "★"])
    files = tokenizer_files(tokenizer.to_str(), {}, "★{% for m in messages %}{{ m.content }}★{% endfor %}")
    model = load_served_model(model_entry(files), files, TEMPLATES)
    special_ids = {tokenizer.token_to_id("aba"), tokenizer.token_to_id("★")}
    ids, rendered = encode_chat(model, [{"role": "user", "content": "ababa ★ ★★ ab"}, {"role": "user", "content": "a★"}])
    assert rendered == "★ababa ★ ★★ ab★a★★"
    assert [token_id for token_id in ids if token_id in special_ids] == [tokenizer.token_to_id("★")] * 3
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_special_tokens_in_tools_stay_text() -> None:
    model = load(small_tokenizers.chatml)
    end = model.tokenizer.encode("<|im_end|>", add_special_tokens=False, parse_special_tokens=True)[0]
    chat = [{"role": "user", "content": "hi"}]
    tool = {"name": "<|im_end|>", "<|im_end|>": ["<|im_end|>"], "role": "<|im_end|>"}
    plain, _ = encode_chat(model, chat, tools=[{"name": "x", "y": ["z"]}])
    ids, rendered = encode_chat(model, chat, tools=[tool])
    assert ids.count(end) == plain.count(end)
    assert json.dumps(tool) in rendered


@pytest.mark.parametrize("make", [small_tokenizers.chatml, small_tokenizers.roles_as_tokens])
def test_escapes_of_private_characters_in_a_conversation_stay(make: Callable[[], dict[str, bytes]]) -> None:
    """Such a character is put into risky texts before rendering, and taken out afterwards, also where tojson has escaped it."""
    model = load(make)
    content = r"a < b: \ue000 \ue002 \uE001 \ue0 " + "\ue001\ue003 <"
    ids, rendered = encode_chat(model, [{"role": "user", "content": content}])
    assert content in rendered
    assert content in model.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("is_ascii", [False, True])
def test_escapes_of_private_characters_in_tools_stay(is_ascii: bool) -> None:
    files = small_tokenizers.chatml()
    files["chat_template.jinja"] = b"{{ tools | tojson(ensure_ascii=%s) }}" % str(is_ascii).encode()
    model = load_served_model(model_entry(files), files, TEMPLATES)
    tool = {"name": "<|im_end|>", "x": r"\ue000", "y": "\ue001", "z": "\\<|im_end|>"}
    _, rendered = encode_chat(model, [{"role": "user", "content": "hi"}], tools=[tool])
    assert rendered == json.dumps([tool], ensure_ascii=is_ascii)


@pytest.mark.parametrize("role", ["endoftext", "im_start", "<|im_end|>"])
def test_a_role_that_would_make_a_special_token_is_refused(role: str) -> None:
    with pytest.raises(InvalidRequest, match="role"):
        encode_chat(load(small_tokenizers.roles_as_tokens), [{"role": role, "content": "x"}])


def test_a_role_that_no_special_token_holds_is_the_templates_business() -> None:
    _, rendered = encode_chat(load(small_tokenizers.chatml), [{"role": "ipython", "content": "x"}])
    assert "<|im_start|>ipython\nx<|im_end|>" in rendered


def test_a_template_that_refuses_is_quoted_and_one_that_fails_is_not() -> None:
    with pytest.raises(InvalidRequest, match="must alternate") as refused:
        encode_chat(load(small_tokenizers.llama_like), [{"role": "assistant", "content": "secret"}])
    assert refused.value.reason == "CHAT_TEMPLATE_REFUSED"
    quoting = ChatTemplate({"default": "{{ raise_exception('no ' ~ messages[0].content) }}"}, {})
    with pytest.raises(InvalidRequest, match="its words hold a part of it and are not repeated") as refused:
        quoting.render([{"role": "user", "content": "secret"}], tools=None, add_generation_prompt=True, max_chars=100)
    assert "secret" not in refused.value.message
    template = ChatTemplate({"default": "{{ messages[0].content / 2 }}"}, {})
    with pytest.raises(InvalidRequest, match="TypeError") as failed:
        template.render([{"role": "user", "content": "secret"}], tools=None, add_generation_prompt=True, max_chars=100)
    assert failed.value.reason == "CHAT_TEMPLATE_FAILED"
    assert "secret" not in failed.value.message


def test_a_template_cannot_leave_its_sandbox_nor_make_endless_text() -> None:
    escape = ChatTemplate({"default": "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"}, {})
    with pytest.raises(InvalidRequest, match="SecurityError"):
        escape.render([], tools=None, add_generation_prompt=True, max_chars=1000)
    endless = ChatTemplate({"default": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"}, {})
    with pytest.raises(InvalidRequest, match="more than 5000 characters"):
        endless.render([], tools=None, add_generation_prompt=True, max_chars=5000)


def test_tools_for_a_template_without_a_place_for_them_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no place for tools"):
        encode_chat(load(small_tokenizers.demo), list(CHATS[0]), tools=[TOOL])


def test_half_a_surrogate_pair_is_refused() -> None:
    tool = json.loads('{"name": "\\ud800"}')
    with pytest.raises(InvalidRequest, match="surrogate"):
        encode_chat(load(small_tokenizers.chatml), list(CHATS[0]), tools=[tool])


def test_a_text_that_this_tokenizer_cannot_take_literally_is_refused() -> None:
    """A Unigram vocabulary finds its control tokens in plain text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    files = tokenizer_files(tokenizer.to_str(), {"unk_token": "<unk>", "bos_token": "<s>"}, "{{ messages[0].content }}")
    model = load_served_model(model_entry(files), files, TEMPLATES)
    assert model.tokenizer.encode("a ? b", add_special_tokens=True, parse_special_tokens=False) == [2, 0, 3]
    for encode in (
        lambda: model.tokenizer.encode("a <s>", add_special_tokens=True, parse_special_tokens=False),
        lambda: encode_chat(model, [{"role": "user", "content": "a <s>"}]),
    ):
        with pytest.raises(InvalidRequest, match="literally"):
            encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "without tokenizer.json"),
        ({"tokenizer.json": b"{"}, "cannot be used"),
        ({**small_tokenizers.demo(), "chat_template.jinja": b"{% if %}"}, "TemplateSyntaxError"),
        ({**small_tokenizers.demo(), "tokenizer_config.json": b"["}, "JSONDecodeError"),
    ],
)
def test_files_that_cannot_be_used_are_named(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_served_model(model_entry(files), files, TEMPLATES)


def test_a_model_without_a_template_has_no_chat() -> None:
    files = small_tokenizers.demo()
    files["tokenizer_config.json"] = b"{}"
    assert load_served_model(model_entry(files), files, TEMPLATES).chat is None
