"""The scheduler in a simulated world, from seeds; and that the simulation notices when a rule is broken.

A failing seed is replayed by `python tests/support/run_simulation.py SEED`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import Mutation
from scheduler_mutations import MUTATIONS

RUN = Path(__file__).parents[2] / "support" / "run_simulation.py"
NUM_QUICK_SEEDS = 200
NUM_SEEDS = 2000
NUM_PARTS = 10  # of the many seeds, each a test of its own: a hang is found before the hour is over
# Longest run of the seeds that one test has, on a machine that does other things as well.
RUN_TIMEOUT_S = 280


def simulate(first: int, last: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), str(first), str(last), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False
    )


def test_every_request_of_every_seed_ends_once_with_its_tokens_and_no_rule_is_broken() -> None:
    run = simulate(0, NUM_QUICK_SEEDS - 1)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_request_of_many_seeds_ends_once_with_its_tokens_and_no_rule_is_broken(part: int) -> None:
    size = NUM_SEEDS // NUM_PARTS
    run = simulate(part * size, (part + 1) * size - 1)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_seed_replays_the_same_world() -> None:
    first, second = simulate(7, 9), simulate(7, 9)
    assert first.returncode == second.returncode == 0
    assert first.stdout.partition(" plans")[0] == second.stdout.partition(" plans")[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_each_mutation_still_fits_the_source(mutation: Mutation) -> None:
    compile(mutation.source(), "mutated", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=lambda number: MUTATIONS[number].rule)
def test_the_simulation_notices_a_broken_rule(number: int) -> None:
    run = simulate(0, NUM_QUICK_SEEDS - 1, "--mutation", str(number))
    assert run.returncode == 1, f"nobody noticed that this is broken: {MUTATIONS[number].rule}"
    assert "fails at turn" in run.stdout or "show too little of" in run.stdout, run.stdout + run.stderr
