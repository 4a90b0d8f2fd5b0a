"""Run seeds of the scheduler's simulation: `python tests/support/run_simulation.py 17` replays seed 17.

    run_simulation.py FIRST [LAST] [--turns N] [--mutation NUMBER]

Exit code 0 when all went well, 1 when a seed failed (its number, the error, and the command that replays it are printed).
At the end, what must have happened somewhere in many seeds is looked for: a simulation that never preempts proves nothing.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From so many seeds on, each of these has happened at least so often.
SEEDS_FOR_COVERAGE = 200
EXPECTED = {
    "hits": 1000,
    "hits behind decoded tokens": 150,
    "passed over": 500,
    "choices by prefix": 500,
    "choices by blocks": 500,
    "plans ahead": 10_000,
    "copies on write": 500,
    "forks": 500,
    "plans that wait for copies": 100,
    "held rows": 100,
    "a long prompt beside short ones": 100,
    "preemptions ahead": 200,
    "preemptions by swap": 500,
    "preemptions by recompute": 500,
    "several sequences preempted by swap": 20,
    "several sequences preempted by recompute": 20,
    "beams preempted by swap": 10,
    "beams preempted by recompute": 10,
    "swaps in": 500,
    "swap was cheaper": 20,
    "recompute was cheaper": 20,
    "groups lost": 50,
    "finished": 10_000,
    "cancelled": 500,
    "expired": 50,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--seen", action="store_true", help="print how often what was seen")
    parser.add_argument("--mutation", type=int, help="number of the one of scheduler_mutations.py to break the scheduler with")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]
    if args.mutation is not None:
        from mutation import MutatedImport
        from scheduler_mutations import MUTATIONS

        sys.meta_path.insert(0, MutatedImport(MUTATIONS[args.mutation]))
    from scheduler_simulation import Simulation

    started_s, num_turns, num_plans = time.process_time(), 0, 0
    seen: Counter[str] = Counter()
    longest_wait = 0
    last = args.first if args.last is None else args.last
    for seed in range(args.first, last + 1):
        simulation = Simulation(seed)
        try:
            simulation.run(args.turns)
        except Exception:
            traceback.print_exc()
            print(
                f"seed {seed} fails at turn {simulation.turn}; replay it with:\n  {sys.executable} tests/support/run_simulation.py {seed}"
            )
            return 1
        seen.update(simulation.seen)
        longest_wait = max(longest_wait, simulation.scheduler.longest_wait)
        num_turns += simulation.turn
        num_plans += simulation.num_plans
    spent_s = time.process_time() - started_s
    if args.seen:
        print(dict(seen))
    print(f"{last - args.first + 1} seeds, {num_turns} turns, {num_plans} plans in {spent_s:.1f} s; longest wait {longest_wait} plans")
    if last - args.first + 1 >= SEEDS_FOR_COVERAGE:
        missing = {name: seen[name] for name, least in EXPECTED.items() if seen[name] < least}
        if missing:
            print(f"the seeds show too little of: {missing}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
