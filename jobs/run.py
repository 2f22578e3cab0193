"""Running the stages of a spec: what `granary harvest`, `anchors`, `train`, `evaluate` and `run` do."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.progress import ProgressLine, counted, duration, size
from jobs.spec import Spec, SpecError
from pipeline.models import describe_model
from storage.errors import StorageError
from storage.records import Record
from storage.store import Store, local_path, open_store

STAGES = ("harvest", "anchors", "train", "evaluate")


@dataclass
class Cluster:
    """Ray, connected when a stage first needs it: a run that finds everything done starts nothing."""

    spec: Spec
    stack: ExitStack

    def connect(self) -> None:
        from workers.cluster import connected

        harvest, train = self.spec.harvest, self.spec.train
        workers = harvest.workers if isinstance(harvest.workers, int) else 1
        cpus = max(workers * harvest.threads_per_worker, train.threads if train else 1)
        self.stack.enter_context(connected(self.spec.cluster.address, cpus=cpus))


@contextmanager
def cluster_for(spec: Spec) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(spec, stack)


def run_stages(spec: Spec, stages: tuple[str, ...]) -> bool:
    """Run the stages in order; return whether there was anything to do. Raises the errors of the stages."""
    missing = [s for s in stages if s in ("anchors", "train") and getattr(spec, s) is None]
    if "evaluate" in stages and spec.train is None:
        missing.append("train")
    if stages != STAGES and missing:
        raise SpecError(f"the spec has no section {missing[0]!r}, which this command runs")
    if {"train", "evaluate"} <= set(stages) and spec.train is not None and spec.corpus.holdout == 0:
        raise SpecError(
            "corpus.holdout is 0, which leaves no rows to evaluate on: hold some out, or run the stages one by one"
        )
    from workers.harvesting import name_in_store

    did = False
    with cluster_for(spec) as cluster:
        if "harvest" in stages:
            store, did = _harvest(spec, cluster)
        else:
            store = _open_harvested(spec)
        store = store.for_model(name_in_store(store, describe_model(spec.model.id, spec.model.revision)))
        if "evaluate" in stages and spec.train is not None:
            from workers.evaluator import first_held_out_row

            first_held_out_row(store)  # raises now what would otherwise come after hours of training
        if "anchors" in stages and spec.anchors is not None:
            did |= _anchors(spec, store)
        if "train" in stages and spec.train is not None:
            did |= _train(spec, store, cluster)
        if "evaluate" in stages and spec.train is not None:
            did |= _evaluate(spec, store, cluster)
    return did


def say(text: str) -> None:
    print(text, flush=True)


def _open_harvested(spec: Spec) -> Store:
    """Open the store of a spec whose harvest is done already. Raises StoreMismatch if it is not the spec's."""
    from workers.harvesting import require_harvested
    from workers.planning import check_settings

    store = open_store(spec.store)
    check_settings(store, spec.corpus)
    require_harvested(store, spec.model, describe_model(spec.model.id, spec.model.revision), spec.harvest)
    return store


def _harvest(spec: Spec, cluster: Cluster) -> tuple[Store, bool]:
    from workers import stages
    from workers.harvester import UnitResult
    from workers.harvesting import prepare_harvests
    from workers.planning import ensure_store

    info = describe_model(spec.model.id, spec.model.revision)
    info.check_sites(spec.harvest.parsed_sites())  # before the plan, so that a refused spec leaves nothing
    layout = {"d": info.d_model, "dtype": spec.harvest.dtype}

    def check(num_rows: int) -> None:  # before the plan is written: fewer rows would contradict it
        per_unit = spec.corpus.unit_size(num_rows)
        units = -(-num_rows // per_unit)
        sites = dict.fromkeys(spec.harvest.sites, layout)
        _check_room(local_path(spec.store), units * unit_bytes(per_unit, sites))

    with ProgressLine("planning", "rows") as line:
        store, made = ensure_store(local_path(spec.store), spec.corpus, spec.model, line.update, check)
    if made:
        say(f"planned {summary_of_rows(store)} in {store.path}")
        for reason, entry in store.info.skipped.items():
            say(f"  {counted(entry['count'], 'document')} left out: {reason} (first: {', '.join(entry['first'])})")
    jobs = prepare_harvests(store, spec.model, info, spec.harvest)
    units = sum(len(job.units) for job in jobs)
    if units == 0:
        say(f"harvest: all {store.info.num_units} units of {', '.join(spec.harvest.sites)} are there")
        return store, made
    per_unit = store.info.rows_per_unit
    _check_room(store.path, sum(len(job.units) * unit_bytes(per_unit, job.harvest.sites) for job in jobs))
    cluster.connect()
    rows_to_do = sum(b - a for job in jobs for a, b in map(store.info.unit_rows, job.units))
    with ProgressLine("harvesting", "rows", rows_to_do) as line:
        rows_done = 0

        def on_unit(result: UnitResult) -> None:
            nonlocal rows_done
            rows_done += result.rows
            line.update(rows_done)

        line.update(0)
        started = time.monotonic()
        stages.harvest(store, jobs, spec.harvest, on_unit)
        seconds = time.monotonic() - started
    say(
        f"harvested {rows_to_do:,} rows of {', '.join(spec.harvest.sites)} in {duration(seconds)} "
        f"({rows_to_do / seconds:,.0f} rows/s, start of the workers included)"
    )
    return store, True


def _anchors(spec: Spec, store: Store) -> bool:
    from workers import stages

    assert spec.anchors is not None
    result = stages.anchors(store, spec.anchors, spec.harvest.sites)
    found = result.anchors
    by = ", ".join(spec.anchors.by)
    say(f"anchors: {len(found.values)} means by {by} {'made' if result.made else 'are there'} ({found.name})")
    return result.made


def _train(spec: Spec, store: Store, cluster: Cluster) -> bool:
    from workers import stages
    from workers.trainer import Progress, plan_training, unfinished

    assert spec.train is not None
    plan = plan_training(store, spec.train)
    names = [d.name for d in plan.dictionaries]
    if not unfinished(store, plan).dictionaries:
        say(f"train: {', '.join(names)} {'is' if len(names) == 1 else 'are'} trained")
        return False
    cluster.connect()
    with ProgressLine("training", "steps", plan.steps) as line:

        def show(progress: Progress) -> None:
            notes = [f"{name} FVU {m.fvu:.3f}" for name, m in progress.latest.items()]
            line.update(progress.step, note="  ".join(notes))

        trained = stages.train(store, spec.train, show)
    for name in trained:
        point = _last_point(store, name)
        say(f"trained {name}: {plan.steps:,} steps, last FVU {point['fvu']:.3f} at L0 {point['l0']:.1f}")
    return True


def _last_point(store: Store, name: str) -> Record:
    from storage.runs import open_run

    return open_run(store, name).curve()[-1]


def _evaluate(spec: Spec, store: Store, cluster: Cluster) -> bool:
    from workers import stages
    from workers.evaluator import first_held_out_row

    assert spec.train is not None
    first_held_out_row(store)  # raises, before anything starts, when there is none
    plans = stages.plan_evaluations(store, spec.model, spec.harvest, spec.train, spec.anchors, spec.evaluate)
    if not plans:
        say("evaluate: every dictionary is evaluated")
        return False
    cluster.connect()
    for plan in plans:
        record = stages.evaluate(plan)
        loss = record["loss"]
        say(
            f"evaluated {plan.run} on {record['rows']:,} held-out rows: FVU {record['fvu']:.3f}, L0 {record['l0']:.1f},"
            f" {100 * record['dead_share']:.1f} % dead, {100 * loss['recovered_against_zero']:.1f} % of the loss "
            f"recovered ({100 * loss['recovered_against_mean']:.1f} % against the mean)"
        )
    return True


def summary_of_rows(store: Store) -> str:
    info = store.info
    return (
        f"{info.num_rows:,} rows of {info.num_documents:,} documents ({info.num_contexts:,} contexts, "
        f"{info.num_units} units)"
    )


def unit_bytes(rows: int, sites: dict[str, Record]) -> int:
    """Bytes of one whole unit of so many rows: activations and norms."""
    widths = {"bfloat16": 2, "float16": 2, "float32": 4}
    return sum(rows * (layout["d"] * widths[layout["dtype"]] + 4) for layout in sites.values())


def _check_room(path: Path, needed: int) -> None:
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"the disk of {path} is too full: the harvest needs {size(needed)} and {size(free)} are free; "
            "make room, ask for fewer rows or sites, or put the store elsewhere"
        )
