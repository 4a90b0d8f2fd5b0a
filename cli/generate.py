"""`quire generate`: continue a text."""

import argparse
import json
import sys
from dataclasses import asdict

from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.exit_codes import EXIT_USAGE
from quire.cli.request_flags import add_request_arguments, request_options
from quire.client import Client, GenerateOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "quire generate [PROMPT] [FLAGS]"
    parser.add_argument("prompt", nargs="?", help="the text to continue; standard input when not given, or -")
    parser.add_argument("--json", action="store_true", help="print the whole answer as one JSON object")
    add_request_arguments(parser)
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the completion as it comes; several completions one after the other at the end."""
    prompt = args.prompt
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            print('quire generate: give a prompt, as in: quire generate "Once upon a time"', file=sys.stderr)
            return EXIT_USAGE
        prompt = sys.stdin.read().removesuffix("\n")
    options = request_options(args)
    with Client(**connection_options(args)) as client:
        if args.json:
            print(json.dumps(asdict(client.generate(prompt, **options)), ensure_ascii=False))
        elif (options.get("n") or 1) > 1:
            _print_choices(client, prompt, options)
        else:
            _print_stream(client, prompt, options)
    return 0


def _print_stream(client: Client, prompt: str, options: GenerateOptions) -> None:
    last = "\n"
    with client.stream(prompt, **options) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
            last = delta.text[-1:] or last
    if last != "\n":
        print()


def _print_choices(client: Client, prompt: str, options: GenerateOptions) -> None:
    choices = client.generate(prompt, **options).choices
    for choice in choices:
        print(f"--- {choice.index + 1} of {len(choices)} ({choice.finish_reason}) ---\n{choice.text}")
