"""Conversations to token ids: a special token comes from the template, never from what a client wrote."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from quire.cluster.gateway.template_processes import HostedTemplate
from quire.cluster.gateway.tokenization import PromptTokenizer, check_encodable
from quire.common.errors import InvalidRequest

# Roles that every template may be given. Another one is refused if a special token's text holds it: templates build tokens
# from roles ('<|' + role + '|>').
COMMON_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MARKERS: Final = range(0xE000, 0xF900)  # the private use area
_ESCAPE: Final = re.compile(r"\\u[ef][0-9a-f]{3}")  # of one of them, as JSON writes it


class ChatEncoder:
    """Renders and tokenizes conversations with one template and one tokenizer.

    Ids equal those of transformers' apply_chat_template, except that the text of a special token in a client's string stays
    text. Where a client's string holds such a text, or an end of one that could be completed by what the template puts next
    to it, a private character is put inside before rendering. In the rendered text, special tokens without it are the
    template's: they are written by their escapes, the private characters go, and the rest is plain text.
    """

    def __init__(self, template: HostedTemplate, tokenizer: PromptTokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._special = sorted(tokenizer.escapes, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)) or "(?!)")
        self._heads = {text[:size] for text in self._special for size in range(1, len(text))}
        self._tails = {text[size:] for text in self._special for size in range(1, len(text))}
        self._longest_part = max(map(len, self._special), default=1) - 1

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
        # As transformers does: many templates fail on None or write "None", and take a key that is missing for no content.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for message in messages:
            self._check_role(message["role"])
        strings = [*_strings_in(messages), *_strings_in(tools)]
        for text in strings:
            check_encodable(text)

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
            return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, max_chars=max_chars)

        if not any(self._is_risky(text) for text in strings):
            rendered = render(messages, tools)
            return self._tokenizer.encode(rendered, add_special_tokens=False, parse_special_tokens=True), rendered
        marker = self._unused_character(strings)
        # Roles stay as they are: templates compare them, and they were checked.
        marked_messages = [{**self._mark_all(message, marker), "role": message["role"]} for message in messages]
        marked = render(marked_messages, self._mark_all(tools, marker))
        escaped = self._special_pattern.sub(lambda match: self._escape(match, marker), marked)
        return self._tokenizer.encode_escaped(_without(marker, escaped)), _without(marker, marked)

    def _check_role(self, role: str) -> None:
        is_known = role in COMMON_ROLES or f"'{role}'" in self._template.source or f'"{role}"' in self._template.source
        if not is_known and any(role in text for text in self._special):
            raise InvalidRequest(
                f"chat.messages has a role that the chat template does not know; it takes {', '.join(sorted(COMMON_ROLES))}",
                reason="UNKNOWN_ROLE",
                field="chat.messages.role",
            )

    def _is_risky(self, text: str) -> bool:
        """Whether special tokens could come out of this string: it holds one, or either end of it is a part of one."""
        stripped = text.strip()
        return bool(self._special_pattern.search(text) or self._head_size(stripped) or self._tail_size(stripped))

    def _head_size(self, text: str) -> int:
        """Length of the longest end of `text` with which a special token begins, 0 if there is none."""
        sizes = range(min(self._longest_part, len(text)), 0, -1)
        return next((size for size in sizes if text[-size:] in self._heads), 0)

    def _tail_size(self, text: str) -> int:
        """Length of the longest beginning of `text` with which a special token ends, 0 if there is none."""
        sizes = range(min(self._longest_part, len(text)), 0, -1)
        return next((size for size in sizes if text[:size] in self._tails), 0)

    def _mark_all(self, value: Any, marker: str) -> Any:
        """The same structure with each string in it marked; of keys only those that hold a whole special token."""
        if isinstance(value, str):
            return self._mark(value, marker)
        if isinstance(value, Mapping):
            return {self._break_up(key, marker): self._mark_all(item, marker) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._mark_all(item, marker) for item in value]
        return value

    def _mark(self, text: str, marker: str) -> str:
        text = self._break_up(text, marker)
        stripped = text.strip()
        start = len(text) - len(text.lstrip())
        cuts = set()  # inside the parts, not outside: a template may trim the string
        if head := self._head_size(stripped):
            cuts.add(start + len(stripped) - head + 1)
        if tail := self._tail_size(stripped):
            cuts.add(start + tail - 1)
        for cut in sorted(cuts, reverse=True):
            text = text[:cut] + marker + text[cut:]
        return text

    def _break_up(self, text: str, marker: str) -> str:
        """The text with the marker behind the first character of each whole special token, twice if that is all of it."""
        broken = self._special_pattern.sub(lambda match: match[0][0] + marker + (match[0][1:] or marker), text)
        # Two that overlap need another round. One of a single character cannot be broken up; _escape knows it by its marker.
        is_done = broken == text or all(len(match[0]) == 1 for match in self._special_pattern.finditer(broken))
        return broken if is_done else self._break_up(broken, marker)

    def _escape(self, match: re.Match[str], marker: str) -> str:
        is_clients = len(match[0]) == 1 and match.string.startswith(2 * marker, match.end())
        return match[0] if is_clients else self._tokenizer.escapes[match[0]]

    def _unused_character(self, strings: Sequence[str]) -> str:
        """A private character that occurs neither in a client's string nor in the template, also not as JSON's escape of it."""
        texts = [self._template.source, *strings]
        used = set().union(*texts)
        escaped = {escape for text in texts for escape in _ESCAPE.findall(text)}
        for code in _MARKERS:
            if chr(code) not in used and _escape_of(chr(code)) not in escaped:
                return chr(code)
        raise InvalidRequest("the conversation uses every private use character; leave one out", field="chat.messages")


def _without(marker: str, text: str) -> str:
    """A template may have written the marker as JSON does for ASCII."""
    return text.replace(marker, "").replace(_escape_of(marker), "")


def _escape_of(marker: str) -> str:
    return f"\\u{ord(marker):04x}"


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings_in(item)
