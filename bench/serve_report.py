"""What a load on a server measured."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from quire.bench.percentile import percentile
from quire.bench.request_meter import RequestRecord
from quire.bench.table import format_table
from quire.client import ConfigError

PERCENTS: Final = (50, 90, 99)
# What a request may be asked to keep within, by its name on the command line.
OBJECTIVES: Final[Mapping[str, str]] = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "total_s", "normalized": "normalized_s"}
_LABELS: Final[Mapping[str, tuple[str, float]]] = {
    "ttft_s": ("TTFT ms", 1e3),
    "tpot_s": ("TPOT ms", 1e3),
    "itl_s": ("ITL ms", 1e3),
    "normalized_s": ("normalized ms/token", 1e3),
    "total_s": ("request s", 1),
    "tokens_per_s": ("tokens/s each", 1),
    "late_s": ("sent late ms", 1e3),
}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Rates are over the whole run; a spread is mean, p50, p90, p99 of the requests that have the value, of ITL of all gaps."""

    load: str  # such as "8 at a time"
    wall_s: float
    records: tuple[RequestRecord, ...]
    arrivals_s: tuple[float, ...] = ()  # when each request arrived, since the start of the load
    late_s: tuple[float, ...] = ()  # of an open loop: from each request's arrival to its call
    objectives_s: Mapping[str, float] = field(default_factory=dict)  # by name of OBJECTIVES

    @property
    def num_failed(self) -> int:
        return sum(record.error is not None for record in self.records)

    @property
    def num_good(self) -> int:
        """Requests that ended well and kept every objective; one that has no such time (one token has no TPOT) keeps it."""
        return sum(record.error is None and self._is_good(record) for record in self.records)

    @property
    def num_prompt_tokens(self) -> int:
        """Of requests of which the server said so."""
        return sum(record.num_prompt_tokens or 0 for record in self.records)

    @property
    def num_cached_tokens(self) -> int:
        return sum(record.num_cached_tokens for record in self.records)

    @property
    def tokens_per_s(self) -> float:
        return sum(record.num_tokens for record in self.records) / self.wall_s

    @property
    def requests_per_s(self) -> float:
        return (len(self.records) - self.num_failed) / self.wall_s

    def columns(self) -> dict[str, list[float]]:
        """The values of each kind, of requests that ended well; kinds without any are left out."""
        done = [record for record in self.records if record.error is None]
        columns: dict[str, list[float]] = {
            "ttft_s": [record.ttft_s for record in done if record.ttft_s is not None],
            "tpot_s": [record.tpot_s for record in done if record.tpot_s is not None],
            "itl_s": [gap_s for record in done for gap_s in record.gaps_s],
            "normalized_s": [record.normalized_s for record in done if record.normalized_s is not None],
            "total_s": [record.total_s for record in done],
            "tokens_per_s": [record.tokens_per_s for record in done],
            "late_s": list(self.late_s),
        }
        return {name: values for name, values in columns.items() if values}

    def spreads(self) -> dict[str, dict[str, float]]:
        return {
            name: {"mean": sum(values) / len(values)} | {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
            for name, values in self.columns().items()
        }

    def _is_good(self, record: RequestRecord) -> bool:
        times_s = ((getattr(record, OBJECTIVES[name]), most_s) for name, most_s in self.objectives_s.items())
        return all(time_s is None or time_s <= most_s for time_s, most_s in times_s)


def parse_objectives(texts: list[str]) -> dict[str, float]:
    """'ttft:500' and the like, in milliseconds; by name, in seconds.

    Raises:
        ConfigError: it is not of that form.
    """
    objectives_s = {}
    for text in texts:
        name, _, number = text.partition(":")
        try:
            most_s = float(number) / 1e3
        except ValueError:
            most_s = 0.0
        if name not in OBJECTIVES or not 0 < most_s < float("inf"):
            raise ConfigError(f"--goodput {text!r} is no NAME:MILLISECONDS, such as ttft:500; names: {', '.join(OBJECTIVES)}")
        objectives_s[name] = most_s
    return objectives_s


def report_as_json(report: LoadReport) -> dict[str, Any]:
    goodput: dict[str, Any] = {}
    if report.objectives_s:
        goodput = {"objectives_s": dict(report.objectives_s), "num_good": report.num_good}
        goodput["goodput_requests_per_s"] = report.num_good / report.wall_s
    return {
        "load": report.load,
        "wall_s": report.wall_s,
        "num_requests": len(report.records),
        "num_failed": report.num_failed,
        "requests_per_s": report.requests_per_s,
        "output_tokens_per_s": report.tokens_per_s,
        "num_prompt_tokens": report.num_prompt_tokens,
        "num_cached_tokens": report.num_cached_tokens,
        **goodput,
        **report.spreads(),
        "arrivals_s": list(report.arrivals_s),
        "requests": [asdict(record) for record in report.records],
    }


def report_as_text(report: LoadReport, *, each: bool) -> str:
    """Tables of the spreads and, if `each`, of the single requests."""
    parts = []
    if each:
        rows = [_request_row(number, record) for number, record in enumerate(report.records)]
        parts.append(format_table(("request", "prompt", "tokens", "TTFT ms", "TPOT ms", "total s", "tokens/s", "error"), rows))
    rows = [
        (_LABELS[name][0], *(f"{value * _LABELS[name][1]:.2f}" for value in spread.values())) for name, spread in report.spreads().items()
    ]
    if rows:
        parts.append(format_table(("per request", "mean", *(f"p{percent}" for percent in PERCENTS)), rows))
    num_tokens = sum(record.num_tokens for record in report.records)
    parts.append(
        f"{len(report.records)} requests, {report.load}: {num_tokens} tokens in {report.wall_s:.2f} s, "
        f"{report.tokens_per_s:.1f} tokens/s, {report.requests_per_s:.2f} requests/s, {report.num_failed} failed; "
        f"{report.num_cached_tokens} of {report.num_prompt_tokens} prompt tokens were cached"
    )
    if report.objectives_s:
        kept = ", ".join(f"{name} within {most_s * 1e3:g} ms" for name, most_s in report.objectives_s.items())
        parts.append(f"goodput: {report.num_good / report.wall_s:.2f} requests/s, {report.num_good} requests with {kept}")
    errors = Counter(record.error for record in report.records if record.error is not None)
    parts += [f"{count} x {error}" for error, count in errors.most_common(5)]
    return "\n\n".join(parts)


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
