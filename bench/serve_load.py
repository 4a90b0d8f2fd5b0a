"""`quire bench serve`: closed-loop load on a running server, through the SDK.

Closed loop: `concurrency` callers, each of which sends its next request when its last one has ended.
"""

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from quire.bench.percentile import percentile
from quire.bench.request_meter import RequestRecord, measure_stream
from quire.bench.story_prompts import STORY_PROMPTS
from quire.bench.table import format_table
from quire.client import AsyncClient, ConfigError, GenerateOptions
from quire.common.clock import monotonic

PERCENTS: Final = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the load measured. Rates are over the whole run; a spread is mean, p50, p90, p99 of the requests that have the value."""

    concurrency: int
    wall_s: float
    records: tuple[RequestRecord, ...]

    @property
    def num_failed(self) -> int:
        return sum(record.error is not None for record in self.records)

    @property
    def tokens_per_s(self) -> float:
        return sum(record.num_tokens for record in self.records) / self.wall_s

    @property
    def requests_per_s(self) -> float:
        return (len(self.records) - self.num_failed) / self.wall_s

    def spreads(self) -> dict[str, dict[str, float]]:
        done = [record for record in self.records if record.error is None]
        columns: dict[str, list[float]] = {
            "ttft_s": [record.ttft_s for record in done if record.ttft_s is not None],
            "tpot_s": [record.tpot_s for record in done if record.tpot_s is not None],
            "total_s": [record.total_s for record in done],
            "tokens_per_s": [record.tokens_per_s for record in done],
        }
        return {
            name: {"mean": sum(values) / len(values)} | {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
            for name, values in columns.items()
            if values
        }


async def run_load(
    client: AsyncClient, prompts: Sequence[str], *, num_requests: int, concurrency: int, options: GenerateOptions
) -> LoadReport:
    """Send `num_requests` requests; request k takes prompt k and seed k, so that a run can be repeated."""
    records: dict[int, RequestRecord] = {}
    numbers = iter(range(num_requests))

    async def caller() -> None:
        for number in numbers:  # shared: each number goes to one caller
            seeded: GenerateOptions = {**options, "seed": number}
            records[number] = await measure_stream(client.stream(prompts[number % len(prompts)], **seeded))

    start_s = monotonic()
    await asyncio.gather(*(caller() for _ in range(min(concurrency, num_requests))))
    return LoadReport(
        concurrency=concurrency, wall_s=monotonic() - start_s, records=tuple(records[number] for number in range(num_requests))
    )


def report_as_json(report: LoadReport) -> dict[str, Any]:
    return {
        "concurrency": report.concurrency,
        "wall_s": report.wall_s,
        "num_requests": len(report.records),
        "num_failed": report.num_failed,
        "requests_per_s": report.requests_per_s,
        "tokens_per_s": report.tokens_per_s,
        **report.spreads(),
        "requests": [asdict(record) for record in report.records],
    }


def report_as_text(report: LoadReport, *, each: bool) -> str:
    """Tables of the spreads and, if `each`, of the single requests."""
    parts = []
    if each:
        rows = [_request_row(number, record) for number, record in enumerate(report.records)]
        parts.append(format_table(("request", "prompt", "tokens", "TTFT ms", "TPOT ms", "total s", "tokens/s", "error"), rows))
    labels = {"ttft_s": ("TTFT ms", 1e3), "tpot_s": ("TPOT ms", 1e3), "total_s": ("request s", 1), "tokens_per_s": ("tokens/s each", 1)}
    rows = [
        (labels[name][0], *(f"{value * labels[name][1]:.2f}" for value in spread.values())) for name, spread in report.spreads().items()
    ]
    if rows:
        parts.append(format_table(("per request", "mean", *(f"p{percent}" for percent in PERCENTS)), rows))
    num_tokens = sum(record.num_tokens for record in report.records)
    parts.append(
        f"{len(report.records)} requests, {report.concurrency} at a time: {num_tokens} tokens in {report.wall_s:.2f} s, "
        f"{report.tokens_per_s:.1f} tokens/s, {report.requests_per_s:.2f} requests/s, {report.num_failed} failed"
    )
    errors = Counter(record.error for record in report.records if record.error is not None)
    parts += [f"{count} x {error}" for error, count in errors.most_common(5)]
    return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="host:port of the server; else QUIRE_ADDRESS, else 127.0.0.1:50051")
    parser.add_argument("--concurrency", type=int, default=8, help="requests that run at once (default 8)")
    parser.add_argument("--requests", type=int, default=64, help="requests in all (default 64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of each (default 64)")
    parser.add_argument("--prompt-file", type=Path, help="a prompt per line; story openings when not given")
    parser.add_argument("--model", help="model to ask; the server's default when not given")
    parser.add_argument("--temperature", type=float, help="the model's default when not given")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="make every request --max-tokens long")
    parser.add_argument("--each", action="store_true", help="a row for each request")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """1 if any request failed."""
    for name in ("concurrency", "requests"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it takes 1 or more")
    report = asyncio.run(_run(args, _prompts(args.prompt_file)))
    print(json.dumps(report_as_json(report)) if args.json else report_as_text(report, each=args.each))
    return 1 if report.num_failed else 0


async def _run(args: argparse.Namespace, prompts: Sequence[str]) -> LoadReport:
    options: GenerateOptions = {
        "model": args.model,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "ignore_eos": args.ignore_eos,
    }
    async with AsyncClient(args.address) as client:
        await client.generate(prompts[0], model=args.model, max_tokens=1)  # connects, and fails at once if nothing can work
        if sys.stderr.isatty():
            print(f"{args.requests} requests to {client.address}, {args.concurrency} at a time ...", file=sys.stderr)
        return await run_load(client, prompts, num_requests=args.requests, concurrency=args.concurrency, options=options)


def _prompts(path: Path | None) -> Sequence[str]:
    if path is None:
        return STORY_PROMPTS
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {path} cannot be read: {error}") from error
    if not prompts:
        raise ConfigError(f"--prompt-file {path} has no prompt in it; give one per line")
    return prompts


def _request_row(number: int, record: RequestRecord) -> tuple[str, ...]:
    return (
        str(number),
        "-" if record.num_prompt_tokens is None else str(record.num_prompt_tokens),
        str(record.num_tokens),
        "-" if record.ttft_s is None else f"{record.ttft_s * 1e3:.1f}",
        "-" if record.tpot_s is None else f"{record.tpot_s * 1e3:.2f}",
        f"{record.total_s:.2f}",
        f"{record.tokens_per_s:.1f}",
        record.error or "",
    )
