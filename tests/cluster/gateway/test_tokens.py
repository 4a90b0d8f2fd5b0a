"""The token file: its lines, its changes, and that it never repeats a secret."""

import logging
import os
from pathlib import Path

import pytest

from quire.cluster.gateway.tenants import Caller, Limits, Role
from quire.cluster.gateway.tokens import CHECK_INTERVAL_S, TokenFile, new_token, parse_token_file, token_line
from quire.common.errors import ConfigError

ACME = Caller("acme", Role.USER, Limits(8, 60_000))
HASH = "sha256:" + "ab" * 32


def test_a_token_is_known_by_its_line_and_by_nothing_else(tmp_path: Path) -> None:
    token, other = new_token(), new_token()
    path = tmp_path / "tokens"
    path.write_text(f"# of acme\n\n{token_line(token, ACME)}\n{token_line(other, Caller('umbrella', Role.ADMIN))}\n")
    tokens = TokenFile(path)
    assert tokens.find(token, now_s=0) == ACME
    assert tokens.find(other, now_s=0) == Caller("umbrella", Role.ADMIN)
    assert token not in path.read_text()
    for wrong in ("", token[:-1], token + " ", token.upper(), token_line(token, ACME).split()[0], "\ud800", "x" * 10_000):
        assert tokens.find(wrong, now_s=0) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no token"),
        ("# nobody\n", "no token"),
        ("quire_marker tenant=a\n", "line 1 does not start with sha256"),
        (f"{HASH}0 tenant=a\n", "line 1"),
        (f"\n{HASH}\n", "line 2: tenant= must name it"),
        (f"{HASH} tenant=a/b\n", "line 1: tenant="),
        (f"{HASH} tenant=a role=root\n", "role= takes user or admin"),
        (f"{HASH} tenant=a tenant=b\n", "tenant is given twice"),
        (f"{HASH} tenant=a quire_marker\n", "line 1: there is a word"),
        (f"{HASH} tenant=a max_requests=0\n", "max_requests= takes"),
        (f"{HASH} tenant=a tokens_per_minute=1e3\n", "tokens_per_minute= takes"),
        (f"{HASH} tenant=a\n{HASH} tenant=b\n", "line 2 has the same token"),
        (f"{HASH} tenant=a\nsha256:{'cd' * 32} tenant=a max_requests=3\n", "line 2 gives tenant a other limits"),
        ("".join(f"sha256:{number:064x} tenant=a\n" for number in range(1025)), "more than 1024"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_not_repeated(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_token_file(text)
    assert "marker" not in caught.value.message
    assert "abab" not in caught.value.message


def test_changes_count_at_the_next_look_and_a_broken_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = new_token(), new_token()
    path = tmp_path / "tokens"
    path.write_text(token_line(first, ACME))
    tokens = TokenFile(path)
    assert tokens.find(first, now_s=10) == ACME
    path.write_text(token_line(second, Caller("umbrella", Role.USER)) + "\n")
    assert tokens.find(second, now_s=10 + CHECK_INTERVAL_S / 2) is None
    assert tokens.find(second, now_s=10 + CHECK_INTERVAL_S) is not None
    assert tokens.find(first, now_s=10 + CHECK_INTERVAL_S) is None
    for number, broken in enumerate((f"{first} tenant=acme", ""), start=2):
        path.write_text(broken)
        assert tokens.find(second, now_s=10 + number * CHECK_INTERVAL_S) is not None
    os.unlink(path)
    assert tokens.find(second, now_s=20) is not None
    assert "stay in force" in caplog.text
    assert first not in caplog.text
    path.write_text(token_line(first, ACME))
    assert tokens.find(second, now_s=30) is None
    assert tokens.find(first, now_s=30) == ACME


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.*cannot be read: No such file"):
        TokenFile(tmp_path / "nothing")
