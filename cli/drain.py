"""`quire drain GROUP`: take a worker group out of service once it has finished what it runs."""

import argparse
import time

from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.exit_codes import EXIT_FAILED
from quire.cli.waiting import POLL_S, seconds
from quire.client import Client, Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", help="the group's id, as `quire status` shows it")
    parser.add_argument("--wait", type=seconds, metavar="SECONDS", help="wait so long for its end; exit code 1 if it runs on then")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with Client(**connection_options(args)) as client:
        group = client.cluster.drain(args.group)
        print(_line(group), flush=True)
        if args.wait is None:
            return 0
        deadline_s = time.monotonic() + args.wait
        while group.state != "STOPPED":
            if time.monotonic() >= deadline_s:
                print(_line(group))
                return EXIT_FAILED
            time.sleep(POLL_S)
            group = next((each for each in client.cluster.groups() if each.group_id == args.group), group)
        print(_line(group))
    return 0


def _line(group: Group) -> str:
    return f"{group.group_id}: {group.state}, {group.num_running_sequences} sequences run"
