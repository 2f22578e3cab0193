"""The harvest stage: from a planned store and a spec's sites to committed units."""

from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from pipeline.capture.batches import COMPOSITION
from pipeline.capture.compilers import check_compiler
from pipeline.model.describe import ModelInfo
from pipeline.model.load import DTYPES as TORCH_DTYPES
from pipeline.model.load import check_weights, linear_shapes
from pipeline.model.placement import check_dtype
from pipeline.model.quantised import check_quantised
from pipeline.precision import FASTER, faster_type, slowdown
from pipeline.sites import layers_up_to, parse_site
from storage.errors import StorageError
from storage.format.units import UnitSet
from storage.harvest.harvest import Harvest, SiteLayout, declare_harvest, match_harvests
from storage.harvest.identity import BLOCKS, Computation, HarvestIdentity
from storage.harvest.log import HarvestLog, log_of
from storage.store import Store
from workers.cluster.connect import is_started_here, require_gpus
from workers.harvest.harvester import HarvesterSetup, UnitResult
from workers.harvest.known_models import check_not_replaced, fingerprint_in_store, is_of_model, made_from
from workers.harvest.supervisor import RunResult, Supervisor
from workers.settings.experiment import ClusterSettings, HarvestSettings, ModelSettings, compile_layers
from workers.versions import versions

GPU_TRIAL_S = 60


@dataclass(frozen=True)
class HarvestJob:
    """One harvest and the units of it that are not committed."""

    harvest: Harvest
    setup: HarvesterSetup
    log: HarvestLog
    units: UnitSet
    """Those that are not committed."""


def prepare_harvests(
    store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings
) -> list[HarvestJob]:
    """Find what is left to do for the sites of a spec. Writes nothing; see `declare`.

    Sites that the store has already, or is getting, belong to their own harvest; the others become a new one. Raises
    InputError for a site the model lacks and StoreMismatch when a site is stored under other settings, or the store was
    harvested from another model of this name.
    """
    _check_settings(info, model, settings)
    check_not_replaced(store, info)
    identity = _identity(store, model, info, settings)
    name = name_in_store(store, info)
    types = settings.stored_types()
    matching, missing = match_harvests(store.root, identity, name, types, by_machine=(BLOCKS,))
    if missing:
        layouts = {site: SiteLayout.of(info.d_model, types[site], store.info.rows_per_unit) for site in missing}
        made_with = {**made_from(info), **versions()}
        matching.append(
            Harvest.of(identity.with_sites({site: types[site] for site in missing}), name, layouts, made_with)
        )
    return [_job(store, model, info, settings, harvest) for harvest in matching]


def check_harvest(
    info: ModelInfo,
    model: ModelSettings,
    settings: HarvestSettings,
    cluster: ClusterSettings | None = None,
    *,
    with_loss: bool = False,
) -> None:
    """Raise InputError for what a model, or this machine where it is to run on CPU, cannot do, and for weights that are
    missing or do not fit; with those that an evaluation needs for the model's loss, `with_loss`. Touches no store."""
    _check_settings(info, model, settings)
    if settings.gpus_per_worker == 0:
        check_quantised(info, "cpu")
    loaded_here = cluster is not None and is_started_here(cluster.address)
    layers = info.num_layers if with_loss else layers_up_to(settings.parsed_sites())
    check_weights(info, layers, loaded_here=loaded_here, with_head=with_loss)


def _check_settings(info: ModelInfo, model: ModelSettings, settings: HarvestSettings) -> None:
    info.check_sites(settings.parsed_sites())
    info.check_attention(settings.attention)
    if settings.gpus_per_worker == 0:
        check_dtype(TORCH_DTYPES[model.dtype], "cpu")


def check_gpus(info: ModelInfo, model: ModelSettings, settings: HarvestSettings) -> None:
    """Raise InputError unless the workers' GPUs are there, compute in model.dtype and run the model's weights where
    they are quantised. Ray must be up.

    Tried on one GPU of the cluster, to refuse before anything is written; every worker tries its own again. Where none
    is free within a minute this says nothing: the harvest will wait for one, and say so.
    """
    require_gpus(settings.gpus_per_worker, "harvest.gpus_per_worker")
    trial = ray.remote(num_cpus=0, num_gpus=1)(_try_gpu).remote(info, model.dtype, settings.placement.device)
    try:
        ray.get(trial, timeout=GPU_TRIAL_S)
    except GetTimeoutError:
        ray.cancel(trial)
    except RayTaskError as error:
        raise error.cause from None


def _try_gpu(info: ModelInfo, dtype: str, device: str) -> None:
    check_dtype(TORCH_DTYPES[dtype], "cuda")
    check_quantised(info, device)


def emulation_notice(info: ModelInfo, model: ModelSettings, settings: HarvestSettings) -> str | None:
    """One sentence where this machine's processor is to compute in a type that it only emulates; else None."""
    if settings.gpus_per_worker or model.dtype == "float32" or model.dtype == faster_type():
        return None
    slower = slowdown(linear_shapes(info), model.dtype)
    if slower < FASTER:
        return None
    return (
        f"model.dtype: this processor has no instructions for {model.dtype} and takes {slower:.1f} times as long for a "
        f"layer of {info.id} as in float32; write model.dtype: float32, unless these very roundings are wanted"
    )


def check_compiling(compiles: bool, settings: HarvestSettings, cluster: ClusterSettings) -> None:
    """Raise InputError if layers are to be compiled on this machine, which cannot.

    Says nothing of other machines: a worker there looks for its compiler itself, before it loads the model.
    """
    if compiles and is_started_here(cluster.address):
        check_compiler(settings.placement.device)


def name_in_store(store: Store, info: ModelInfo) -> str:
    """The name of a model under activations/: the one it was first harvested under, wherever it has moved since."""
    known = (h.model for h in store.refresh().harvests if is_of_model(h, info))
    return next(known, info.name)


def require_harvested(store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings) -> None:
    """Raise StorageError unless the store holds the spec's sites, of its model and harvested as it says."""
    known = {harvest.digest for harvest in store.refresh().harvests}
    for job in prepare_harvests(store, model, info, settings):
        if job.harvest.digest not in known:
            raise StorageError(
                f"{', '.join(job.harvest.sites)} of {info.id} {'is' if len(job.harvest.sites) == 1 else 'are'} not in "
                f"the store at {store.url}; run `granary harvest` first"
            )


def declare(store: Store, job: HarvestJob) -> None:
    """Write the harvest's record and array metadata, create-only."""
    declare_harvest(store.root, store.num_rows, job.harvest)
    store.refresh()


def run_harvest(
    job: HarvestJob,
    settings: HarvestSettings,
    cluster: ClusterSettings,
    on_unit: Callable[[UnitResult], None],
    on_elsewhere: Callable[[UnitSet], None],
) -> RunResult:
    """Harvest what is left. Ray must be up. Raises HarvestFailed, Stopped, StorageError or InputError."""
    require_gpus(settings.gpus_per_worker, "harvest.gpus_per_worker")
    supervisor = Supervisor(
        job.setup,
        job.units,
        job.log.units,
        workers=settings.worker_range,
        gpus_per_worker=settings.gpus_per_worker,
        cluster=cluster,
    )
    return supervisor.run(on_unit, on_elsewhere)


def _identity(store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings) -> HarvestIdentity:
    """Everything but the sites that determines the bytes of a harvest. Of the table it is what the store was made with,
    as a store that has grown keeps what it has."""
    layers, first = info.num_layers, store.info.first_table
    compiled = compile_layers(settings, info, first["num_rows"], layers)
    attends_in_blocks = compiled and not settings.gpus_per_worker and model.dtype == "bfloat16"
    return HarvestIdentity.of(
        corpus_digest=first["corpus_digest"],
        tokenizer_digest=store.info.tokenizer_digest,
        fingerprint=fingerprint_in_store(store, info),
        dtype=model.dtype,
        rows_per_unit=store.info.rows_per_unit,
        computation=Computation(
            batches=COMPOSITION,
            batch_tokens=settings.batch_tokens,
            attention=settings.attention,
            compile=compiled,
            device="cuda" if settings.gpus_per_worker else "cpu",
            threads_per_worker=None if settings.gpus_per_worker else settings.threads_per_worker,
            attention_in_blocks=not (attends_in_blocks and faster_type() == "float32"),
        ),
    )


def _job(
    store: Store, model: ModelSettings, info: ModelInfo, settings: HarvestSettings, harvest: Harvest
) -> HarvestJob:
    log, computation = log_of(store, harvest), harvest.identity.computation
    assert computation is not None, "it matches the spec's"
    setup = HarvesterSetup(
        store=store.url,
        harvest=harvest,
        model=info,
        layers=layers_up_to(map(parse_site, harvest.sites)),
        model_dtype=model.dtype,
        attention=settings.attention,
        compile=computation.compile,
        batch_tokens=settings.batch_tokens,
        threads=settings.threads_per_worker,
        placement=settings.placement,
        blocks=computation.attention_in_blocks,
    )
    return HarvestJob(harvest, setup, log, log.committed().complement())
