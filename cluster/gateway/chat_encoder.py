"""Conversations to token ids: a special token comes from the template, never from what a client wrote."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from quire.cluster.gateway.chat_template import ChatTemplate
from quire.cluster.gateway.tokenization import PromptTokenizer, check_encodable
from quire.common.errors import InvalidRequest

# Roles that every template may be given. Another one is refused if a special token's text holds it: templates build tokens
# from roles ('<|' + role + '|>').
COMMON_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MARKERS: Final = range(0xE000, 0xF900)  # the private use area


class ChatEncoder:
    """Renders and tokenizes conversations with one template and one tokenizer.

    Ids equal those of transformers' apply_chat_template, except that the text of a special token in a client's string stays
    text. Where a client's string holds such a text, or an end of one that could be completed by what the template puts next
    to it, a private character is put inside before rendering. In the rendered text, special tokens without it are the
    template's: they are written by their escapes, the private characters go, and the rest is plain text.
    """

    def __init__(self, template: ChatTemplate, tokenizer: PromptTokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._special = sorted(tokenizer.escapes, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, self._special))) if self._special else None
        self._first_chars = {text[0] for text in self._special}

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        max_chars: int,
    ) -> tuple[list[int], str]:
        """The token ids of a conversation and the text that they were made from.

        Raises:
            InvalidRequest: a role or the whole conversation is refused; tools are given but the template has no place for them.
        """
        if tools is not None and not self._template.takes_tools:
            raise InvalidRequest(
                "this model's chat template has no place for tools; leave chat.tools_json empty", reason="NO_TOOLS", field="chat.tools_json"
            )
        for message in messages:
            self._check_role(message["role"])
        strings: list[str] = []
        _map_strings([list(messages), tools], lambda text: strings.append(text) or text)
        for text in strings:
            check_encodable(text)

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
            return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, max_chars=max_chars)

        if not any(self._is_risky(text) for text in strings):
            rendered = render(messages, tools)
            return self._tokenizer.encode(rendered, add_special_tokens=False, parse_special_tokens=True), rendered
        marker = self._marker_for(strings)
        marked_messages, marked_tools = _map_strings([list(messages), tools], lambda text: self._mark(text, marker))
        marked = render(marked_messages, marked_tools)
        assert self._special_pattern is not None
        escaped = self._special_pattern.sub(lambda match: self._tokenizer.escapes[match[0]], marked)
        return self._tokenizer.encode_escaped(_without(marker, escaped)), _without(marker, marked)

    def _check_role(self, role: str) -> None:
        if role in COMMON_ROLES or f"'{role}'" in self._template.source or f'"{role}"' in self._template.source:
            return
        if not role or any(role in text for text in self._special):
            raise InvalidRequest(
                f"chat.messages has a role that the chat template does not know; it takes {', '.join(sorted(COMMON_ROLES))}",
                reason="UNKNOWN_ROLE",
                field="chat.messages.role",
            )

    def _is_risky(self, text: str) -> bool:
        """Whether special tokens could come out of this string: it holds one, or either end of it is a part of one."""
        if self._special_pattern is None or not text:
            return False
        if self._special_pattern.search(text):
            return True
        stripped = text.strip()
        return any(_head(stripped, special) or _tail(stripped, special) for special in self._special)

    def _mark(self, text: str, marker: str) -> str:
        if self._special_pattern is None:
            return text
        text = self._special_pattern.sub(lambda match: match[0][0] + marker + match[0][1:], text)
        start, stripped = len(text) - len(text.lstrip()), text.strip()
        end = start + len(stripped)
        # Inside the part, not outside: a template may trim the string.
        if any(len(special) > 1 and _head(stripped, special) for special in self._special):
            keep = max(_head(stripped, special) for special in self._special)
            text = text[: end - keep + 1] + marker + text[end - keep + 1 :]
        if any(_tail(stripped, special) for special in self._special):
            keep = max(_tail(stripped, special) for special in self._special)
            text = text[: start + keep - 1] + marker + text[start + keep - 1 :]
        return text

    def _marker_for(self, strings: Sequence[str]) -> str:
        """A private character that occurs neither in a client's string nor in the template."""
        used = set(self._template.source).union(*strings)
        for code in _MARKERS:
            if chr(code) not in used:
                return chr(code)
        raise InvalidRequest("the conversation uses every private use character; leave one out", field="chat.messages")


def _head(text: str, special: str) -> int:
    """Length of the longest end of `text` with which `special` begins, less than all of it."""
    return next((size for size in range(min(len(special) - 1, len(text)), 0, -1) if text.endswith(special[:size])), 0)


def _tail(text: str, special: str) -> int:
    """Length of the longest beginning of `text` with which `special` ends, less than all of it."""
    return next((size for size in range(min(len(special) - 1, len(text)), 0, -1) if text.startswith(special[-size:])), 0)


def _without(marker: str, text: str) -> str:
    """A template may have written the marker as JSON does for ASCII."""
    return text.replace(marker, "").replace(f"\\u{ord(marker):04x}", "")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same structure with each string in it changed, keys included; roles are left alone, templates compare them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, Mapping):
        return {change(key): item if key == "role" else _map_strings(item, change) for key, item in value.items()}
    return value
