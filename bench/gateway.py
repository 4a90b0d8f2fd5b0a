"""`quire bench gateway`: what the gateway adds to an engine's times, and how many tokens it can carry.

A process that only ticks stands in for the scheduler (bench/gateway_engine.py); this process is the clients, and the controller,
which has nothing to do once the gateway has its table. So what is measured holds the clients' own work as well.
"""

import argparse
import asyncio
import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Final

from quire.bench.gateway_measures import GatewayLoad, GatewayMeasures, median_measures
from quire.bench.table import format_table
from quire.common.errors import ConfigError

# Targets of the paced run (docs/performance.md).
MAX_ADDED_GAP_S: Final = 0.010
MAX_ADDED_TTFT_S: Final = 0.010
MAX_COALESCED_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class GatewayReport:
    paced: GatewayLoad
    paced_runs: tuple[GatewayMeasures, ...]
    saturating: GatewayLoad
    saturating_runs: tuple[GatewayMeasures, ...]


def report_as_json(report: GatewayReport) -> dict[str, Any]:
    paced = median_measures(report.paced_runs)
    return {
        "paced": asdict(report.paced) | {"median": asdict(paced), "runs": [asdict(run) for run in report.paced_runs]},
        "saturating": asdict(report.saturating)
        | {"median": asdict(median_measures(report.saturating_runs)), "runs": [asdict(run) for run in report.saturating_runs]},
        "targets_met": {
            "added_gap_p99": paced.added_gap_p99_s <= MAX_ADDED_GAP_S,
            "added_ttft_p50": paced.added_ttft_p50_s <= MAX_ADDED_TTFT_S,
            "coalesced_share": paced.coalesced_share < MAX_COALESCED_SHARE,
        },
    }


def report_as_text(report: GatewayReport) -> str:
    parts = []
    for title, load, runs in (
        ("one token each per tick", report.paced, report.paced_runs),
        ("as fast as it goes", report.saturating, report.saturating_runs),
    ):
        num_requests = load.num_streams * load.num_requests
        parts.append(
            f"{title}: {load.num_streams} streams, a tick each {load.tick_s * 1e3:g} ms, "
            f"{num_requests} requests of {load.num_tokens} tokens"
        )
        rows = []
        for label, name, scale, target in (
            ("added gap p50, ms", "added_gap_p50_s", 1e3, ""),
            ("added gap p99, ms", "added_gap_p99_s", 1e3, f"{MAX_ADDED_GAP_S * 1e3:g}"),
            ("delay p50, ms", "delay_p50_s", 1e3, ""),
            ("delay p99, ms", "delay_p99_s", 1e3, ""),
            ("added TTFT p50, ms", "added_ttft_p50_s", 1e3, f"{MAX_ADDED_TTFT_S * 1e3:g}"),
            ("added TTFT p99, ms", "added_ttft_p99_s", 1e3, ""),
            ("tokens coalesced, %", "coalesced_share", 1e2, f"{MAX_COALESCED_SHARE * 1e2:g}"),
            ("tokens/s", "tokens_per_s", 1, ""),
            ("messages/s", "messages_per_s", 1, ""),
            ("gateway CPU, us/token", "gateway_us_per_token", 1, ""),
        ):
            values = [scale * float(getattr(run, name)) for run in runs]
            numbers = [f"{value:.2f}" for value in (statistics.median(values), min(values), max(values))]
            rows.append((label, *numbers, target if load is report.paced else ""))
        parts.append(format_table(("", "median", "min", "max", "at most"), rows))
    return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=128, help="streams that run at once (default 128)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each request (default 200)")
    parser.add_argument("--requests", type=int, default=3, help="requests of each stream, one after the other (default 3)")
    parser.add_argument("--tick", type=float, default=0.01, metavar="SECONDS", help="time between two tokens of a stream (default 0.01)")
    parser.add_argument(
        "--saturating-tick", type=float, default=0.002, metavar="SECONDS", help="the same where as much is asked as goes (default 0.002)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turns, of which medians count (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    for name, least in (("streams", 1), ("tokens", 2), ("requests", 1), ("rounds", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it takes {least} or more")
    for name in ("tick", "saturating_tick"):
        if not 0 < getattr(args, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it takes more than 0 and at most 1 s")
    report = asyncio.run(_run(args))
    print(json.dumps(report_as_json(report)) if args.json else report_as_text(report))
    return 0


async def _run(args: argparse.Namespace) -> GatewayReport:
    from quire.bench.gateway_processes import gateway_bench

    paced, saturating = (GatewayLoad(args.streams, args.tokens, args.requests, tick_s) for tick_s in (args.tick, args.saturating_tick))
    paced_runs, saturating_runs = [], []
    async with gateway_bench() as bench:
        await bench.run(GatewayLoad(num_streams=4, num_tokens=8, num_requests=1, tick_s=args.tick))  # everything is loaded once
        for _ in range(args.rounds):
            paced_runs.append(await bench.run(paced))
            saturating_runs.append(await bench.run(saturating))
    return GatewayReport(paced, tuple(paced_runs), saturating, tuple(saturating_runs))
