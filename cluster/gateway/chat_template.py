"""A model's chat template: jinja2 in a sandbox, with what templates written for transformers rely on."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.common.errors import InvalidRequest

MAX_MESSAGE_CHARS: Final = 200


class ChatTemplate:
    """Renders conversations. Only sandboxed: what it may take of time and memory is limited by the process (template_child)."""

    def __init__(self, sources: Mapping[str, str], named_tokens: Mapping[str, Any]) -> None:
        """sources: templates by name; "default" is one of them or the only one."""
        environment = _environment()
        self._named_tokens = dict(named_tokens)
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self._default = self._templates["default"] if "default" in sources else next(iter(self._templates.values()))
        used = {name: meta.find_undeclared_variables(environment.parse(source)) for name, source in sources.items()}
        self.takes_tools = any("tools" in names for names in used.values())
        self.source = "\n".join(sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        max_chars: int,
    ) -> str:
        """The conversation as text.

        Raises:
            InvalidRequest: the template refuses the conversation, fails on it, or makes more than max_chars of it.
        """
        template = self._templates.get("tool_use", self._default) if tools is not None else self._default
        variables = {**self._named_tokens, "messages": messages, "tools": tools, "documents": None}
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in template.generate(variables, add_generation_prompt=add_generation_prompt):
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise InvalidRequest(
                        f"the chat template makes more than {max_chars} characters of this conversation; shorten it",
                        reason="PROMPT_TOO_LONG",
                        field="chat.messages",
                        metadata={"max_chars": str(max_chars)},
                    )
                pieces.append(piece)
        except _Refusal as refusal:
            raise InvalidRequest(
                f"the chat template refuses this conversation{self._own_words(str(refusal.message))}",
                reason="CHAT_TEMPLATE_REFUSED",
                field="chat.messages",
            ) from None
        except (InvalidRequest, MemoryError):  # memory is for the process to judge
            raise
        except Exception as error:  # a template is a program of the model's authors, and this conversation is more than it can do
            raise InvalidRequest(
                f"the chat template fails on this conversation ({type(error).__name__}); it may need other roles or fields",
                reason="CHAT_TEMPLATE_FAILED",
                field="chat.messages",
            ) from None
        return "".join(pieces)

    def _own_words(self, message: str) -> str:
        """A refusal's words as far as the template's source has them: what else is in them is the conversation's."""
        if message in self.source:
            return f": {message[:MAX_MESSAGE_CHARS]}"
        return "; its words hold a part of it and are not repeated"


def template_sources(tokenizer_config: Mapping[str, Any], jinja_file: str | None) -> dict[str, str]:
    """The templates of a model by name; empty if it has none. chat_template.jinja goes before tokenizer_config.json."""
    if jinja_file is not None:
        return {"default": jinja_file}
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        return {str(named["name"]): str(named["template"]) for named in entry}
    return {}


class _Refusal(TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """{% generation %} marks what an assistant said, for training; here it means nothing."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: jinja2's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
