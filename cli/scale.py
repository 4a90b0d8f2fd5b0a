"""`quire scale MODEL=N`: give a model so many worker groups."""

import argparse

from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.exit_codes import EXIT_FAILED
from quire.cli.waiting import group_line, seconds, wait_until
from quire.client import Client, Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "wish", type=_wish, metavar="MODEL=N", help="the model, as `quire status` names it, and its number of groups; the newest go first"
    )
    parser.add_argument("--wait", type=seconds, metavar="SECONDS", help="wait so long until it has them; exit code 1 if it has not then")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    model, num_groups = args.wish
    with Client(**connection_options(args)) as client:
        _print(client.cluster.scale(model, num_groups), model)
        if args.wait is None:
            return 0

        def has_them() -> bool:
            groups = [group for group in client.cluster.groups() if group.model == model]
            return len(groups) == num_groups and all(group.state == "READY" for group in groups)

        is_done = wait_until(has_them, timeout_s=args.wait)
        _print(client.cluster.groups(), model)
    return 0 if is_done else EXIT_FAILED


def _print(groups: tuple[Group, ...], model: str) -> None:
    lines = [group_line(group) for group in groups if group.model == model]
    print("\n".join(lines) or f"{model} has no groups", flush=True)


def _wish(text: str) -> tuple[str, int]:
    model, _, number = text.rpartition("=")
    if not model or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=N, a model and a number of groups from 0")
    return model, int(number)
