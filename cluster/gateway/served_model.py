"""A model as the gateway serves it: what prompts may hold, and how to make token ids of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from quire.cluster.gateway.chat_encoder import ChatEncoder
from quire.cluster.gateway.chat_template import template_sources
from quire.cluster.gateway.template_processes import TemplateProcesses
from quire.cluster.gateway.tokenization import PromptTokenizer
from quire.common.errors import ConfigError
from quire.internal.v1 import discovery_pb2
from quire.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What discovery says of a model, and its tokenizer."""

    public: inference_pb2.Model  # what ListModels shows; not to be changed
    vocab_size: int  # prompts hold ids below this
    logits_size: int  # ids below this may be drawn
    max_model_len: int
    max_request_tokens: int  # of prompt and completion, by the pool of one group; 0 when not known
    tokenizer: PromptTokenizer
    chat: ChatEncoder | None

    @property
    def name(self) -> str:
        return self.public.name

    @property
    def default_sampling(self) -> inference_pb2.SamplingParams:
        return self.public.default_sampling

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.public.eos_token_ids)


def load_served_model(entry: discovery_pb2.ServedModel, files: Mapping[str, bytes], templates: TemplateProcesses) -> ServedModel:
    """Build it from its entry in the routing table and its files by name. Takes a second for a large vocabulary.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    name = entry.model.name
    if "tokenizer.json" not in files:
        raise ConfigError(f"model {name} comes without tokenizer.json", reason="NO_TOKENIZER_JSON")
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        tokenizer = PromptTokenizer(files["tokenizer.json"].decode(), config)
        jinja_file = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else None
        sources = template_sources(config, jinja_file)
        special = {**tokenizer.named_tokens, "additional_special_tokens": list(config.get("additional_special_tokens") or [])}
        chat = ChatEncoder(templates.load(sources, special), tokenizer) if sources else None
    except ConfigError as error:
        raise ConfigError(
            f"the tokenizer files of model {name} cannot be used: {error.message}", reason=error.reason, metadata=error.metadata
        ) from None
    except Exception as error:  # tokenizers raises plain Exception, json its own
        raise ConfigError(f"the tokenizer files of model {name} cannot be used: {type(error).__name__}: {error}") from None
    return make_served_model(entry, tokenizer, chat)


def make_served_model(entry: discovery_pb2.ServedModel, tokenizer: PromptTokenizer, chat: ChatEncoder | None) -> ServedModel:
    """A model with its new entry and the tokenizer that was made before: entries change with the groups, files hardly ever."""
    return ServedModel(
        public=entry.model,
        vocab_size=entry.model.vocab_size,
        logits_size=entry.logits_size,
        max_model_len=entry.model.max_model_len,
        max_request_tokens=entry.max_request_tokens,
        tokenizer=tokenizer,
        chat=chat,
    )
