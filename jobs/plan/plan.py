"""`granary plan`: what a spec would store, what that takes and costs, before anything is written."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from jobs.plan.economics import (
    Work,
    bill,
    harvest_requests,
    num_objects,
    stored_bytes,
    training_pass,
    unit_rows,
)
from jobs.plan.price_tables import Prices, load_prices, storage_costs
from jobs.preflight import bytes_of_rows, check_place, check_room, cluster_for, unit_bytes
from jobs.progress import ProgressLine
from jobs.spec.spec import Spec
from jobs.token_rows import token_rows
from pipeline.corpus.documents import Documents, Sizes
from pipeline.corpus.formats.open import Corpus
from pipeline.errors import InputError
from pipeline.model.describe import ModelInfo, adapter_notice, describe_model
from pipeline.sites import layers_up_to
from storage.backends.objects import PART_BYTES
from storage.backends.place import open_place
from storage.errors import StorageError
from storage.format.arrays import RowArray
from storage.format.layout import UNITS_PER_BLOCK, StoreLayout
from storage.format.records import Record
from storage.format.site_refs import SiteRef
from storage.format.units import UnitRanges
from storage.harvest.harvest import Harvest, SiteLayout
from storage.harvest.history import read_history
from storage.harvest.identity import HarvestIdentity
from storage.make.create import refuse_if_taken
from storage.store import Store, open_store
from workers.cluster.environment import values_of
from workers.harvest.measure import Measured, measure, sample
from workers.harvest.stage import HarvestJob, check_harvest, emulation_notice, name_in_store, prepare_harvests
from workers.plan.match import growth_of
from workers.plan.source import Source, open_source
from workers.plan.stage import held_out_start, plan_rows
from workers.settings.experiment import compile_layers


@dataclass(frozen=True)
class PlanOptions:
    """What a person gives besides the spec."""

    measure_s: float | None = None
    """Seconds to run the model for its rate; None does not load it."""
    rows_per_second: float | None = None
    """The rate of a worker, where it is known."""
    prices: str | None = None
    """A price table; the one that comes with Granary, if not given."""

    def __post_init__(self) -> None:
        for name, value in (("--measure", self.measure_s), ("--rows-per-second", self.rows_per_second)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} takes a number above 0, not {value:g}")


def plan_record(spec: Spec, options: PlanOptions | None = None) -> Record:
    """Tokenise the corpus, unless a store has it already, count and reckon; leave nothing written. Raises the errors
    that harvesting would, as far as they show without workers."""
    options = options or PlanOptions()
    prices = load_prices(options.prices)  # before anything that takes long
    values_of(spec.cluster.env)
    check_place(open_place(spec.store))
    info = describe_model(spec.model.id, spec.model.revision)
    check_harvest(info, spec.model, spec.harvest, spec.cluster)
    info.check_context(spec.corpus.context)
    source = open_source(spec.corpus, spec.model, info.vocabulary, info.revision)
    store, jobs, is_whole, source = _existing(spec, info, source)
    measured = None
    if store is not None and is_whole and options.measure_s is None:
        at = store.info
        rows = Sizes(at.num_documents, at.num_contexts, at.num_context_tokens, at.num_rows)
        left_out = at.skipped
    else:
        with ProgressLine("planning", "rows") as line, cluster_for(spec) as cluster:
            tasks = source.tasks(cluster.connect)
            table = plan_rows(source, line.update, tasks, is_new=store is None)
            if options.measure_s is not None:
                (documents,) = tasks.get([table.buckets[0].documents])
                measured = _measured(spec, info, documents, table.sizes.rows, options.measure_s)
        rows, left_out = table.sizes, table.skipped.to_record()
    per_unit = spec.corpus.unit_size(rows.rows) if store is None else store.info.rows_per_unit
    _check_room(spec, info, store, jobs, rows.rows)
    arrays = _arrays(spec, info, rows.rows, per_unit)
    read, unknown = _read_in_training(spec, info, store, arrays, rows.rows)
    left = _left(store, jobs, UnitRanges(rows.rows, per_unit))
    rate, rate_from = _rate(options, measured, store, jobs)
    work = Work(
        rows=left.rows,
        training_rows=held_out_start(rows.rows, per_unit, spec.corpus.holdout),
        rows_per_second=rate,
        workers=spec.harvest.worker_range.maximum,
        gpus_per_worker=spec.harvest.gpus_per_worker,
        threads_per_worker=spec.harvest.threads_per_worker,
    )
    return {
        "store": str(open_place(spec.store)),
        "exists": store is not None,
        "rows_to_append": 0 if store is None else rows.rows - store.num_rows,
        "units_done": left.units_done,
        "units_left": left.units,
        "rows_left": left.rows,
        "model": info.id,
        "layers_run": layers_up_to(spec.harvest.parsed_sites()),
        "layers_of_model": info.num_layers,
        "files": [file.name for corpus in source.corpora if isinstance(corpus, Corpus) for file in corpus.files],
        "documents": rows.documents,
        "left_out": left_out,
        "contexts": rows.contexts,
        "rows": rows.rows,
        "token_rows": token_rows(source.settings_identity, source.token_string),
        "units": -(-rows.rows // per_unit),
        "d_model": info.d_model,
        "sites": _sites_record(spec, arrays, measured),
        "sites_to_harvest_first": unknown,
        **_economics(spec, arrays, read, work, rate_from, prices, -(-rows.rows // per_unit)),
        "prices_from": "the table that comes with Granary" if options.prices is None else options.prices,
        "measured_rows": None if measured is None else measured.rows,
        "reference": storage_costs().measured,
        "notice": "; ".join(filter(None, (emulation_notice(info, spec.model, spec.harvest), adapter_notice(info))))
        or None,
    }


def _existing(spec: Spec, info: ModelInfo, source: Source) -> tuple[Store | None, list[HarvestJob], bool, Source]:
    """The spec's store, if it is there; what is left to do in it as it is; whether it has all rows of the spec; the
    source on the store's day. Raises what contradicts it; a store that has the beginning of the spec's rows does not.
    """
    place = open_place(spec.store)
    if not StoreLayout(place).root_record.exists():
        refuse_if_taken(place)
        return None, [], False, source
    store = open_store(place)
    source = source.as_in(store)
    is_whole = growth_of(store, source.identity_beside(store.info.plan)) is None
    return store, prepare_harvests(store, spec.model, info, spec.harvest), is_whole, source


@dataclass(frozen=True)
class Left:
    """What of a spec is left to run once the store has all its rows."""

    units_done: int
    """Units that have all sites of the spec, and stay so."""
    units: int
    """Units to run; one that several harvests lack counts for each, as it is run for each."""
    rows: int
    """The rows of those units."""


def _left(store: Store | None, jobs: list[HarvestJob], ranges: UnitRanges) -> Left:
    if store is None:
        return Left(0, ranges.total, ranges.num_rows)
    done = np.ones(store.info.num_units, bool)
    units = rows = 0
    for job in jobs:
        kept = job.units.complement()
        if job.log.units != ranges and job.log.units.short is not None:
            kept.mask[job.log.units.short] = False  # it will be longer
        done &= kept.mask.astype(bool)
        units += ranges.total - len(kept)
        rows += ranges.num_rows - store.info.rows_in(kept)
    return Left(int(done.sum()), units, rows)


def _check_room(spec: Spec, info: ModelInfo, store: Store | None, jobs: list[HarvestJob], rows: int) -> None:
    """Raise StorageError if the disk has no room for what is to be run."""
    new = rows if store is None else rows - store.num_rows
    of_jobs = sum(len(job.units) * unit_bytes(job.log.units.rows_per_unit, job.harvest.sites) for job in jobs)
    check_room(open_place(spec.store), of_jobs + (bytes_of_rows(spec, info, new) if new > 0 else 0))


def _measured(spec: Spec, info: ModelInfo, documents: Documents, rows: int, seconds: float) -> Measured:
    return measure(
        info,
        spec.model,
        spec.harvest,
        sample(documents),
        spec.corpus.context,
        compile_layers=compile_layers(spec.harvest, info, rows, info.num_layers),
        seconds=seconds,
    )


def _rate(
    options: PlanOptions, measured: Measured | None, store: Store | None, jobs: list[HarvestJob]
) -> tuple[float | None, str]:
    """Rows per second of a worker, and where that is from."""
    if options.rows_per_second is not None:
        return options.rows_per_second, "given"
    if measured is not None:
        return measured.rows_per_second, f"measured here on {measured.rows:,} rows"
    if store is not None:
        for job in jobs:
            rate = read_history(job.log, job.log.committed()).rows_per_second_per_worker
            if rate is not None:
                rough = ", of under a second each: a rough guess" if store.info.rows_per_unit < rate else ""
                return rate, f"of the units in the store{rough}"
    return None, "unknown"


def _arrays(spec: Spec, info: ModelInfo, rows: int, per_unit: int) -> dict[str, list[RowArray]]:
    """The arrays of each site as the harvest would make them."""
    layouts = {
        site: SiteLayout.of(info.d_model, stored, per_unit) for site, stored in spec.harvest.stored_types().items()
    }
    harvest = Harvest.of(HarvestIdentity.made_up(per_unit), info.name, layouts, {})
    place = open_place(spec.store)
    return {site: list(harvest.arrays(place, rows, site).values()) for site in layouts}


def _sites_record(spec: Spec, arrays: dict[str, list[RowArray]], measured: Measured | None) -> Record:
    """Site -> its type and bytes, and what the types cost in precision."""
    reference = storage_costs().types
    return {
        site: {
            "dtype": stored,
            "bytes": sum(stored_bytes(array) for array in arrays[site]),
            "objects": sum(num_objects(array) for array in arrays[site]),
            "relative_error": None if measured is None else measured.relative_errors[site],
            "reference_relative_error": reference[stored].relative_error,
            "reference_fvu_change": reference[stored].fvu_change,
        }
        for site, stored in spec.harvest.stored_types().items()
    }


def _read_in_training(
    spec: Spec, info: ModelInfo, store: Store | None, arrays: dict[str, list[RowArray]], num_rows: int
) -> tuple[list[RowArray], list[str]]:
    """Return the arrays that one pass of training reads, and the sites among them that nobody has harvested yet.

    A dictionary over two models names its sites `<model>/<site>`. Those of the spec's own model are the spec's; another
    model's are taken from the store. Where the store lacks them they count as if they were stored as the spec's are.
    """
    sites = (
        dict.fromkeys(site for d in spec.train.dictionaries for site in (*d.input, *d.outputs)) if spec.train else {}
    )
    own = info.name if store is None else name_in_store(store, info)
    read: list[RowArray] = []
    unknown: list[str] = []
    for site in sites or arrays:
        ref = SiteRef.parse(site)
        is_own = ref.model in (None, own) and ref.site in arrays
        of_site = arrays[ref.site] if is_own else _stored_arrays(store, site, num_rows)
        if of_site is None:
            unknown.append(site)
            of_site = next(iter(arrays.values()))
        read += [of_site[0], *of_site[2:]]  # the second are the norms, which training does not read
    return read, unknown


def _stored_arrays(store: Store | None, site: str, num_rows: int) -> list[RowArray] | None:
    """Return the arrays that the store has of a site, as long as `num_rows`; None where it has none."""
    if store is None:
        return None
    try:
        harvest, name = store.find(site)
    except StorageError:
        return None
    return list(harvest.arrays(store.root, num_rows, name).values())


def _economics(
    spec: Spec,
    arrays: dict[str, list[RowArray]],
    read: list[RowArray],
    work: Work,
    rate_from: str,
    prices: Prices,
    units: int,
) -> Record:
    """Return bytes, objects, requests, hours, money and break-even. `read`: the arrays that training reads."""
    every = [array for of_site in arrays.values() for array in of_site]
    is_local = open_place(spec.store).backend.is_local
    passes = _passes(spec, work.training_rows)
    requests = harvest_requests(every, units, PART_BYTES, UNITS_PER_BLOCK)
    reading = training_pass(read, work.training_rows, unit_rows(every))
    num_bytes = sum(map(stored_bytes, every))
    costs = bill(work, num_bytes, requests, reading, prices, on_object_store=not is_local)
    hours = work.worker_hours(work.rows)
    months = costs.break_even_months(passes)
    return {
        "bytes": num_bytes,
        "objects": sum(map(num_objects, every)) + 2 * units,
        "is_local": is_local,
        "requests": asdict(requests),
        "requests_per_pass": asdict(reading.requests),
        "rows_per_second_per_worker": work.rows_per_second,
        "rate_from": rate_from,
        "worker_hours": hours,
        "workers": work.workers,
        "hours": None if hours is None or work.workers is None else hours / work.workers,
        "passes": passes,
        "cost": asdict(costs),
        "break_even_passes": costs.break_even_passes(months=1),
        "break_even_months": None if months is not None and math.isinf(months) else months,
        "prices": prices.model_dump(),
    }


def _passes(spec: Spec, training_rows: int) -> float:
    """Return how often training goes through the rows; once without such a section."""
    return 1.0 if spec.train is None else (spec.train.rows or training_rows) / training_rows
