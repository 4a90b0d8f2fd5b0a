"""Token ids to text while they arrive: never half a character, and all pieces together are what the tokenizer decodes at once."""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

from tokenizers import Tokenizer

_REPLACEMENT: Final = "\ufffd"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# A window that ends in U+FFFD for longer than this holds bytes that are no text, not a character that is still to be completed.
_MAX_PENDING_TOKENS: Final = 16


class Detokenizer(Protocol):
    """The text of one sequence."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now that these tokens have come; may be empty."""

    def flush(self) -> str:
        """The rest: no more tokens come."""


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer. What it learns of a token is kept, at most one entry per id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = _is_byte_level(json.loads(tokenizer.to_str())["decoder"])
        self._special_ids = frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._byte_of_char = _byte_of_char()
        self._bytes_of_id: dict[int, bytes] = {}
        self._is_byte_token: dict[int, bool | None] = {}
        self._text_of_id: dict[int, str] = {}

    def start(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for a new sequence."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return _ByteLevelDetokenizer(self, skipped) if self._is_byte_level else _WindowDetokenizer(self, skipped)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a byte-level token. An id that the tokenizer does not know has none, as in its own decode."""
        known = self._bytes_of_id.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) or ""
            try:
                known = bytes([self._byte_of_char[char] for char in token])
            except KeyError:  # an added token with characters outside the byte alphabet stands for itself
                known = token.encode()
            self._bytes_of_id[token_id] = known
        return known

    def is_byte_token(self, token_id: int) -> bool | None:
        """Whether the token is one byte in a row of bytes that decode together (<0xE4>); None for an id that is no token."""
        if token_id not in self._is_byte_token:
            token = self._tokenizer.id_to_token(token_id)
            self._is_byte_token[token_id] = None if token is None else _BYTE_TOKEN.fullmatch(token) is not None
        return self._is_byte_token[token_id]

    def text_of(self, token_id: int) -> str:
        """The text of a token by itself, inside a text: with its space, and U+FFFD where it is not a whole character."""
        known = self._text_of_id.get(token_id)
        if known is None:
            if self._is_byte_level:
                known = self.bytes_of(token_id).decode(errors="replace")
            else:  # behind itself, because decoders take the space off the first token
                known = self.decode((token_id, token_id))[len(self.decode((token_id,))) :]
            self._text_of_id[token_id] = known
        return known

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokenizer's own decode, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class _ByteLevelDetokenizer:
    """Tokens are bytes, so an incremental UTF-8 decoder suffices: it holds at most three bytes."""

    def __init__(self, factory: DetokenizerFactory, skipped_ids: frozenset[int]) -> None:
        self._bytes_of = factory.bytes_of
        self._skipped_ids = skipped_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join([self._bytes_of(token_id) for token_id in token_ids if token_id not in self._skipped_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other decoder: decodes the last piece with and without the new tokens; the difference is their text.

    The last piece is there for its effect on what follows (the first token loses its space). A row of byte tokens is text
    only if all of it is valid, so it is held until another token ends it. Skipped tokens and ids that are no tokens are taken
    out beforehand, because the tokenizer also drops them before it decodes.
    """

    # Invariant: token_ids[:read] have been given out; token_ids[prefix:read] is the last piece, not empty in text, or read is 0.

    def __init__(self, factory: DetokenizerFactory, skipped_ids: frozenset[int]) -> None:
        self._factory = factory
        self._skipped_ids = skipped_ids
        self._token_ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._num_sent_chars = 0
        self._next_try = 0  # with bytes that are no text, tries are spaced out so that their cost stays linear

    def push(self, token_ids: Sequence[int]) -> str:
        ids = self._token_ids
        for token_id in token_ids:
            if token_id not in self._skipped_ids and self._factory.is_byte_token(token_id) is not None:
                ids.append(token_id)
        if len(ids) == self._read or len(ids) < self._next_try or self._factory.is_byte_token(ids[-1]):
            return ""
        before = self._factory.decode(ids[self._prefix : self._read]) if self._read else ""
        after = self._factory.decode(ids[self._prefix :])
        num_pending = len(ids) - self._read
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            if num_pending > _MAX_PENDING_TOKENS:
                self._next_try = len(ids) + num_pending
            return ""
        self._prefix, self._read = self._read, len(ids)
        return self._send(after[len(before) :])

    def flush(self) -> str:
        return self._send(self._factory.decode(self._token_ids)[self._num_sent_chars :])

    def _send(self, text: str) -> str:
        self._num_sent_chars += len(text)
        return text


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding means: map each character of a token to its byte, then UTF-8. Fuse changes nothing of that."""
    if decoder is None:
        return False
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [part["type"] for part in parts]
    return kinds.count("ByteLevel") == 1 and set(kinds) <= {"ByteLevel", "Fuse"} and kinds[0] == "ByteLevel"


def _byte_of_char() -> dict[str, int]:
    """The byte alphabet of byte-level tokenizers: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(themselves)]
    return {chr(byte): byte for byte in themselves} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
