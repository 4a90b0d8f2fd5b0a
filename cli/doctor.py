"""`quire doctor`: whether this machine can serve with these settings, line by line, and what to do where it cannot."""

import argparse
from collections.abc import Callable, Iterator
from typing import Final

from quire.cli import doctor_checks as checks
from quire.cli import doctor_gpu_checks as gpu_checks
from quire.cli.doctor_finding import Finding, Verdict
from quire.cli.exit_codes import EXIT_FAILED
from quire.cli.setting_flags import add_setting_arguments, read_settings
from quire.common.config import ModelPlan, ServeConfig, plan_model
from quire.common.errors import QuireError

_MARKS: Final = {Verdict.GOOD: "good", Verdict.NOTE: "note", Verdict.BAD: "BAD "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check this machine for `quire serve` with the same settings: starts nothing, changes nothing. Exit code 1 if something is bad."
    )
    add_setting_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = read_settings(args)
    num_bad = 0
    for finding in _findings(config):
        print(f"{_MARKS[finding.verdict]}  {finding.what}", flush=True)
        if finding.advice:
            print(f"      -> {finding.advice}", flush=True)
        num_bad += finding.verdict is Verdict.BAD
    print(f"\n{num_bad} of these must be mended before `quire serve` can work here" if num_bad else "\n`quire serve` can work here")
    return EXIT_FAILED if num_bad else 0


def _findings(config: ServeConfig) -> Iterator[Finding]:
    """In the order in which one thing needs another."""
    for check in (checks.python, checks.packages, checks.ray):
        yield from check()
    yield from checks.temporary_folder()
    yield from checks.shared_memory()
    yield from checks.open_files()
    yield from checks.clock()
    yield from checks.ports(config)
    plan: ModelPlan | None = None
    try:
        plan = plan_model(config.models[0])
    except QuireError as error:
        yield Finding(Verdict.BAD, f"the model and its settings: {error.message}", "correct what it names; the rest needs the model")
    if plan is None:
        yield from gpu_checks.gpus(None)
        return
    needs: tuple[Callable[[ModelPlan], Iterator[Finding]], ...] = (checks.model, gpu_checks.gpus, checks.memory, gpu_checks.memory)
    for check_plan in needs:
        yield from check_plan(plan)
