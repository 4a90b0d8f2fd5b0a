"""`quire scale MODEL=N`: give a model so many worker groups."""

import argparse
import sys
import time

from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.exit_codes import EXIT_FAILED
from quire.cli.waiting import POLL_S, group_line, seconds, wait_until
from quire.client import Client, ConfigError, Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "wish", type=_wish, metavar="MODEL=N", help="the model, as `quire status` names it, and its number of groups; the newest go first"
    )
    parser.add_argument(
        "--wait",
        type=seconds,
        metavar="SECONDS",
        help="wait so long for hosts to have room and groups to be ready; exit code 1 if they are not then",
    )
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    model, num_groups = args.wish
    deadline_s = time.monotonic() + (args.wait or 0)
    with Client(**connection_options(args)) as client:
        _print(_scale(client, model, num_groups, deadline_s), model)
        if args.wait is None:
            return 0

        def has_them() -> bool:
            groups = [group for group in client.cluster.groups() if group.model == model]
            return len(groups) == num_groups and all(group.state == "READY" for group in groups)

        is_done = wait_until(has_them, timeout_s=deadline_s - time.monotonic())
        _print(client.cluster.groups(), model)
    return 0 if is_done else EXIT_FAILED


def _scale(client: Client, model: str, num_groups: int, deadline_s: float) -> tuple[Group, ...]:
    """Ask until there is room: whoever adds hosts and then groups is ahead of Ray, which sees a host some time after it has joined."""
    has_said_why = False
    while True:
        try:
            return client.cluster.scale(model, num_groups)
        except ConfigError as error:
            left_s = deadline_s - time.monotonic()
            if error.reason != "NO_PLACE" or left_s <= 0:
                raise
            if not has_said_why:
                print(f"quire: {error}\nquire: waiting up to {left_s:.0f} s for hosts that are on their way", file=sys.stderr, flush=True)
                has_said_why = True
            time.sleep(min(POLL_S, left_s))


def _print(groups: tuple[Group, ...], model: str) -> None:
    lines = [group_line(group) for group in groups if group.model == model]
    print("\n".join(lines) or f"{model} has no groups", flush=True)


def _wish(text: str) -> tuple[str, int]:
    model, _, number = text.rpartition("=")
    if not model or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=N, a model and a number of groups from 0")
    return model, int(number)
