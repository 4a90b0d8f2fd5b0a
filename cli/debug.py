"""`quire debug …`: looking into what a cluster did."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from quire.bench.table import format_table
from quire.cluster.scheduler.replay import Replay, RequestStory, replay
from quire.common.errors import ConfigError, NotFound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    tool = tools.add_parser(
        "replay",
        help="tell the story of a request from a scheduler's journal",
        description="Live through a journal that `quire serve --scheduler-journal FILE` wrote: check that the same inputs give the "
        "same plans, list the requests, or tell why one of them waited, where it ran, and who took its blocks.",
    )
    tool.add_argument("file", type=Path, help="the journal")
    tool.add_argument("--request", metavar="ID", help="tell the story of this request; several attempts of it are told one after another")
    tool.add_argument("--plans", action="store_true", help="print every plan, one a line, with its time and group")
    tool.set_defaults(run_tool=_run_replay)


def run(args: argparse.Namespace) -> int:
    return int(args.run_tool(args))


def _run_replay(args: argparse.Namespace) -> int:
    try:
        with args.file.open("rb") as journal:
            result = replay(journal)
    except OSError as error:
        raise ConfigError(f"{args.file} cannot be read: {error.strerror}") from None
    if args.plans:
        for at_s, group_id, plan in result.plans:
            fields = ", ".join(f"{name}={value}" for name in plan.__struct_fields__ if (value := getattr(plan, name)) not in ((), False))
            print(f"{at_s:12.6f} s  {group_id}  {fields}")
        return 0
    if args.request is None:
        _print_summary(result)
        return 0
    stories = [story for story in result.stories.values() if story.request_id == args.request]
    if not stories:
        raise NotFound(
            f"the journal has no request {args.request!r} among its {len(result.stories)}; `quire debug replay {args.file}` lists them",
            reason="NO_SUCH_REQUEST",
        )
    for story in stories:
        sys.stdout.writelines(_lines(story))
    return 0


def _print_summary(result: Replay) -> None:
    print(f"{result.num_inputs} inputs over {result.span_s:.3f} s gave the same {result.num_plans} plans again\n")
    rows = []
    for story in result.stories.values():
        preemptions = sum(event.count for event in story.events if event.text.startswith(("swapped out", "preempted for")))
        waits = sum(event.text.startswith("waits") for event in story.events)
        rows.append((story.request_id, f"{story.events[0].first_s:.3f}", str(waits), str(preemptions), story.events[-1].text))
    print(format_table(("request", "arrival s", "waits", "preemptions", "end"), rows))


def _lines(story: RequestStory) -> Iterable[str]:
    for event in story.events:
        times = f" ({event.count} times until {event.last_s:.3f} s)" if event.count > 1 else ""
        yield f"{event.first_s:10.3f} s  {event.text}{times}\n"
