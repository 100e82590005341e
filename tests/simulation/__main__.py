"""``python -m tests.simulation --seeds 10000 --start 0``: explore, and print what fails."""

from __future__ import annotations

import argparse
import time

from tests.simulation.explore import explore, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--start", type=int, default=0, help="the first (0)")
    parser.add_argument("--stop-after", type=int, default=5, help="failures before giving up (5)")
    parser.add_argument("--whole", action="store_true", help="do not look for a smaller plan")
    options = parser.parse_args()
    begin, steps, runs, failed = time.perf_counter(), 0, 0, 0
    for seed in range(options.start, options.start + options.seeds):
        outcome = explore(seed)
        runs, steps = runs + 1, steps + outcome.steps
        if outcome.violations:
            failed += 1
            print(outcome if options.whole else shrink(outcome), end="\n\n", flush=True)
            if failed >= options.stop_after:
                break
    seconds = time.perf_counter() - begin
    print(
        f"{runs} schedules, {failed} failed; {runs / seconds:.0f} schedules/s, "
        f"{steps / seconds:.0f} callbacks/s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
