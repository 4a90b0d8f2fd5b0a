"""`quire restart GROUP|MODEL`: restart worker groups one after the other, while the others serve."""

import argparse

from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.exit_codes import EXIT_FAILED
from quire.cli.waiting import group_line, seconds, wait_until
from quire.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="GROUP|MODEL", help="a group, or all groups of a model, as `quire status` names them")
    parser.add_argument("--wait", type=seconds, metavar="SECONDS", help="wait so long until all are back; exit code 1 if they are not then")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with Client(**connection_options(args)) as client:
        former = {group.group_id: group for group in client.cluster.groups()}
        kind = "group_id" if args.target in former else "model"
        chosen = client.cluster.restart(**{kind: args.target})
        former |= {group.group_id: group for group in chosen if group.group_id not in former}
        for group in chosen:
            print(group_line(group), flush=True)
        if args.wait is None:
            return 0
        waiting = {group.group_id: former[group.group_id].num_restarts for group in chosen}
        failed = []

        def are_back() -> bool:
            now = {group.group_id: group for group in client.cluster.groups()}
            for group_id, num_restarts in list(waiting.items()):
                group = now.get(group_id)
                if group is None or group.state == "STOPPED":
                    failed.append(group_id)
                if group is None or group.state == "STOPPED" or (group.num_restarts > num_restarts and group.state == "READY"):
                    del waiting[group_id]
                    print(f"{group_id}: gone" if group is None else group_line(group), flush=True)
            return not waiting

        is_done = wait_until(are_back, timeout_s=args.wait)
    return 0 if is_done and not failed else EXIT_FAILED
