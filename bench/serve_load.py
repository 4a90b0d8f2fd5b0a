"""`quire bench serve`: load on a running server, through the SDK, from processes of its own.

Closed loop: `--concurrency` callers, each of which sends its next request when its last one has ended. Open loop: requests arrive
by themselves, `--rate` of them per second, whatever has become of those before; only that shows how a server does under a load
that does not wait for it.
"""

import argparse
import asyncio
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from quire.bench.progress_bar import ProgressBar
from quire.bench.serve_clients import run_clients
from quire.bench.serve_plot import load_matplotlib, plot_load
from quire.bench.serve_report import LoadReport, parse_objectives, report_as_json, report_as_text
from quire.bench.serve_requests import LoadSpec
from quire.bench.story_prompts import STORY_PROMPTS
from quire.client import AsyncClient, ConfigError, Model

DEFAULT_CONCURRENCY: Final = 8
# More client processes than this measure each other.
MAX_PROCESSES: Final = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="host:port of the server; else QUIRE_ADDRESS, else 127.0.0.1:50051")
    parser.add_argument("--concurrency", type=int, help=f"closed loop: requests that run at once (default {DEFAULT_CONCURRENCY})")
    parser.add_argument("--rate", type=float, metavar="PER_SECOND", help="open loop: requests that arrive per second, at random times")
    parser.add_argument("--requests", type=int, default=64, help="requests in all (default 64)")
    parser.add_argument("--processes", type=int, default=2, help="client processes (default 2)")
    parser.add_argument(
        "--workload",
        choices=("prompts", "azure"),
        default="prompts",
        help="prompts: --prompt-file, else story openings; azure: lengths of the Azure conversation trace, random token ids",
    )
    parser.add_argument("--max-tokens", type=int, help="most tokens of each (default 64); azure's come from the trace")
    parser.add_argument("--prompt-file", type=Path, help="a prompt per line")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="random prompts of N token ids each, all of --max-tokens tokens")
    parser.add_argument(
        "--cache-salt",
        help="share cached prompts only with requests of this salt; "
        "when not given, with those that have none, and random prompts get one of their own each time",
    )
    parser.add_argument("--model", help="model to ask; the server's default when not given")
    parser.add_argument("--temperature", type=float, help="the model's default when not given")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="make every request --max-tokens long")
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep all of these: ttft:MS, tpot:MS, e2e:MS, normalized:MS",
    )
    parser.add_argument("--each", action="store_true", help="a row for each request")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the spreads; needs the bench extra")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """1 if any request failed."""
    _check(args)
    objectives_s = parse_objectives(args.goodput)
    figures = load_matplotlib() if args.plot is not None else None
    spec = asyncio.run(_make_spec(args, _prompts(args)))
    bar = ProgressBar(spec.num_requests, "requests")
    try:
        sent = run_clients(
            spec,
            on_end=lambda ended, failed, elapsed_s: bar.draw(ended, elapsed_s=elapsed_s, note=f", {failed} failed" if failed else ""),
        )
    finally:
        bar.close()
    report = LoadReport(
        load=f"{spec.concurrency} at a time" if spec.rate_per_s is None else f"{spec.rate_per_s:g} arriving per second",
        wall_s=max(request.end_s for request in sent),
        records=tuple(request.record for request in sent),
        arrivals_s=tuple(request.end_s - request.record.total_s for request in sent),
        late_s=() if spec.rate_per_s is None else tuple(request.late_s for request in sent),
        objectives_s=objectives_s,
    )
    print(json.dumps(report_as_json(report)) if args.json else report_as_text(report, each=args.each))
    if args.plot is not None:  # last: a file that cannot be written must not cost the numbers
        plot_load(report, args.plot, figures)
    return 1 if report.num_failed else 0


def _check(args: argparse.Namespace) -> None:
    """Raises:
    ConfigError: a flag is out of range, or two of them do not go together.
    """
    for name in ("concurrency", "requests", "processes", "max_tokens", "prompt_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it takes 1 or more")
    if args.processes > MAX_PROCESSES:
        raise ConfigError(f"--processes is {args.processes}; it takes at most {MAX_PROCESSES}")
    if args.rate is not None and not 0 < args.rate < float("inf"):
        raise ConfigError(f"--rate is {args.rate}; it takes more than 0 requests per second")
    if args.rate is not None and args.concurrency is not None:
        raise ConfigError("--rate is for an open loop and --concurrency for a closed one; give one of them")
    if args.prompt_tokens is not None and args.prompt_file is not None:
        raise ConfigError("--prompt-tokens makes random prompts and --prompt-file reads them; give one of them")
    if args.workload == "azure":
        for name in ("prompt_file", "prompt_tokens", "max_tokens", "ignore_eos"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} does not go with --workload azure, whose trace says it; leave it out")


async def _make_spec(args: argparse.Namespace, prompts: Sequence[str]) -> LoadSpec:
    """Asks the server for its model, and fails at once if nothing can work."""
    async with AsyncClient(args.address) as client:
        await client.generate("a" if prompts else (0,), model=args.model, max_tokens=1)
        model = _model(await client.models(), args.model)
    concurrency = None if args.rate is not None else min(args.concurrency or DEFAULT_CONCURRENCY, args.requests)
    return LoadSpec(
        address=args.address,
        model=args.model,
        num_requests=args.requests,
        num_processes=min(args.processes, args.requests if concurrency is None else concurrency),
        concurrency=concurrency,
        rate_per_s=args.rate,
        prompts=tuple(prompts),
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens or 64,
        # Random prompts are the same each time, and would be found in the cache by the second load on a server.
        cache_salt=args.cache_salt if prompts or args.cache_salt is not None else secrets.token_hex(8),
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
    )


def _model(models: Sequence[Model], name: str | None) -> Model:
    """The one that a request with this name meant: it was answered, so it is there."""
    return next((model for model in models if (model.name == name if name else model.is_default)), models[0])


def _prompts(args: argparse.Namespace) -> Sequence[str]:
    """Empty for random token ids."""
    if args.workload == "azure" or args.prompt_tokens is not None:
        return ()
    path: Path | None = args.prompt_file
    if path is None:
        return STORY_PROMPTS
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {path} cannot be read: {error}") from error
    if not prompts:
        raise ConfigError(f"--prompt-file {path} has no prompt in it; give one per line")
    return prompts
