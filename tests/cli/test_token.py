"""`quire token new`."""

from pathlib import Path

import pytest

from quire.cli.main import main
from quire.cluster.gateway.tenants import Caller, Limits, Role
from quire.cluster.gateway.tokens import TokenFile


def test_a_new_token_is_known_by_the_line_that_is_printed_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "new", "--tenant", "acme", "--role", "admin", "--max-requests", "8", "--tokens-per-minute", "60000"]) == 0
    printed = capsys.readouterr()
    token, path = printed.out.strip(), tmp_path / "tokens"
    path.write_text(printed.err)
    assert TokenFile(path).find(token, now_s=0) == Caller("acme", Role.ADMIN, Limits(8, 60_000))
    assert token not in printed.err


@pytest.mark.parametrize("arguments", [["--tenant", "a b"], ["--tenant", "a", "--max-requests", "0"]])
def test_what_a_server_would_refuse_is_refused_before_there_is_a_token(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "new", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "quire: " in printed.err
