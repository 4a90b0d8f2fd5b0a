"""The spreads of a load, drawn: how many of the requests took how long."""

from pathlib import Path
from typing import Any, Final

from quire.bench.serve_report import LoadReport
from quire.client import ConfigError

PANELS: Final = (("ttft_s", "TTFT, ms", 1e3), ("tpot_s", "TPOT, ms", 1e3), ("itl_s", "ITL, ms", 1e3), ("total_s", "whole request, s", 1.0))
_NEEDS_EXTRA: Final = '--plot needs matplotlib, which is in the bench extra; install it with: pip install "quire[bench]"'


def load_matplotlib() -> Any:
    """Before a load runs, so that it does not run in vain.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from matplotlib import figure
    except ModuleNotFoundError as error:
        raise ConfigError(_NEEDS_EXTRA, reason="NO_MATPLOTLIB") from error
    return figure


def plot_load(report: LoadReport, path: Path, figures: Any) -> None:
    """A panel per kind of time, written as the file's ending says; figures: what load_matplotlib gave.

    Raises:
        ConfigError: the file cannot be written.
    """
    columns = report.columns()
    figure = figures.Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(f"{len(report.records)} requests, {report.load}: {report.tokens_per_s:.1f} tokens/s, {report.num_failed} failed")
    for axes, (name, label, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        points = cumulative_points(columns.get(name, []))
        axes.step([value * scale for value, _ in points], [share for _, share in points], where="post")
        axes.set(xlabel=label, ylabel="share that is at most this", ylim=(0, 1))
        axes.grid(True, alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error


def cumulative_points(values: list[float]) -> list[tuple[float, float]]:
    """Each value, ascending, with the share of values that are not above it."""
    ordered = sorted(values)
    return [(value, (place + 1) / len(ordered)) for place, value in enumerate(ordered)]
