"""`quire bench cpu`: the worker beside transformers' own ways of generating, on this machine's processor.

All run in this process, in turns: the machine's speed may change from one minute to the next, so only what ran side by side
is compared. A round is one turn of each; the median of the rounds' ratios counts.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quire.bench.table import format_table
from quire.common.errors import ConfigError

# torch takes seconds to import, and `quire bench --help` needs none of it.
if TYPE_CHECKING:
    from quire.bench.cpu_contestants import Contestant
    from quire.bench.cpu_workload import Requests

# What quire's tokens per second must be of the others'.
TARGETS: Final = {"transformers continuous batching": 1.3, "static batches of 32": 1.5, "generate one by one": 0.9}
# Requests that run one by one: a few say as much as all.
NUM_ALONE: Final = 4
# Requests of a turn that come before the clock starts.
NUM_WARM_UP: Final = 2


@dataclass(frozen=True, slots=True)
class Line:
    """One contestant with one dtype."""

    name: str
    dtype: str
    is_alone: bool  # one request at a time, else all at once
    tokens_per_s: tuple[float, ...]  # by round
    num_different: int  # completions other than quire's, which in float32 must be none

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Quire's speed by another's, the median of the rounds' ratios, and what it must be at least."""

    name: str
    dtype: str
    ratio: float
    target: float


def measure(
    batched: "Sequence[Contestant]", alone: "Sequence[Contestant]", requests: "Requests", *, dtype: str, num_rounds: int
) -> list[Line]:
    """Rounds in which each contestant has its turn; the first of `batched` and of `alone` is quire."""
    speeds: dict[tuple[str, bool], list[float]] = {}
    completions: dict[tuple[str, bool], list[list[int]]] = {}
    for number in range(num_rounds):
        for is_alone, contestants in ((False, batched), (True, alone)):
            for contestant in contestants:
                key = (contestant.name, is_alone)
                with contestant.ready():
                    contestant.generate(requests[:NUM_WARM_UP])
                    started_s = time.perf_counter()
                    if is_alone:
                        completions[key] = [contestant.generate([request])[0] for request in requests[:NUM_ALONE]]
                    else:
                        completions[key] = contestant.generate(requests)
                    took_s = time.perf_counter() - started_s
                num_tokens = sum(map(len, completions[key]))
                speeds.setdefault(key, []).append(num_tokens / took_s)
                if sys.stderr.isatty():
                    print(f"{dtype} round {number + 1}: {contestant.name}, {speeds[key][-1]:.0f} tokens/s", file=sys.stderr)
    lines = []
    for (name, is_alone), values in speeds.items():
        expected = completions[batched[0].name, False]
        pairs = zip(completions[name, is_alone], expected, strict=not is_alone)
        lines.append(Line(name, dtype, is_alone, tuple(values), sum(given != wanted for given, wanted in pairs)))
    return lines


def ratios(lines: Sequence[Line]) -> list[Ratio]:
    """Of each line but quire's to quire's of the same dtype and kind."""
    quire = {(line.dtype, line.is_alone): line.tokens_per_s for line in lines if line.name == "quire"}
    compared = []
    for line in lines:
        if line.name != "quire":
            pairs = zip(quire[line.dtype, line.is_alone], line.tokens_per_s, strict=True)
            compared.append(Ratio(line.name, line.dtype, statistics.median(ours / theirs for ours, theirs in pairs), TARGETS[line.name]))
    return compared


def report_as_text(lines: Sequence[Line]) -> str:
    """A row per contestant; quire's rows have no ratio."""
    by_key = {(ratio.name, ratio.dtype): ratio for ratio in ratios(lines)}
    rows = []
    for line in lines:
        ratio = by_key.get((line.name, line.dtype))
        rows.append(
            (
                line.dtype,
                "one by one" if line.is_alone else "at once",
                line.name,
                f"{line.median:.0f}",
                f"{min(line.tokens_per_s):.0f}",
                f"{max(line.tokens_per_s):.0f}",
                "-" if ratio is None else f"{ratio.ratio:.2f}",
                "-" if ratio is None else f"{ratio.target:.1f}",
                str(line.num_different),
            )
        )
    headers = ("dtype", "requests", "engine", "tokens/s", "least", "most", "quire is", "target", "other tokens")
    return format_table(headers, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--requests", type=int, default=32, help="requests at once (default 32)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of them alone; both when not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """1 if a target is missed or, in float32, tokens differ."""
    for name in ("rounds", "requests", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it takes 1 or more")
    import torch
    from transformers.utils import logging as transformers_logging

    from quire.bench.cpu_contestants import BATCH, ContinuousBatching, Quire, StaticBatches
    from quire.bench.cpu_workload import make_requests, save_model

    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    requests = make_requests(args.requests)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as temporary:
        folder = Path(temporary)
        save_model(folder)
        for dtype in ("float32", "bfloat16") if args.dtype is None else (args.dtype,):
            quire = Quire(folder, dtype=dtype)
            static = StaticBatches(folder, dtype=dtype, batch_size=BATCH)
            one_by_one = StaticBatches(folder, dtype=dtype, batch_size=1)
            batched = (quire, ContinuousBatching(folder, dtype=dtype), static)
            lines += measure(batched, (quire, one_by_one), requests, dtype=dtype, num_rounds=args.rounds)
    compared = ratios(lines)
    if args.json:
        shown = [{**asdict(line), "median_tokens_per_s": line.median} for line in lines]
        settings = {"rounds": args.rounds, "requests": args.requests, "threads": args.threads, "torch": torch.__version__}
        print(json.dumps({"settings": settings, "engines": shown, "ratios": [asdict(ratio) for ratio in compared]}))
    else:
        print(report_as_text(lines))
    is_slow = any(ratio.ratio < ratio.target for ratio in compared)
    return 1 if is_slow or any(line.num_different and line.dtype == "float32" for line in lines) else 0
