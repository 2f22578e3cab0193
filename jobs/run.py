"""Running the stages of a spec: what `granary harvest`, `anchors`, `train`, `evaluate` and `run` do."""

import time

from jobs.preflight import Cluster, bytes_of_rows, check_place, check_room, cluster_for, unit_bytes
from jobs.progress import ProgressLine, duration, extreme_norms, left_out, loss_recovered, no_held_out_rows
from jobs.spec.spec import Spec, SpecError
from jobs.status import found_extreme
from pipeline.model.describe import ModelInfo, adapter_notice, describe_model
from storage.backends.place import open_place
from storage.format.layout import StoreLayout
from storage.format.records import Record
from storage.format.site_refs import SiteRef
from storage.format.units import UnitSet
from storage.read.held_out import values_without_held_out_rows
from storage.store import Store, open_store
from workers.cluster.environment import values_of
from workers.settings.anchors import AnchorSettings

STAGES = ("harvest", "anchors", "train", "evaluate")


def run_stages(spec: Spec, stages: tuple[str, ...], *, grow: bool = False) -> bool:
    """Run the stages in order; return whether there was anything to do. Raises the errors of the stages.

    `grow`: append to the store what it lacks of the spec's rows."""
    missing = [s for s in stages if s in ("anchors", "train") and not getattr(spec, s)]
    if "evaluate" in stages and spec.train is None:
        missing.append("train")
    if stages != STAGES and missing:
        raise SpecError(f"the spec has no section {missing[0]!r}, which this command runs")
    if {"train", "evaluate"} <= set(stages) and spec.train is not None and spec.corpus.holdout == 0:
        raise SpecError(
            "corpus.holdout is 0, which leaves no rows to evaluate on: hold some out, or run the stages one by one"
        )
    values_of(spec.cluster.env)  # before any model is read, as is the place
    check_place(open_place(spec.store))
    if "anchors" in stages:
        _check_anchor_files(spec)

    from workers.harvest.stage import name_in_store

    did = False
    with cluster_for(spec) as cluster:
        cluster.stages = stages
        if "harvest" in stages:
            store, info, did = _harvest(spec, cluster, grow)
        else:
            store, info = _open_harvested(spec)
        store = store.for_model(name_in_store(store, info))
        if "evaluate" in stages and spec.train is not None:
            from workers.evaluate.evaluator import first_held_out_row

            first_held_out_row(store)  # raises now what would otherwise come after hours of training
        cluster.stages = tuple(stage for stage in stages if stage != "harvest")
        if "anchors" in stages:
            for anchors in spec.anchors:
                did |= _anchors(spec, anchors, store, cluster)
        if "train" in stages and spec.train is not None:
            did |= _train(spec, store, cluster)
        cluster.stages = tuple(stage for stage in stages if stage == "evaluate")
        if "evaluate" in stages and spec.train is not None:
            did |= _evaluate(spec, store, info, cluster)
    return did


def say(text: str) -> None:
    print(text, flush=True)


def note(text: str | None) -> None:
    """Say what a person should know before the work, if there is anything."""
    if text is not None:
        say(f"note: {text}")


def _open_harvested(spec: Spec) -> tuple[Store, ModelInfo]:
    """Open the store of a spec whose harvest is done already, and describe its model. Raises StoreMismatch if it is not
    the spec's."""
    from workers.harvest.stage import require_harvested
    from workers.plan.match import check_settings

    store = open_store(spec.store)
    check_settings(store, spec.corpus)
    info = describe_model(spec.model.id, spec.model.revision)
    require_harvested(store, spec.model, info, spec.harvest)
    return store, info


def _harvest(spec: Spec, cluster: Cluster, grow: bool) -> tuple[Store, ModelInfo, bool]:
    """Run what is left of the harvest. Return the store, its model as it was described once, and whether anything was
    done."""
    from workers import stages
    from workers.harvest.harvester import UnitResult
    from workers.harvest.known_models import check_not_replaced
    from workers.harvest.stage import (
        check_compiling,
        check_gpus,
        check_harvest,
        emulation_notice,
        name_in_store,
        prepare_harvests,
    )
    from workers.plan.stage import ensure_store
    from workers.settings.experiment import compile_layers

    info = describe_model(spec.model.id, spec.model.revision)
    # Before the plan, so that a refused spec leaves nothing.
    check_harvest(info, spec.model, spec.harvest, spec.cluster, with_loss=_measures_loss(spec, cluster.stages))
    is_new = not StoreLayout(open_place(spec.store)).root_record.exists()  # in another, all may be harvested already
    if not is_new:
        check_not_replaced(open_store(spec.store), info)  # before rows are appended
    check_compiling(is_new and spec.harvest.compile is True, spec.harvest, spec.cluster)

    def check(num_rows: int) -> None:  # before the plan is written: fewer rows would contradict it
        check_room(open_place(spec.store), bytes_of_rows(spec, info, num_rows))
        compiles = is_new and compile_layers(spec.harvest, info, num_rows, info.num_layers)
        check_compiling(compiles, spec.harvest, spec.cluster)
        note(emulation_notice(info, spec.model, spec.harvest))
        note(adapter_notice(info))
        if any(cluster.gpus_to_come().values()):
            cluster.connect()
        if spec.harvest.gpus_per_worker:
            check_gpus(info, spec.model, spec.harvest)

    with ProgressLine("planning", "rows") as line:
        store, made = ensure_store(spec.store, spec.corpus, spec.model, info, line.update, check, cluster.connect, grow)
    if made:
        before = store.info.grown_from[-1]["num_rows"] if store.info.grown_from else 0
        appended = f"appended {store.num_rows - before:,} rows, now " if before else "planned "
        say(f"{appended}{summary_of_rows(store)} in {store.url}")
        for reason, entry in store.info.skipped.items():
            say(f"  {left_out(reason, entry)}")
        _say_what_is_not_held_out(store, "  ")
    jobs = prepare_harvests(store, spec.model, info, spec.harvest)
    units = sum(len(job.units) for job in jobs)
    if units == 0:
        say(f"harvest: all {store.info.num_units} units of {', '.join(spec.harvest.sites)} are there")
        stages.tidy(store, jobs)
        return store, info, made
    per_unit = store.info.rows_per_unit
    check_compiling(any(job.setup.compile for job in jobs if len(job.units)), spec.harvest, spec.cluster)
    check_room(store.root, sum(len(job.units) * unit_bytes(per_unit, job.harvest.sites) for job in jobs))
    if not made:
        note(emulation_notice(info, spec.model, spec.harvest))
        note(adapter_notice(info))
    cluster.connect()
    if spec.harvest.gpus_per_worker and not made:
        check_gpus(info, spec.model, spec.harvest)
    rows_to_do = sum(store.info.rows_in(job.units) for job in jobs)
    with ProgressLine("harvesting", "rows", rows_to_do) as line:
        rows_done = rows_elsewhere = positions_run = padding = 0

        def on_unit(result: UnitResult) -> None:
            nonlocal rows_done, rows_elsewhere, positions_run, padding
            if result.committed:
                rows_done += result.rows
            else:
                rows_elsewhere += result.rows
            positions_run += result.positions_run
            padding += result.padding
            line.update(rows_done + rows_elsewhere)

        def on_elsewhere(units: UnitSet) -> None:
            nonlocal rows_elsewhere
            rows_elsewhere += store.info.rows_in(units)
            line.update(rows_done + rows_elsewhere)

        line.update(0)
        started = time.monotonic()
        stages.harvest(store, jobs, spec.harvest, spec.cluster, on_unit, on_elsewhere)
        seconds = time.monotonic() - started
    others = f"; others committed {rows_elsewhere:,} rows" if rows_elsewhere else ""
    say(
        f"harvested {rows_done:,} rows of {', '.join(spec.harvest.sites)} in {duration(seconds)} "
        f"({rows_done / seconds:,.0f} rows/s, start of the workers included; "
        f"{100 * padding / max(1, positions_run):.1f} % of the positions run were padding{others})"
    )
    of_model = store.for_model(name_in_store(store, info))
    for found in found_extreme(of_model, spec.harvest.sites):
        say(f"  norms: {extreme_norms(found)}")
    return store, info, True


def _measures_loss(spec: Spec, stages: tuple[str, ...]) -> bool:
    """Whether an evaluation among the stages runs the whole model; those of dictionaries over several models do not."""
    dictionaries = spec.train.dictionaries if "evaluate" in stages and spec.train is not None else ()
    return any(SiteRef.parse(site).model is None for d in dictionaries for site in (*d.input, *d.output))


def _check_anchor_files(spec: Spec) -> None:
    """Raise InputError for files of vectors that cannot be read: before a harvest, which can take hours."""
    files = [file for anchors in spec.anchors for file in anchors.files]
    if files:
        from workers.anchors.vector_files import read_vectors

        for file in files:
            read_vectors(file)


def _anchors(spec: Spec, settings: AnchorSettings, store: Store, cluster: Cluster) -> bool:
    from workers import stages

    result = stages.anchors(store, settings, spec.harvest.sites, cluster.connect)
    found = result.anchors
    what = {
        "by": f"means by {', '.join(settings.by)}",
        "where": "means of conditions",
        "top": f"means of top {'contexts' if settings.top and settings.top.contexts else 'rows'}",
        "vectors": "given vectors",
    }[settings.source]
    say(f"anchors: {len(found.values)} {what} {'made' if result.made else 'are there'} ({found.name})")
    return result.made


def _train(spec: Spec, store: Store, cluster: Cluster) -> bool:
    from workers import stages
    from workers.train.plan import emulated_products, plan_training, unfinished
    from workers.train.trainer import Progress

    assert spec.train is not None
    plan = plan_training(store, spec.train)
    names = [d.name for d in plan.dictionaries]
    if not unfinished(store, plan).dictionaries:
        say(f"train: {', '.join(names)} {'is' if len(names) == 1 else 'are'} trained")
        return False
    note(emulated_products(spec.train))
    cluster.connect()
    with ProgressLine("training", "steps", plan.steps) as line:

        def show(progress: Progress) -> None:
            notes = [f"{name} FVU {m.fvu:.3f}" for name, m in progress.latest.items()]
            line.update(progress.step, note="  ".join(notes))

        trained = stages.train(store, spec.train, spec.cluster, show)
    for name in trained:
        point = _last_point(store, name)
        say(f"trained {name}: {plan.steps:,} steps, last FVU {point['fvu']:.3f} at L0 {point['l0']:.1f}")
    return True


def _last_point(store: Store, name: str) -> Record:
    from storage.results.runs import open_run

    return open_run(store, name).curve()[-1]


def _evaluate(spec: Spec, store: Store, info: ModelInfo, cluster: Cluster) -> bool:
    from workers import stages
    from workers.evaluate.evaluator import first_held_out_row
    from workers.harvest.stage import emulation_notice

    assert spec.train is not None
    first_held_out_row(store)  # raises, before anything starts, when there is none
    plans = stages.plan_evaluations(
        store, spec.model, spec.harvest, spec.train, spec.scored_anchors, spec.evaluate, info
    )
    if not plans:
        say("evaluate: every dictionary is evaluated")
        return False
    _say_what_is_not_held_out(store)
    note(emulation_notice(plans[0].model, spec.model, spec.harvest))
    cluster.connect()
    for plan in plans:
        record = stages.evaluate(plan)
        fvu = f"FVU {record['fvu']:.3f}"
        if len(record["site_fvu"]) > 1:
            fvu += f" ({', '.join(f'{site} {found:.3f}' for site, found in record['site_fvu'].items())})"
        say(
            f"evaluated {plan.run} on {record['rows']:,} held-out rows: {fvu}, L0 {record['l0']:.1f}, "
            f"{100 * record['dead_share']:.1f} % dead, {loss_recovered(record['loss'])}"
        )
    return True


def _say_what_is_not_held_out(store: Store, lead: str = "") -> None:
    """Say which values of labels an evaluation will tell nothing of, if there are any."""
    if lacking := values_without_held_out_rows(store):
        say(
            f"{lead}{no_held_out_rows(lacking)}: nothing is measured of them; hold out more (corpus.holdout), or name "
            "a file that has them last in corpus.path"
        )


def summary_of_rows(store: Store) -> str:
    info = store.info
    return (
        f"{info.num_rows:,} rows of {info.num_documents:,} documents ({info.num_contexts:,} contexts, "
        f"{info.num_units} units)"
    )
