"""`quire top`: a live view of groups, queue and blocks, for a terminal."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from quire.cli.block_map import ASCII_CHARACTERS, CHARACTERS, block_map
from quire.cli.connection import add_connection_arguments, connection_options
from quire.client import BlockPool, Client, Group, GroupBlocks, Queue

# Home, and clear from there: without flicker where the terminal has no alternate screen.
_HOME: Final = "\x1b[H"
_CLEAR_BELOW: Final = "\x1b[J"
_CLEAR_LINE_END: Final = "\x1b[K"
_HIDE_CURSOR: Final = "\x1b[?25l\x1b[2J"
_SHOW_CURSOR: Final = "\x1b[?25h"
# Lines of one pool's map at most.
MAX_MAP_LINES: Final = 8
DEFAULT_WIDTH: Final = 80


@dataclass(frozen=True, slots=True)
class View:
    """What there is to see at one moment."""

    address: str
    now_s: float
    groups: Sequence[Group]
    queue: Queue
    blocks: Sequence[GroupBlocks]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--every", type=_seconds, default=1.0, metavar="SECONDS", help="time between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="look once, print, and exit")
    parser.add_argument("--ascii", action="store_true", help="draw with characters that every terminal has")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    characters = ASCII_CHARACTERS if args.ascii or not _can_show(CHARACTERS) else CHARACTERS
    with Client(**connection_options(args)) as client:
        is_live = sys.stdout.isatty() and not args.once
        before: View | None = None
        try:
            print(_HIDE_CURSOR if is_live else "", end="")
            while True:
                view = look(client)
                size = shutil.get_terminal_size((DEFAULT_WIDTH, 0))
                lines = render(view, before, width=size.columns, characters=characters)
                print(_on_screen(lines, height=size.lines) if is_live else "\n".join(lines), flush=True, end="" if is_live else "\n")
                if args.once:
                    return 0
                before = view
                time.sleep(args.every)
        finally:
            print(_SHOW_CURSOR + "\n" if is_live else "", end="", flush=True)


def look(client: Client) -> View:
    """Ask the cluster."""
    cluster = client.cluster
    return View(client.address, time.monotonic(), cluster.groups(), cluster.queue(), cluster.blocks())


def render(view: View, before: View | None, *, width: int, characters: str = CHARACTERS) -> list[str]:
    """The lines of a view. Step rates come from the one before it, if there is one."""
    queue = view.queue
    waiting = ", ".join(f"{count} {name.lower()}" for name, count in queue.num_waiting_by_priority.items())
    lines = [
        f"{view.address}   {queue.num_running_requests} running, {queue.num_waiting_requests} of {queue.max_waiting_requests} waiting"
        + (f" ({waiting}; the oldest for {queue.oldest_wait_s:.1f} s)" if waiting else "")
    ]
    names = ("free", "cached", "held", "shared")
    lines.append("   ".join(f"{character} {name}" for character, name in zip(characters, names, strict=True)))
    steps_before = {(group.group_id, group.term): group.num_steps for group in before.groups} if before else {}
    blocks = {each.group_id: each for each in view.blocks}
    for group in view.groups:
        lines += ["", _heading(group, steps_before.get((group.group_id, group.term)), view.now_s - before.now_s if before else 0.0)]
        if group.detail:
            lines.append(f"  {group.detail}")
        pools = blocks.get(group.group_id)
        if pools is None:
            continue
        for title, pool, states in (("GPU", pools.gpu_blocks, pools.gpu_states), ("CPU", pools.cpu_blocks, pools.cpu_states)):
            if pool.num_blocks:
                lines.append(f"  {title}  {_pool(pool, is_swap=title == 'CPU')}")
                lines += ["  " + row for row in block_map(states, width=width - 2, max_lines=MAX_MAP_LINES, characters=characters)]
    return [line[:width] for line in lines]


def _heading(group: Group, steps_before: int | None, seconds: float) -> str:
    rate = f"{(group.num_steps - steps_before) / seconds:.0f} steps/s" if steps_before is not None and seconds > 0 else "- steps/s"
    preempted = f", {group.num_preempted_requests} swapped out" if group.num_preempted_requests else ""
    restarts = f", {group.num_restarts} restarts" if group.num_restarts else ""
    return f"{group.group_id}  {group.state}  {rate}, {group.num_running_sequences} sequences{preempted}{restarts}"


def _pool(pool: BlockPool, *, is_swap: bool) -> str:
    held = "swapped" if is_swap else "held"
    shared = f" ({pool.num_shared} shared)" if pool.num_shared else ""
    share = 100 * pool.num_held / pool.num_blocks
    return f"{pool.num_blocks} blocks: {pool.num_held} {held}{shared}, {pool.num_cached} cached, {pool.num_free} free; {share:.0f}% in use"


def _on_screen(lines: Sequence[str], *, height: int) -> str:
    """Over what was there before; what does not fit is left out, lest the screen scrolls."""
    shown = lines[: max(1, height - 1)] if height else lines
    return _HOME + "".join(f"{line}{_CLEAR_LINE_END}\n" for line in shown) + _CLEAR_BELOW


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} seconds is not from 0.1 to 3600")
    return seconds


_seconds.__name__ = "seconds"
