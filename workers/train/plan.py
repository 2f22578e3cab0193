"""What a training run is: the train section of a spec resolved against the store, each dictionary with its identity."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.errors import InputError
from pipeline.precision import faster_type
from pipeline.sdl.dictionary.activations import BatchTopK
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import TrainingConfig, check_training
from storage.errors import StorageError, StoreMismatch
from storage.format.records import Record, digest
from storage.read.moments import training_units
from storage.results.anchors import read_anchors
from storage.results.runs import Run, open_run
from storage.store import Store
from workers.settings.dictionaries import AnchoringSettings, DictionarySettings
from workers.settings.experiment import TrainSettings

CALIBRATION_ROWS = 65_536
"""Held-out rows, the last ones, on which the threshold of a BatchTopK dictionary is set."""


@dataclass(frozen=True)
class DictionaryPlan:
    """One dictionary to train."""

    name: str
    config: DictionaryConfig
    training: TrainingConfig
    anchors: AnchoringSettings | None
    identity: Record

    def on(self, device: str) -> "DictionaryPlan":
        """The plan as it is trained on a device: with products in the faster type of it where the plan says auto."""
        training = replace(self.training, products=self.training.products.on(device))
        identity = {**self.identity, "training": as_json(asdict(training))}
        return replace(self, training=training, identity=identity)


@dataclass(frozen=True)
class TrainPlan:
    """What the trainer needs to begin."""

    store: str
    model: str | None
    """The model whose sites are meant, in a store of several."""
    dictionaries: tuple[DictionaryPlan, ...]
    steps: int
    batch_rows: int
    seed: int
    max_norm: float | None
    norm_site: str
    """Rows whose norm here is above `max_norm` times the median are left out."""
    checkpoint_every: int
    threads: int
    gpus: int


def plan_training(store: Store, settings: TrainSettings) -> TrainPlan:
    """Resolve the train section against the store. Raises StorageError for a site or anchor set it does not have, and
    StoreMismatch when a run of the same name was trained otherwise. Writes nothing."""
    rows = settings.rows or store.info.held_out_start
    steps = max(1, rows // settings.batch_rows)
    plans = tuple(_plan_dictionary(store, settings, steps, d) for d in settings.dictionaries)
    for plan in plans:
        _check_run(store, open_run(store, plan.name), plan.identity)
    return TrainPlan(
        store=store.url,
        model=store.model,
        dictionaries=plans,
        steps=steps,
        batch_rows=settings.batch_rows,
        seed=settings.seed,
        max_norm=settings.max_norm,
        norm_site=settings.norm_site,
        checkpoint_every=settings.checkpoint_every,
        threads=settings.threads,
        gpus=settings.gpus,
    )


def emulated_products(settings: TrainSettings) -> str | None:
    """One sentence where dictionaries are to be computed in bfloat16 on a processor that emulates it; else None."""
    names = [d.name for d in settings.dictionaries if d.precision == "bfloat16"]
    if not names or settings.gpus or faster_type() == "bfloat16":
        return None
    return (
        f"precision: this processor has no instructions for bfloat16, so that {', '.join(names)} will train many times "
        "slower than in float32; leave precision out, and the faster type is taken"
    )


def calibration_range(store: Store) -> range:
    """The last held-out rows, or the last training rows where none are held out.

    The last: `evaluate` measures the first ones, so that L0 is measured on other rows where there are enough."""
    none_held_out = store.info.held_out_start >= store.num_rows
    return range(
        max(0 if none_held_out else store.info.held_out_start, store.num_rows - CALIBRATION_ROWS), store.num_rows
    )


def _check_run(store: Store, run: Run, identity: Record) -> None:
    """Raise StoreMismatch if the run is there and of another identity."""
    try:
        run.check(identity)
    except StoreMismatch:
        if since := store.info.since(run.record()["identity"]):
            raise StoreMismatch(
                f"the run {run.name!r} is in the store, {'trained' if run.is_finished else 'begun'} on {since}. Give "
                "the dictionary another name to train it on those"
            ) from None
        raise


def unfinished(store: Store, plan: TrainPlan) -> TrainPlan:
    """The same plan with only the dictionaries that are not finished."""
    left = tuple(d for d in plan.dictionaries if not open_run(store, d.name).is_finished)
    return TrainPlan(**{**plan.__dict__, "dictionaries": left})


def _plan_dictionary(store: Store, settings: TrainSettings, steps: int, wanted: DictionarySettings) -> DictionaryPlan:
    sites = tuple(dict.fromkeys((*wanted.input, *wanted.outputs)))
    for site in sites:
        store.require_committed(site, training_units(store))
    config = wanted.config({site: store.array(site).shape[1] for site in sites})
    if isinstance(config.activation, BatchTopK):
        first = calibration_range(store).start // store.info.rows_per_unit
        for site in config.input:
            store.require_committed(site, range(first, store.info.num_units))
    training = wanted.training(steps, settings.batch_rows, settings.seed)
    run = open_run(store, wanted.name)
    if run.was_begun:
        training = replace(training, products=training.products.as_in(_products_of(run)))
    check_training(config, training, None)
    anchors = None if wanted.anchors is None else _checked_anchors(store, wanted.anchors, config)
    identity = {
        "corpus_digest": store.info.corpus_digest,
        "harvests": {site: store.find(site)[0].digest for site in sites},
        "dictionary": config.record(),
        "training": as_json(asdict(training)),
        "anchors": None if anchors is None else digest(anchors),
    }
    if settings.max_norm is not None:
        identity["left_out"] = {"max_norm": settings.max_norm, "site": settings.norm_site}
    return DictionaryPlan(wanted.name, config, training, wanted.anchors, identity)


def _products_of(run: Run) -> Record:
    products: Record = run.record()["identity"].get("training", {}).get("products", {})
    return products


def _checked_anchors(store: Store, wanted: AnchoringSettings, config: DictionaryConfig) -> Record:
    """What determines the anchors of the sites they are for. Raises where the set is not of those, or does not fit."""
    anchor_set, sites = read_anchors(store, wanted.name), wanted.sites(config)
    if since := store.info.since(anchor_set.identity):
        raise StoreMismatch(
            f"the anchors {wanted.name!r} were made of {since}: make those of all rows under another name "
            "(anchors.name) with `granary anchors`"
        )
    if uncovered := set(sites) - anchor_set.vectors.keys():
        raise StorageError(
            f"the anchors {wanted.name!r} do not cover {', '.join(sorted(uncovered))}; run `granary anchors`"
        )
    made_from = anchor_set.identity["harvests"]
    if others := [s for s in sites if made_from.get(s) != store.find(s)[0].digest]:
        raise StoreMismatch(
            f"the anchors {wanted.name!r} at {others[0]} were made from another model's rows; make those of "
            "this one under another name (anchors.name) with `granary anchors`"
        )
    if len(anchor_set.values) > config.latents:
        raise InputError(
            f"the {len(anchor_set.values)} anchors of {wanted.name!r} do not fit into {config.latents} latents: take "
            "more latents, or fewer anchors (anchors.min_rows)"
        )
    return {**anchor_set.identity_at(sites), "sides": wanted.sides, "control": wanted.control}


def as_json(value: Any) -> Any:
    """The value as it comes back from a record: lists for tuples."""
    return json.loads(json.dumps(value))
