"""The harvest stage: from a planned store and a spec's sites to committed units."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.models import ModelInfo
from storage.arrays import DTYPES
from storage.errors import StorageError
from storage.harvests import (
    Harvest,
    chunk_rows_for,
    committed_units,
    declare_harvest,
    match_harvests,
)
from storage.records import Record
from storage.store import Store
from workers.cluster import require_gpus, room_for
from workers.harvester import HarvesterSetup, UnitResult
from workers.settings import HarvestSettings, ModelSettings, compile_layers
from workers.supervisor import Supervisor
from workers.versions import versions


@dataclass(frozen=True)
class HarvestJob:
    """One harvest and the units of it that are not committed."""

    harvest: Harvest
    setup: HarvesterSetup
    units: list[int]


def prepare_harvests(
    store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings
) -> list[HarvestJob]:
    """Find what is left to do for the sites of a spec. Writes nothing; see `declare`.

    Sites that the store has already, or is getting, belong to their own harvest; the others become a new one. Raises
    InputError for a site the model lacks and StoreMismatch when a site is stored under other settings.
    """
    sites = settings.parsed_sites()
    info.check_sites(sites)
    identity = _identity(store, model, info, settings)
    name = name_in_store(store, info)
    matching, missing = match_harvests(store.path, identity, name, list(settings.sites))
    if missing:
        layout = {
            "d": info.d_model,
            "dtype": settings.dtype,
            "chunk_rows": chunk_rows_for(store.info.rows_per_unit, info.d_model, DTYPES[settings.dtype].itemsize),
        }
        layouts = {site: dict(layout) for site in missing}
        made_with = {"model": info.id, **versions()}
        matching.append(Harvest.of({**identity, "sites": sorted(missing)}, name, layouts, made_with))
    return [_job(store, model, info, settings, harvest, identity) for harvest in matching]


def name_in_store(store: Store, info: ModelInfo) -> str:
    """The name of a model under activations/: the one it was first harvested under, wherever it has moved since."""
    known = (h.model for h in store.harvests if h.identity["model"]["fingerprint"] == info.fingerprint)
    return next(known, info.name)


def require_harvested(store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings) -> None:
    """Raise StorageError unless the store holds the spec's sites, of its model and harvested as it says."""
    known = {harvest.digest for harvest in store.harvests}
    for job in prepare_harvests(store, model, info, settings):
        if job.harvest.digest not in known:
            raise StorageError(
                f"{', '.join(job.harvest.sites)} of {info.id} {'is' if len(job.harvest.sites) == 1 else 'are'} not in "
                f"the store at {store.path}; run `granary harvest` first"
            )


def declare(store: Store, job: HarvestJob) -> None:
    """Write the harvest's record and array metadata, create-only."""
    declare_harvest(store.path, store.num_rows, job.harvest)


def run_harvest(job: HarvestJob, settings: HarvestSettings, on_unit: Callable[[UnitResult], None]) -> None:
    """Harvest what is left. Ray must be up. Raises HarvestFailed, StorageError or InputError."""
    require_gpus(settings.gpus_per_worker, "harvest.gpus_per_worker")
    workers = settings.workers
    if workers == "auto":
        workers = room_for(settings.threads_per_worker, settings.gpus_per_worker)
    supervisor = Supervisor(job.setup, job.units, workers=workers, gpus_per_worker=settings.gpus_per_worker)
    try:
        supervisor.run(on_unit)
    finally:
        supervisor.close()


def _identity(store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings) -> Record:
    """Everything but the sites that determines the bytes of a harvest."""
    layers = info.num_layers
    return {
        "corpus_digest": store.info.corpus_digest,
        "tokenizer_digest": store.info.tokenizer_digest,
        "model": {"fingerprint": info.fingerprint, "dtype": model.dtype},
        "rows_per_unit": store.info.rows_per_unit,
        "harvest": {
            "dtype": settings.dtype,
            "batch_tokens": settings.batch_tokens,
            "attention": settings.attention,
            "compile": compile_layers(settings, info, store.num_rows, layers),
            "device": "cuda" if settings.gpus_per_worker else "cpu",
            "threads_per_worker": None if settings.gpus_per_worker else settings.threads_per_worker,
        },
    }


def _job(
    store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings, harvest: Harvest, identity: Record
) -> HarvestJob:
    committed = committed_units(store.path, harvest.digest)
    device: Any = "cpu"
    if settings.gpus_per_worker:
        device = "cuda" if settings.gpus_per_worker == 1 else "auto"
    setup = HarvesterSetup(
        store=store.path,
        harvest=harvest,
        model=info,
        layers=1 + max(int(site.rpartition(".")[2]) for site in harvest.sites),
        model_dtype=model.dtype,
        attention=settings.attention,
        compile=identity["harvest"]["compile"],
        batch_tokens=settings.batch_tokens,
        threads=settings.threads_per_worker,
        device=device,
    )
    return HarvestJob(harvest, setup, [u for u in range(store.info.num_units) if u not in committed])
