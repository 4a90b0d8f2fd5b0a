"""`quire status`: groups, their ranks and blocks, and the queue."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from quire.bench.table import format_table
from quire.cli.connection import add_connection_arguments, connection_options
from quire.client import BlockPool, Client, Group, Queue, Rank

_CLEAR_SCREEN: Final = "\x1b[H\x1b[2J"
_HEADERS: Final = ("group", "model", "state", "term", "ranks", "running", "preempted", "GPU blocks", "CPU blocks", "steps", "restarts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--watch", type=_seconds, metavar="SECONDS", help="print again every so many seconds, until Ctrl-C")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with Client(**connection_options(args)) as client:
        while True:
            groups, queue = client.cluster.groups(), client.cluster.queue()
            text = _as_json(client.address, groups, queue) if args.json else _as_text(client.address, groups, queue)
            if args.watch is not None and sys.stdout.isatty() and not args.json:
                text = _CLEAR_SCREEN + text
            print(text, flush=True)
            if args.watch is None:
                return 0
            time.sleep(args.watch)


def _as_json(address: str, groups: Sequence[Group], queue: Queue) -> str:
    return json.dumps({"address": address, "groups": [asdict(group) for group in groups], "queue": asdict(queue)})


def _as_text(address: str, groups: Sequence[Group], queue: Queue) -> str:
    lines = [address, ""]
    lines.append(format_table(_HEADERS, [_row(group) for group in groups]) if groups else "no groups")
    lines += [f"{group.group_id}: {group.detail}" for group in groups if group.detail]
    lines.append("")
    lines.append(
        f"queue: {queue.num_waiting_requests} of {queue.max_waiting_requests} requests wait"
        f" ({queue.num_waiting_tokens} of {queue.max_waiting_tokens} tokens; the oldest for {queue.oldest_wait_s:.1f} s);"
        f" {queue.num_running_requests} run"
    )
    return "\n".join(lines)


def _row(group: Group) -> tuple[str, ...]:
    return (
        group.group_id,
        group.model,
        group.state,
        str(group.term),
        _ranks(group.ranks),
        str(group.num_running_sequences),
        str(group.num_preempted_requests),
        _blocks(group.gpu_blocks),
        _blocks(group.cpu_blocks),
        str(group.num_steps),
        str(group.num_restarts),
    )


def _ranks(ranks: Sequence[Rank]) -> str:
    """Device and process of each."""
    return ", ".join(f"{rank.device} ({rank.host + ' ' if rank.host else ''}pid {rank.pid})" for rank in ranks) or "-"


def _blocks(pool: BlockPool) -> str:
    if not pool.num_blocks:
        return "-"
    return f"{pool.num_held}/{pool.num_blocks} held ({100 * pool.num_held / pool.num_blocks:.0f}%), {pool.num_cached} cached"


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return seconds


_seconds.__name__ = "seconds"
