"""A model's tokenizer, made from its files, by the `tokenizers` library alone."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import AddedToken, Encoding, Tokenizer

from quire.cluster.gateway.detokenizer import DetokenizerFactory
from quire.common.errors import InvalidRequest

# Special tokens that have a name; templates refer to them by it.
NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PromptTokenizer:
    """Text to token ids and back. Safe to use from several threads.

    Three tokenizers share one vocabulary, because how special tokens in text are treated is an attribute of a tokenizer:
    `_parsing` turns their text into the tokens, `_literal` leaves it text, and for `_escaped` a special token is written by
    an escape that nobody can guess, so that one text can hold both kinds.
    """

    def __init__(self, tokenizer_json: str, tokenizer_config: Mapping[str, Any]) -> None:
        self.named_tokens = _named_tokens(tokenizer_config)
        self._parsing = _load(tokenizer_json, tokenizer_config, self.named_tokens)
        self._literal = _load(tokenizer_json, tokenizer_config, self.named_tokens)
        self._literal.encode_special_tokens = True
        self.detokenizers = DetokenizerFactory(self._parsing)
        added = self._parsing.get_added_tokens_decoder()
        special = [token.content for _, token in sorted(added.items()) if token.special]
        unknown = self.named_tokens.get("unk_token")  # also what plain text becomes that has no token
        self._control_ids = frozenset(token_id for token_id, token in added.items() if token.special and token.content != unknown)
        nonce = secrets.token_hex(8)
        # What stands for each special token in text for `_escaped`.
        self.escapes: Mapping[str, str] = {text: f"\U000f1a2b{nonce}:{number}\U000f1a2c" for number, text in enumerate(special)}
        self._escaped, self._id_of_escaped_id = _escape(self._parsing, self.escapes)

    def encode(self, text: str, *, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]:
        """The token ids of a text.

        Raises:
            InvalidRequest: a special token's text is to stay literal, and the tokenizer has no other tokens for it.
        """
        if parse_special_tokens:
            return _encode(self._parsing, text, add_special_tokens=add_special_tokens).ids
        encoding = _encode(self._literal, text, add_special_tokens=add_special_tokens)
        ids = encoding.ids
        if not self._control_ids.isdisjoint(ids):
            added = encoding.special_tokens_mask
            self._refuse_control_ids([token_id for token_id, is_added in zip(ids, added, strict=True) if not is_added])
        return ids

    def encode_escaped(self, text: str) -> list[int]:
        """The token ids of a text in which special tokens are written by their `escapes`; their own texts are plain text.

        Raises:
            InvalidRequest: as `encode`.
        """
        ids = _encode(self._escaped, text, add_special_tokens=False).ids
        self._refuse_control_ids([token_id for token_id in ids if token_id not in self._id_of_escaped_id])
        return [self._id_of_escaped_id.get(token_id, token_id) for token_id in ids]

    def _refuse_control_ids(self, token_ids: Sequence[int]) -> None:
        """Some vocabularies (Unigram) reach special tokens through plain text; better refuse than obey such a text."""
        if not self._control_ids.isdisjoint(token_ids):
            raise InvalidRequest(
                "the prompt holds the text of a special token, which this model's tokenizer cannot take literally; take it out",
                reason="SPECIAL_TOKEN_TEXT",
            )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids, U+FFFD where they are not whole characters."""
        return self._parsing.decode(token_ids, skip_special_tokens=skip_special_tokens)


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    """As `tokenizer.encode`, which keeps every other thread of Python waiting to the end; this lets them run and is twice as quick,
    for it leaves out where in the text each token was. While two threads took a megabyte each, the loop's longest pause was 35 ms
    instead of 1.0 s (2 cores, 2026-11-25)."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding


def check_encodable(text: str) -> None:
    """JSON can smuggle in halves of surrogate pairs, which are not text.

    Raises:
        InvalidRequest: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the prompt holds half of a surrogate pair (\\ud800 to \\udfff), which is not text") from None


def _named_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens that have a name, as templates see them."""
    texts = {name: _token_text(tokenizer_config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(entry: Any) -> str | None:
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _load(tokenizer_json: str, tokenizer_config: Mapping[str, Any], named_tokens: Mapping[str, str]) -> Tokenizer:
    """As transformers loads it: nothing is cut or padded, the config may name more special tokens, and whether a begin token is
    added is the file's business (the config's add_bos_token does not count beside a tokenizer.json)."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    extra = tokenizer_config.get("extra_special_tokens") or tokenizer_config.get("additional_special_tokens") or []
    entries = [*named_tokens.values(), *(extra.values() if isinstance(extra, Mapping) else extra)]
    for text in map(_token_text, entries):
        # A token that the vocabulary lacks would get an id that the model has no row for.
        if text is not None and text not in special and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    return tokenizer


def _escape(tokenizer: Tokenizer, escapes: Mapping[str, str]) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with its special tokens renamed, and the real id of each added token, which renaming may have moved."""
    spec = json.loads(tokenizer.to_str())
    added = spec["added_tokens"]
    spec["added_tokens"] = [{**token, "content": escapes.get(token["content"], token["content"])} for token in added]
    spec["post_processor"] = None
    renamed = Tokenizer.from_str(json.dumps(spec))
    ids = {renamed.token_to_id(escapes.get(token["content"], token["content"])): token["id"] for token in added}
    return renamed, {new_id: old_id for new_id, old_id in ids.items() if new_id is not None}
