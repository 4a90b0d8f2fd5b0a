"""The frame around the commands: names, exit codes, what is imported when."""

import subprocess
import sys

import pytest
from quire_command import quire

from quire.cli import main


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from quire.cli.main import main, COMMANDS; assert main(['--help']) == 0;"
        "loaded = {module for module, _ in COMMANDS.values()} | {'grpc', 'quire.client', 'asyncio'};"
        "assert not loaded & set(sys.modules), loaded & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in main.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("quire ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generat"], "there is no command 'generat'; did you mean `quire generate`?"),
        (["xyzzy"], "see `quire --help`"),
    ],
)
def test_an_unknown_command_is_a_usage_error(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    assert says in capsys.readouterr().err


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    assert "usage: quire COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "x", "--temperature", "hot"], "quire generate: argument --temperature: invalid float value: 'hot'"),
        (["generate", "x", "--temp", "1"], "unrecognized arguments: --temp"),
        (["generate", "x", "--stop-token-ids", "a"], "invalid token ids value"),
        (["bench"], "quire bench: the following arguments are required: BENCHMARK"),
        (["status", "--watch", "0"], "0 is not above 0"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_an_error_of_ours_is_one_line_and_exit_code_1() -> None:
    done = quire("status", address="127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "quire: nothing answers at 127.0.0.1:1; start a server with `quire serve`\n"


def test_a_missing_module_of_the_server_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'msgspec'", name="msgspec.json")

    monkeypatch.setattr("importlib.import_module", missing)
    assert main.main(["serve"]) == 1
    assert capsys.readouterr().err == 'quire serve needs the server extra; install it with: pip install "quire[server]"\n'


def test_a_missing_module_of_our_own_is_a_bug_and_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'quire.cli.nothing'", name="quire.cli.nothing")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        main.main(["serve"])
