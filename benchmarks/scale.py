"""What a unit costs besides its forward pass, in stores of 10^3 to 10^6 units: python -m benchmarks.scale

The forward pass is a stub: an actor that commits its unit and computes nothing. Everything else is real: the plan from
pre-tokenised documents, the supervisor over Ray, create-only durable commits, bitmaps. Units are of 8 rows, so that a
plan of a million of them fits a benchmark; the cost of a unit does not depend on its rows here, planning excepted.

Per size: seconds of planning a unit; processor seconds of the driver for each unit it handed out and heard of (up to
`--units` of them, the last ones of the store); requests and seconds of opening the store and asking which units are
committed, once under way with a bitmap that is a thousand commits old, once complete; the driver's resident memory.
Commits of the other units are written without the flush to the device, which would take hours and is not measured.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import workers.harvest.pool
from benchmarks.harvest import make_model
from pipeline.model.describe import describe_model
from storage.backends.local import LocalFiles
from storage.backends.place import Place
from storage.format.records import encode
from storage.format.units import UnitSet
from storage.harvest.commits import Commit, UnitFigures
from storage.harvest.harvest import Harvest
from storage.harvest.log import log_of
from storage.store import Store, open_store
from workers.cluster.connect import connected
from workers.harvest.actor import HarvesterProcess
from workers.harvest.harvester import HarvesterSetup, UnitResult
from workers.harvest.schedule import UNITS_IN_FLIGHT
from workers.harvest.stage import declare, prepare_harvests
from workers.harvest.supervisor import Supervisor
from workers.machine import machine
from workers.plan.stage import ensure_store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ClusterSettings, HarvestSettings, ModelSettings, WorkerRange

ROWS_PER_UNIT = 8
CONTEXT = 9
"""BOS and a unit's rows."""
ROWS_OF_DOCUMENT = 512


class StubProcess(HarvesterProcess):
    """An actor that loads no model and computes nothing."""

    def load(self, setup: HarvesterSetup) -> str:
        self._store, self._harvest = open_store(setup.store), setup.harvest
        self._phase = "working"
        return f"stub-{os.getpid()}"

    def harvest_unit(self, unit: int) -> UnitResult:
        made = log_of(self._store, self._harvest).commit(commit_of(self._store, self._harvest, unit))
        self._step()
        return UnitResult(unit, ROWS_PER_UNIT, ROWS_PER_UNIT, 0, 0.0, made)


def commit_of(store: Store, harvest: Harvest, unit: int) -> Commit:
    """A commit as a harvester would write it."""
    start, stop = store.info.unit_rows(unit)
    sites = {site: {"crc32c": [unit], "norms_crc32c": [unit]} for site in harvest.sites}
    figures = UnitFigures(9, 0, {}, "stub", time.time(), 0.0, None)
    return Commit(harvest.digest, unit, start, stop, f"stub-{os.getpid()}", sites, "0" * 64, figures, time.time())


@dataclass(frozen=True)
class CountingFiles(LocalFiles):
    """Local files that count what is asked of them, as an object store's bill would."""

    requests: Counter[str] = field(default_factory=Counter)

    def read(self, key: str) -> bytes:
        self.requests["read"] += 1
        return super().read(key)

    def names(self, key: str) -> list[str]:
        self.requests["list"] += 1
        return super().names(key)

    def exists(self, key: str) -> bool:
        self.requests["head"] += 1
        return super().exists(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=6, help="the largest store has 10 to this power units")
    parser.add_argument("--units", type=int, default=10_000, help="most units to hand out in a store")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name, connected("local", cpus=2):
        make_model(Path(name) / "model")
        stub = ray.remote(max_restarts=0, max_concurrency=UNITS_IN_FLIGHT, concurrency_groups={"pulse": 1})
        setattr(workers.harvest.pool, "HarvesterActor", stub(StubProcess))  # noqa: B010
        plan(Path(name), 64)  # loads libraries
        started = time.perf_counter()
        plan(Path(name), 65)  # what a plan costs however small it is
        fixed = time.perf_counter() - started
        for power in range(3, arguments.largest + 1):
            lines.append(measure(Path(name), 10**power, arguments.units, fixed))
            print(json.dumps(lines[-1]), flush=True)
    print(table(lines))
    print(json.dumps({"machine": machine(), "sizes": lines}))


def measure(folder: Path, units: int, most: int, fixed: float) -> dict[str, Any]:
    started = time.perf_counter()
    store, setup = plan(folder, units)
    planning = time.perf_counter() - started - fixed
    left = UnitSet(units, np.arange(units) >= units - most)
    commit_quietly(store, setup.harvest, left.complement())
    under_way = open_and_ask(store)
    supervisor = Supervisor(
        setup, left, store.info.units, workers=WorkerRange(1, 1), gpus_per_worker=0, cluster=ClusterSettings(hang_s=600)
    )
    before, wall = time.process_time(), time.perf_counter()
    heard: list[float] = []
    supervisor.run(lambda result: heard.append(time.perf_counter()), lambda units: None)
    dispatch = time.process_time() - before
    assert len(heard) == len(left), (len(heard), len(left))
    complete = open_and_ask(store)
    assert (under_way.committed, complete.committed) == (units - len(left), units)
    return {
        "units": units,
        "planning_us_per_unit": 1e6 * planning / units,
        "handed_out": len(left),
        "dispatch_cpu_us_per_unit": 1e6 * dispatch / len(left),
        "dispatch_wall_us_per_unit": 1e6 * (heard[-1] - heard[0]) / (len(left) - 1),
        "wall_s": heard[-1] - wall,
        "open_under_way_s": under_way.seconds,
        "open_under_way_requests": under_way.requests,
        "open_s": complete.seconds,
        "open_requests": complete.requests,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def plan(folder: Path, units: int) -> tuple[Store, HarvesterSetup]:
    """A store of whole units, planned from token ids. A document is 64 contexts, and each of these is one unit."""
    path = folder / f"corpus-{units}.parquet"
    documents = -(-units * ROWS_PER_UNIT // ROWS_OF_DOCUMENT)
    tokens = np.random.default_rng(0).integers(3, 2000, documents * ROWS_OF_DOCUMENT, dtype=np.int32)
    offsets = np.arange(documents + 1, dtype=np.int32) * ROWS_OF_DOCUMENT
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    pq.write_table(pa.table({"tokens": column}), path, row_group_size=4096)
    corpus = CorpusSettings(
        path=(str(path),), tokens="tokens", context=CONTEXT, rows=units * ROWS_PER_UNIT, holdout=0.0
    )
    corpus = corpus.model_copy(update={"rows_per_unit": ROWS_PER_UNIT})
    model = ModelSettings(id=str(folder / "model"))
    info = describe_model(model.id)
    store, _ = ensure_store(folder / f"store-{units}", corpus, model, info, lambda done, total: None)
    path.unlink()
    assert store.info.num_units == units
    (job,) = prepare_harvests(store, model, info, HarvestSettings(sites=("resid_post.0",)))
    declare(store, job)
    return store, job.setup


@dataclass(frozen=True)
class Opened:
    seconds: float
    requests: int
    committed: int


def open_and_ask(store: Store) -> Opened:
    """Open the store as a stranger would, and ask which units are committed."""
    counted = CountingFiles(store.root.path)
    begun = time.perf_counter()
    opened = open_store(Place(counted))
    (harvest,) = opened.harvests
    committed = log_of(opened, harvest).committed()
    return Opened(time.perf_counter() - begun, counted.requests.total(), len(committed))


def commit_quietly(store: Store, harvest: Harvest, units: UnitSet) -> None:
    """Commits as harvesters leave them, but for the flush, and their bitmap, which is a thousand commits old."""
    for unit in units:
        path = log_of(store, harvest).commit_place(unit).path
        if unit % 1024 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(commit_of(store, harvest, unit).to_record()))
    known = UnitSet(units.total, units.mask & (np.arange(units.total) < len(units) - 1000))
    log_of(store, harvest).compact(known)


def table(lines: list[dict[str, Any]]) -> str:
    head = (
        "| units | planning, us a unit | dispatch, us of CPU a unit | open under way, s (requests) | open complete | "
        "driver, MiB |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(
        f"| {line['units']:,} | {line['planning_us_per_unit']:.1f} | {line['dispatch_cpu_us_per_unit']:.0f} | "
        f"{line['open_under_way_s']:.3f} ({line['open_under_way_requests']}) | "
        f"{line['open_s']:.3f} ({line['open_requests']}) | {line['driver_peak_mib']:.0f} |"
        for line in lines
    )


if __name__ == "__main__":
    main()
