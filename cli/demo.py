"""`quire demo`: 8 stories at once, from a cluster of its own or a running one."""

import argparse
import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from quire.bench.request_meter import RequestRecord, measure_stream
from quire.bench.story_prompts import STORY_PROMPTS
from quire.bench.table import format_table
from quire.cli.connection import add_connection_arguments, connection_options
from quire.cli.exit_codes import EXIT_FAILED
from quire.cli.own_cluster import own_cluster
from quire.cli.story_lines import LineWrapper
from quire.client import AsyncClient, Delta, Group

LINE_WIDTH: Final = 100
BLOCKS_POLL_S: Final = 0.1
# How long after the last token the blocks may take to come back.
FREE_TIMEOUT_S: Final = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=96, help="most tokens of each story (default 96)")
    parser.add_argument("--start-timeout", type=float, default=120.0, metavar="SECONDS", help="how long the cluster may take to start")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """With --address on that server, else on a cluster that is started, and stopped again."""
    if args.address is not None:
        return asyncio.run(_tell_stories(args, own=False))
    with own_cluster(start_timeout_s=args.start_timeout) as address:
        args.address = address
        code = asyncio.run(_tell_stories(args, own=True))
    print("the cluster has stopped")
    return code


async def _tell_stories(args: argparse.Namespace, *, own: bool) -> int:
    """Stream, then show tables. On a cluster of our own no block may stay held."""
    async with AsyncClient(**connection_options(args)) as client:
        ended = asyncio.Event()
        watch = asyncio.create_task(_watch_blocks(client, ended))
        start_s = time.monotonic()
        records = await asyncio.gather(
            *(_tell_story(client, number, prompt, max_tokens=args.max_tokens) for number, prompt in enumerate(STORY_PROMPTS, start=1))
        )
        wall_s = time.monotonic() - start_s
        ended.set()
        peak = await watch
        after = await _wait_until_free(client)
    print(f"\n{_table(records, wall_s=wall_s)}\n")
    print(f"blocks: at most {peak.num_held} of {peak.num_blocks} held during the run; {_after_text(after)}")
    failed = [record.error for record in records if record.error is not None]
    for error in failed:
        print(f"failed: {error}")
    return EXIT_FAILED if failed or (own and after.num_held) else 0


async def _tell_story(client: AsyncClient, number: int, prompt: str, *, max_tokens: int) -> RequestRecord:
    """One request, whose lines bear its number. Its seed is fixed: the same story every time."""
    wrapper = LineWrapper(LINE_WIDTH)

    def show(lines: Sequence[str]) -> None:
        for line in filter(None, lines):
            print(f"[{number}] {line}", flush=True)

    def on_delta(delta: Delta) -> None:
        show(wrapper.feed(delta.text))

    show(wrapper.feed(prompt))
    record = await measure_stream(client.stream(prompt, max_tokens=max_tokens, seed=number), on_delta=on_delta)
    show(wrapper.flush())
    return record


@dataclass(frozen=True, slots=True)
class BlockUse:
    """Device blocks over all groups."""

    num_blocks: int
    num_held: int
    num_cached: int


def _block_use(groups: Sequence[Group]) -> BlockUse:
    pools = [group.gpu_blocks for group in groups]
    return BlockUse(
        num_blocks=sum(pool.num_blocks for pool in pools),
        num_held=sum(pool.num_held for pool in pools),
        num_cached=sum(pool.num_cached for pool in pools),
    )


async def _watch_blocks(client: AsyncClient, stop: asyncio.Event) -> BlockUse:
    """Look at the blocks until `stop`; the use with the most held blocks."""
    peak = _block_use(await client.cluster.groups())
    while not stop.is_set():
        peak = max(peak, _block_use(await client.cluster.groups()), key=lambda use: use.num_held)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), BLOCKS_POLL_S)
    return peak


async def _wait_until_free(client: AsyncClient) -> BlockUse:
    """The use once no block is held, or at the end of the patience for it."""
    deadline_s = time.monotonic() + FREE_TIMEOUT_S
    while True:
        use = _block_use(await client.cluster.groups())
        if use.num_held == 0 or time.monotonic() > deadline_s:
            return use
        await asyncio.sleep(BLOCKS_POLL_S)


def _after_text(use: BlockUse) -> str:
    if use.num_held:
        return f"{use.num_held} still held after {FREE_TIMEOUT_S:g} s"
    return f"afterwards none: {use.num_blocks - use.num_cached} free, {use.num_cached} cached"


def _table(records: Sequence[RequestRecord], *, wall_s: float) -> str:
    rows = [
        (
            str(number),
            "-" if record.ttft_s is None else f"{record.ttft_s * 1e3:.0f}",
            "-" if record.tpot_s is None else f"{record.tpot_s * 1e3:.1f}",
            "-" if record.num_prompt_tokens is None else str(record.num_prompt_tokens),
            str(record.num_tokens),
            f"{record.tokens_per_s:.1f}",
        )
        for number, record in enumerate(records, start=1)
    ]
    ttfts = [record.ttft_s for record in records if record.ttft_s is not None]
    tpots = [record.tpot_s for record in records if record.tpot_s is not None]
    num_tokens = sum(record.num_tokens for record in records)
    totals = (
        "all",
        f"{1e3 * sum(ttfts) / len(ttfts):.0f}" if ttfts else "-",
        f"{1e3 * sum(tpots) / len(tpots):.1f}" if tpots else "-",
        str(sum(record.num_prompt_tokens or 0 for record in records)),
        str(num_tokens),
        f"{num_tokens / wall_s:.1f}",
    )
    return format_table(("story", "TTFT ms", "ms per token", "prompt tokens", "tokens", "tokens/s"), rows, totals=totals)
