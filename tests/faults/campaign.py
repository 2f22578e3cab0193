"""The whole fault campaign, as a table: python tests/faults/campaign.py (or `make faults`)

Every case is a real harvest that is disturbed and then compared, byte for byte, with the one that nothing disturbed;
then `granary verify` looks at it, and the commits are counted. Seeded: a case that fails is run again with its seed.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for tests/s3.py, where this is run as a command

import objects
import processes
import yaml
from disks import CannotMount
from processes import Run, check_same, write_spec
from s3 import S3Server, running_server

from jobs.demo.corpus import write_corpus

Disturb = Callable[[Path, int, int], Iterator[None]]


@dataclass(frozen=True)
class Campaign:
    """A kind of fault, and how often it is to happen, over several runs."""

    what: str
    disturb: Disturb
    times: int
    per_run: int


def over_the_cluster(spec: Path, seed: int, times: int) -> Iterator[None]:
    corpus = Path(yaml.safe_load(spec.read_text())["corpus"]["path"])
    return processes.lose_nodes(
        lambda address: write_spec(spec.parent, corpus, cluster={**processes.QUICK, "address": address}), seed, times
    )


CAMPAIGNS = {
    "harvester": Campaign("SIGKILL of a harvester", processes.kill_harvesters, 50, 5),
    "driver": Campaign("SIGKILL of the driver", processes.kill_driver, 20, 4),
    "node": Campaign("a Ray node lost", over_the_cluster, 10, 3),
    "hang": Campaign("SIGSTOP, later SIGCONT", processes.stop_and_continue, 10, 2),
    "disk": Campaign("disk full, later room", processes.fill_disk, 10, 3),
}
RATES, RUNS_PER_RATE = (0.05, 0.2), 5
"""Shares of the requests to an S3 server that fail: as 503, 500, reset, stall, or with their answer swallowed."""
S3_ROWS = 40_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = [*CAMPAIGNS, "s3"]
    parser.add_argument("kinds", nargs="*", default=kinds, help=f"some of {', '.join(kinds)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="part of the number of faults")
    arguments = parser.parse_args()
    lines, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus.parquet")
        if set(arguments.kinds) - {"s3"}:
            Run.start("harvest", write_spec(folder / "undisturbed", folder / "corpus.parquet")).wait()
        for kind in arguments.kinds:
            if kind == "s3":
                with running_server(folder) as server:
                    for rate in RATES:
                        line, failures = run_on_s3(server, folder, rate, max(1, round(RUNS_PER_RATE * arguments.share)))
                        lines.append(line)
                        failed += failures
                continue
            campaign = CAMPAIGNS[kind]
            line, failures = run(
                campaign, folder, kind, arguments.seed, max(1, round(campaign.times * arguments.share))
            )
            lines.append(line)
            failed += failures
    print("\n| fault | times | runs | byte-identical, verified, counted once | seconds |\n|---|---|---|---|---|")
    print("\n".join(lines))
    return 1 if failed else 0


def run(campaign: Campaign, folder: Path, kind: str, seed: int, times: int) -> tuple[str, int]:
    done = runs = sound = 0
    started = time.monotonic()
    while done < times and runs < 5 * times:
        spec = write_spec(folder / f"{kind}-{runs}", folder / "corpus.parquet", cluster=processes.QUICK)
        case = f"{campaign.what}, seed {seed + runs}"
        did = 0
        try:
            for _ in campaign.disturb(spec, seed + runs, min(campaign.per_run, times - done)):
                did += 1
            check_same(spec.parent / "store", folder / "undisturbed" / "store")
            sound += 1
            print(f"{case}: {did} times, sound", flush=True)
        except CannotMount as error:
            return f"| {campaign.what} | 0 | 0 | not tried: {error} | 0 |", 0
        except Exception:  # noqa: BLE001 (the others are to be run too)
            print(f"{case}: FAILED after {did} times\n{traceback.format_exc()}", flush=True)
        done += did
        runs += 1
    seconds = time.monotonic() - started
    return f"| {campaign.what} | {done} | {runs} | {sound} of {runs} | {seconds:.0f} |", runs - sound


def run_on_s3(server: S3Server, folder: Path, rate: float, runs: int) -> tuple[str, int]:
    os.environ.update(server.environment())
    bucket, corpus = server.make_bucket(), folder / "corpus.parquet"
    undisturbed = objects.harvest(folder / f"s3-{rate}", corpus, f"{bucket}/undisturbed", server, rows=S3_ROWS)
    sound = spoiled = requests = 0
    started = time.monotonic()
    for number in range(runs):
        try:
            done = objects.harvest_through_faults(
                folder / f"s3-{rate}-{number}",
                corpus,
                f"{bucket}/{number}",
                server,
                rate=rate,
                seed=number,
                rows=S3_ROWS,
            )
            objects.check_same_objects(done.url, undisturbed)
            sound, spoiled, requests = sound + 1, spoiled + done.spoiled, requests + sum(done.counts.values())
            print(f"S3, {rate:.0%} of requests, seed {number}: {done.counts}, sound", flush=True)
        except Exception:  # noqa: BLE001 (the others are to be run too)
            print(f"S3, {rate:.0%} of requests, seed {number}: FAILED\n{traceback.format_exc()}", flush=True)
    what = f"S3: {rate:.0%} of requests spoiled, {spoiled} of {requests}"
    return f"| {what} | {spoiled} | {runs} | {sound} of {runs} | {time.monotonic() - started:.0f} |", runs - sound


if __name__ == "__main__":
    sys.exit(main())
