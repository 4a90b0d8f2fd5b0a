"""Bearer tokens: how they are made, and the file that says whose they are.

The file has one line per token, with its SHA-256 and never the token itself; empty lines and those that start with # are skipped:

    sha256:9f86d08…  tenant=acme  role=user  max_requests=8  tokens_per_minute=60000

A plain hash is enough for tokens that are drawn: their 256 bits cannot be guessed, unlike a password's.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quire.cluster.gateway.tenants import Caller, Limits, Role
from quire.common.errors import ConfigError

log = logging.getLogger("quire.gateway")

TOKEN_PREFIX: Final = "quire_"  # so that scanners of repositories find a token that leaked
TOKEN_BYTES: Final = 32
# Every line is compared with every token that comes, which takes 0.1 ms per thousand.
MAX_TOKENS: Final = 1024
MAX_FILE_BYTES: Final = 2**20
# Longer ones are refused unread; ours have 49 characters.
MAX_TOKEN_CHARS: Final = 512
# A change of the file counts this soon.
CHECK_INTERVAL_S: Final = 1.0

_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    digest: bytes
    caller: Caller


def new_token() -> str:
    """A token that nobody can guess."""
    return TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def token_line(token: str, caller: Caller) -> str:
    """The line by which a token file knows the token."""
    words = [f"sha256:{_digest(token).hex()}", f"tenant={caller.tenant}", f"role={caller.role.value}"]
    for name in ("max_requests", "tokens_per_minute"):
        value = getattr(caller.limits, name)
        words += [f"{name}={value}"] if value is not None else []
    return " ".join(words)


def parse_caller(words: Sequence[str]) -> Caller:
    """tenant=… and what else a line says.

    Raises:
        ConfigError: a word is unknown, given twice or out of range, or the tenant is missing. It repeats no word that is unknown:
            that may be a token which somebody put into the wrong place.
    """
    values: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("tenant", "role", "max_requests", "tokens_per_minute"):
            raise ConfigError("there is a word that is none of tenant=, role=, max_requests=, tokens_per_minute=")
        if name in values:
            raise ConfigError(f"{name} is given twice")
        values[name] = value
    if not _TENANT.fullmatch(values.get("tenant", "")):
        raise ConfigError("tenant= must name it, by up to 63 characters of a-z, 0-9 and . _ -")
    roles = {role.value: role for role in Role}
    if values.get("role", "user") not in roles:
        raise ConfigError(f"role= takes {' or '.join(roles)}")
    return Caller(
        values["tenant"],
        roles[values.get("role", "user")],
        Limits(_limit(values, "max_requests"), _limit(values, "tokens_per_minute")),
    )


def parse_token_file(text: str) -> tuple[Entry, ...]:
    """The lines of a token file.

    Raises:
        ConfigError: of a line, by its number and without its content; or there is no line, or there are too many.
    """
    entries: list[Entry] = []
    limits: dict[str, Limits] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        matched = _HASH.fullmatch(words[0])
        if matched is None:
            raise ConfigError(f"line {number} does not start with sha256: and 64 hex digits; make one with `quire token new`")
        try:
            entry = Entry(bytes.fromhex(matched[1]), parse_caller(words[1:]))
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error.message}") from None
        if limits.setdefault(entry.caller.tenant, entry.caller.limits) != entry.caller.limits:
            raise ConfigError(f"line {number} gives tenant {entry.caller.tenant} other limits than a line before it; they share them")
        if any(other.digest == entry.digest for other in entries):
            raise ConfigError(f"line {number} has the same token as a line before it")
        entries.append(entry)
        if len(entries) > MAX_TOKENS:
            raise ConfigError(f"there are more than {MAX_TOKENS} tokens")
    if not entries:
        raise ConfigError("there is no token in it, so nobody could call; make one with `quire token new`")
    return tuple(entries)


class TokenFile:
    """The callers by their tokens, as the file has them now. A file that cannot be read changes nothing."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: the file cannot be used.
        """
        self._path = path
        self._stamp = self._stat()
        self._entries = self._read()
        self._next_check_s = 0.0

    def find(self, token: str, *, now_s: float) -> Caller | None:
        """Whose token it is; None for nobody's. Takes as long whichever line it is."""
        self._refresh(now_s)
        if len(token) > MAX_TOKEN_CHARS:
            return None
        digest = _digest(token)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        return found

    def _refresh(self, now_s: float) -> None:
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_INTERVAL_S
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = self._read()
            log.info("the token file has changed: %d tokens", len(self._entries))
        except ConfigError as error:
            log.error("%s; the %d tokens from before stay in force", error.message, len(self._entries))

    def _read(self) -> tuple[Entry, ...]:
        try:
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise ConfigError(f"it has more than {MAX_FILE_BYTES} bytes")
            return parse_token_file(content.decode())
        except OSError as error:
            raise ConfigError(f"the token file {self._path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"the token file {self._path} is not text") from None
        except ConfigError as error:
            raise ConfigError(f"the token file {self._path}: {error.message}") from None

    def _stat(self) -> tuple[int, int, int] | None:
        """What changes when the file does; None when there is none."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _limit(values: dict[str, str], name: str) -> int | None:
    if name not in values:
        return None
    text = values[name]
    if not text.isascii() or not text.isdecimal() or len(text) > 11 or int(text) == 0:
        raise ConfigError(f"{name}= takes a whole number from 1 on, of at most 11 digits")
    return int(text)
