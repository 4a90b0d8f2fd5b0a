"""`quire chat`: talk with a model, line by line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Final, cast

from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.request_flags import add_request_arguments, request_options
from quire.client import ChatOptions, Client, QuireError

HELP: Final = "/system TEXT  speak to the model as the system (starts over)\n/reset        forget the conversation\n/exit         leave"
# What makes no sense turn by turn, or for a rendered conversation.
_LEFT_OUT: Final = ("n", "best_of", "request_id", "echo_prompt", "add_special_tokens", "parse_special_tokens")


class Conversation:
    """The turns so far, oldest first, behind at most one system message."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[tuple[str, str]] = []

    @property
    def messages(self) -> list[tuple[str, str]]:
        return ([("system", self.system)] if self.system else []) + self.turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "quire chat [FLAGS]"
    parser.epilog = "Commands within: " + "; ".join(" ".join(line.split()) for line in HELP.splitlines())
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_request_arguments(parser, leave_out=_LEFT_OUT)
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Each line of standard input is a turn. From a pipe, the first error ends the command; at a terminal it is only shown."""
    interactive = sys.stdin.isatty()
    conversation = Conversation(args.system)
    options = cast(ChatOptions, request_options(args))
    with Client(**connection_options(args)) as client:
        if interactive:
            print(f"{client.address}; /help lists the commands", file=sys.stderr)
        for line in _lines(interactive=interactive):
            if line.startswith("/"):
                if not _command(line, conversation):
                    break
                continue
            try:
                _turn(client, conversation, line, options, interactive=interactive)
            except QuireError as error:
                if not interactive:
                    raise
                print(f"quire: {error.message}", file=sys.stderr)
    return 0


def _lines(*, interactive: bool) -> Iterator[str]:
    """What the user says, without empty lines, until the end of the input."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):  # line editing, where Python has it
        import readline  # noqa: F401 - importing it is what gives input() its line editing
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _command(line: str, conversation: Conversation) -> bool:
    """Obey a line that starts with a slash; False means leave."""
    name, _, text = line.partition(" ")
    if name == "/exit":
        return False
    if name in ("/reset", "/system"):
        conversation.turns.clear()
        if name == "/system":
            conversation.system = text.strip() or None
    else:
        print(HELP if name == "/help" else f"there is no command {name}\n{HELP}", file=sys.stderr)
    return True


def _turn(client: Client, conversation: Conversation, line: str, options: ChatOptions, *, interactive: bool) -> None:
    """Ask, print the reply as it comes, and remember both. Ctrl-C at a terminal ends the reply; what was said stays."""
    conversation.turns.append(("user", line))
    reply = ""
    try:
        with client.chat_stream(conversation.messages, **options) as stream:
            for delta in stream:
                reply += delta.text
                print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except QuireError:
        conversation.turns.pop()
        raise
    print()
    conversation.turns.append(("assistant", reply))
