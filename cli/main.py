"""`quire …`: finds the command and runs it. A command's module is imported only when that command is called.

Each module has `add_arguments(parser)` and `run(args) -> int`, the exit code. Errors of ours are one line and exit code 1,
a wrong command line is 2, Ctrl-C is 130.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from quire.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from quire.common.errors import QuireError
from quire.common.version import quire_version

COMMANDS: Final = {
    "serve": ("quire.cli.serve", "start a cluster on this machine and serve a model"),
    "controller": ("quire.cli.controller", "start a cluster on a Ray that is there already, without an edge"),
    "gateway": ("quire.cli.gateway", "join a running cluster with more gateways"),
    "generate": ("quire.cli.generate", "continue a text"),
    "chat": ("quire.cli.chat", "talk with a model"),
    "status": ("quire.cli.status", "show groups, blocks and queue of a running cluster"),
    "top": ("quire.cli.top", "watch groups, queue and blocks of a running cluster live"),
    "health": ("quire.cli.health", "ask whether a cluster serves"),
    "drain": ("quire.cli.drain", "take a worker group out of service once it has finished"),
    "scale": ("quire.cli.scale", "give a model more worker groups, or fewer"),
    "restart": ("quire.cli.restart", "restart worker groups, one after the other"),
    "doctor": ("quire.cli.doctor", "check whether this machine can serve, and say what to do where it cannot"),
    "key": ("quire.cli.key", "make the keys of a cluster on several hosts"),
    "token": ("quire.cli.token", "make a token for a tenant of a cluster"),
    "bench": ("quire.cli.bench", "measure a running cluster, or its scheduler alone"),
    "debug": ("quire.cli.debug", "look into what a cluster did"),
    "demo": ("quire.cli.demo", "start a cluster, run 8 prompts at once, stop it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except QuireError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Nobody is to hear of what Python would still flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _run(argv: list[str]) -> int:
    # The name comes first and stands alone: argparse's own subcommands would import every command's module for its flags.
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else EXIT_USAGE
    if name in ("-V", "--version", "version"):
        print(f"quire {quire_version()}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `quire {close[0]}`?" if close else "see `quire --help`"
        print(f"quire: there is no command {name!r}; {hint}", file=sys.stderr)
        return EXIT_USAGE
    module_name, summary = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
        parser = _Parser(prog=f"quire {name}", description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(rest)))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "quire":
            raise
        print(f'quire {name} needs the server extra; install it with: pip install "quire[server]"', file=sys.stderr)
        return EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    """Refuses a command line in one line; argparse would print every flag first."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: quire COMMAND [ARGUMENTS]\n\n"
        f"Serve large language models from a cluster, over gRPC.\n\ncommands:\n{commands}\n\n"
        "`quire COMMAND --help` tells more of each; `quire --version` gives the version."
    )


if __name__ == "__main__":
    sys.exit(main())
