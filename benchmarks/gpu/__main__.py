"""Measure this machine's GPU within a time limit: python -m benchmarks.gpu (see benchmarks/gpu.sh)"""

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu.plan import Measurement, full_plan, small_plan
from benchmarks.gpu.results import TESTS, Results
from benchmarks.gpu.suite import run_tests
from benchmarks.gpu.worker import Outcome, Worker

SECONDS = 450.0
"""The whole run must fit into the few minutes for which a card is lent, its start and end included."""
TESTS_S = 110.0
"""Most of them for tests/gpu."""
ROUND_S = 0.35
"""Seconds of each subject and limit in a round, at least: with three rounds about a second altogether."""
SMALL_ROUND_S = 0.01
"""Where figures mean nothing."""
NO_TIME = "no time left"


def main() -> int:
    """Run the whole list. Returns 1 if something failed, else 0: what could not be run here is no failure."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check all of it on a CPU")
    parser.add_argument("--out", type=Path, help="folder for the results; if not given $OUT, or gpu-results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="end by then (%(default).0f)")
    parser.add_argument("--no-tests", action="store_true", help="leave out tests/gpu")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    folder = arguments.out or Path(os.environ.get("OUT") or "gpu-results")
    folder.mkdir(parents=True, exist_ok=True)
    plan = small_plan() if arguments.small else full_plan()
    worker = Worker(1, SMALL_ROUND_S) if arguments.small else Worker(os.cpu_count() or 1, ROUND_S)
    results = Results(folder, {"date": datetime.now(UTC).isoformat(timespec="seconds"), "small": arguments.small})
    try:
        run(plan, worker, results, ends, tests=not arguments.no_tests)
    finally:
        worker.close()
        results.about["took_s"] = round(arguments.seconds - (ends - time.monotonic()), 1)
        results.write()
    print(f"\n{results.tables()}\nwritten to {folder / 'gpu.json'} and {folder / 'gpu.md'}")
    return int(any(outcome.status == "failed" for _, outcome in results.outcomes.values()))


def run(plan: list[Measurement], worker: Worker, results: Results, ends: float, tests: bool) -> None:
    """Measure what there is time for, and account for the rest."""
    if tests:
        outcome = run_tests(results.folder / "tests.txt", min(TESTS_S, ends - time.monotonic()))
        results.add(TESTS, None, outcome)
        say(TESTS, outcome)
    left = ends - time.monotonic()
    failed = worker.start(left) if left > 0 else None
    results.about["machine"] = worker.machine
    for measurement in plan:
        left = ends - time.monotonic()
        if left < measurement.least_s:
            outcome = Outcome("not run", {}, NO_TIME)
        elif failed is not None:  # not even the process could be started
            outcome = failed
        else:
            outcome = worker.measure(measurement.case, min(left, measurement.most_s))
            if outcome.status == "failed" and not outcome.details and time.monotonic() >= ends:
                outcome = Outcome("not run", {}, f"{NO_TIME} (stopped after {left:.0f} s)")
        results.add(measurement.case.name, measurement.case, outcome)
        say(measurement.case.name, outcome)


def say(name: str, outcome: Outcome) -> None:
    """Show progress as it comes."""
    took = f" ({outcome.figures['took_s']:.1f} s)" if "took_s" in outcome.figures else ""
    print(f"{name}: {outcome.status}{': ' if outcome.reason else ''}{outcome.reason}{took}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
