"""The trainer: an actor of its own that streams rows from the store into dictionaries, and nothing else.

One pass over the stream trains every dictionary that is not finished. Checkpoints hold the step; the stream can be
asked for by step; so a run that was killed goes on and ends with the same weights, bit for bit, on the same machine.
"""

from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch
from safetensors.torch import load, save

from pipeline.dictionary import Dictionary, DictionaryConfig, Normalisation, save_dictionary
from pipeline.training import DictionaryTrainer, StepMetrics, TrainingConfig, default_learning_rate
from storage.anchors import read_anchors
from storage.errors import StorageError, StoreMismatch
from storage.moments import MomentKey, merged_moments, training_units
from storage.records import Record, digest
from storage.runs import Run, open_run
from storage.store import Store, open_store
from workers.settings import DictionarySettings, TrainSettings
from workers.tensors import to_torch
from workers.versions import versions

CURVE_POINTS = 200
"""Points of a training curve: enough to draw it, whatever the number of steps."""
DEAD_SHARE_OF_RUN = 0.05
DEAD_ROWS = 10_000_000
"""A latent counts as dead after 10 M silent rows (Gao et al. 2024), or this share of a shorter run."""


@dataclass(frozen=True)
class DictionaryPlan:
    """One dictionary to train."""

    name: str
    config: DictionaryConfig
    training: TrainingConfig
    anchors: str | None
    identity: Record


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


@dataclass(frozen=True)
class Progress:
    """How far a training run is."""

    step: int
    steps: int
    latest: dict[str, StepMetrics]


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
    (source,), (target,) = wanted.input, wanted.outputs
    for site in dict.fromkeys((source, target)):
        store.require_committed(site, training_units(store))
    config = DictionaryConfig(
        input=wanted.input,
        output=wanted.outputs,
        d_in=store.array(source).shape[1],
        d_out=store.array(target).shape[1],
        latents=wanted.latents,
        k=wanted.activation.k,
    )
    training = TrainingConfig(
        steps=steps,
        batch_rows=settings.batch_rows,
        learning_rate=wanted.learning_rate or default_learning_rate(wanted.latents),
        dead_after_rows=min(DEAD_ROWS, int(steps * settings.batch_rows * DEAD_SHARE_OF_RUN)),
        anchor_weight=wanted.anchor_weight,
        seed=settings.seed,
    )
    anchors = None
    if wanted.anchors is not None:
        anchor_set = read_anchors(store, wanted.anchors)
        if since := store.info.since(anchor_set.identity):
            raise StoreMismatch(
                f"the anchors {wanted.anchors!r} were made of {since}: make those of all rows under another name "
                "(anchors.name) with `granary anchors`"
            )
        if uncovered := {source, target} - anchor_set.vectors.keys():
            raise StorageError(
                f"the anchors {wanted.anchors!r} do not cover {', '.join(sorted(uncovered))}; run `granary anchors`"
            )
        made_from = anchor_set.identity["harvests"]
        if others := [s for s in (source, target) if made_from.get(s) != store.find(s)[0].digest]:
            raise StoreMismatch(
                f"the anchors {wanted.anchors!r} at {others[0]} were made from another model's rows; make those of "
                "this one under another name (anchors.name) with `granary anchors`"
            )
        anchors = anchor_set.identity_at((source, target))
    identity = {
        "corpus_digest": store.info.corpus_digest,
        "harvests": {site: store.find(site)[0].digest for site in (source, target)},
        "dictionary": asdict(config) | {"input": list(config.input), "output": list(config.output)},
        "training": asdict(training),
        "anchors": None if anchors is None else digest(anchors),
    }
    if settings.max_norm is not None:
        identity["left_out"] = {"max_norm": settings.max_norm, "site": settings.norm_site}
    return DictionaryPlan(wanted.name, config, training, wanted.anchors, identity)


class Trainer:
    """Plain class; `TrainerActor` is the actor. `train` runs to the end while `progress` may be called beside it."""

    def __init__(self, plan: TrainPlan):
        self.plan = plan
        store = open_store(plan.store)
        self.store = store if plan.model is None else store.for_model(plan.model)
        self._progress = Progress(0, plan.steps, {})

    def progress(self) -> Progress:
        return self._progress

    def train(self) -> None:
        """Train all dictionaries of the plan to the end, from their checkpoints if there are any."""
        plan = self.plan
        torch.set_num_threads(plan.threads)
        device = "cuda" if plan.gpus else "cpu"
        members = [_Member.begin(self.store, d, device) for d in plan.dictionaries]
        start = min(m.trainer.step_number for m in members)
        sites = sorted({site for d in plan.dictionaries for site in (*d.config.input, *d.config.output)})
        stream = self.store.stream(
            sites,
            batch_rows=plan.batch_rows,
            seed=plan.seed,
            start_step=start,
            steps=plan.steps - start,
            max_norm=plan.max_norm,
            norm_site=plan.norm_site,
        )
        for step, batch in enumerate(stream, start=start):
            tensors = {site: to_torch(batch[site]) for site in sites}
            for member in members:
                if member.trainer.step_number == step:  # one that has a later checkpoint waits for the others
                    member.step(tensors, every=max(1, plan.steps // CURVE_POINTS))
            self._progress = Progress(step + 1, plan.steps, {m.run.name: m.latest for m in members if m.latest})
            if (step + 1) % plan.checkpoint_every == 0 and step + 1 < plan.steps:
                for member in members:
                    member.checkpoint()
        for member in members:
            member.finish()


# Two threads: one trains, the other answers how far it is.
TrainerActor = ray.remote(max_restarts=0, max_concurrency=2)(Trainer)


class _Member:
    """One dictionary in the pass: its trainer, its run's folder and its curve."""

    def __init__(self, run: Run, plan: DictionaryPlan, trainer: DictionaryTrainer, curve: list[Record]):
        self.run, self.plan, self.trainer, self.curve = run, plan, trainer, curve
        self.latest: StepMetrics | None = None

    @classmethod
    def begin(cls, store: Store, plan: DictionaryPlan, device: str) -> "_Member":
        run = open_run(store, plan.name)
        run.begin(plan.identity, {"anchors": plan.anchors, "made_with": versions()})
        (source,), (target,) = plan.config.input, plan.config.output
        anchors = None
        if plan.anchors is not None:
            vectors = read_anchors(store, plan.anchors).vectors
            anchors = (torch.from_numpy(vectors[source]), torch.from_numpy(vectors[target]))
        trainer = DictionaryTrainer(
            Dictionary(plan.config),
            plan.training,
            normalisation(store, source),
            normalisation(store, target),
            anchors,
            device,
        )
        if (checkpoint := run.read_checkpoint()) is not None:
            trainer.load_state(load(checkpoint))
        return cls(run, plan, trainer, run.curve(up_to_step=trainer.step_number))

    def step(self, batch: dict[str, torch.Tensor], every: int) -> None:
        (source,), (target,) = self.plan.config.input, self.plan.config.output
        step = self.trainer.step_number
        self.latest = self.trainer.step(batch[source], batch[target])
        if step % every == 0 or step + 1 == self.plan.training.steps:
            self.curve.append({"step": step, **asdict(self.latest)})

    def checkpoint(self) -> None:
        self.run.save_checkpoint(self.curve, save(self.trainer.state()))

    def finish(self) -> None:
        about: dict[str, Any] = {"identity": self.plan.identity, "anchors": self.plan.anchors, "made_with": versions()}
        if self.latest is not None:
            about["last_step"] = asdict(self.latest)
        self.run.finish(self.curve, save_dictionary(self.trainer.result(), about))


def normalisation(store: Store, site: str) -> Normalisation:
    """Centre on the mean of the training rows and scale to E||x||^2 = d, from the harvest's own moments."""
    _, name = store.find(site)
    moments = merged_moments(store, site, training_units(store))[MomentKey(name)]
    scale = (len(moments.sum) / max(moments.total_variance, 1e-12)) ** 0.5
    return Normalisation(torch.from_numpy(moments.mean).float(), float(scale))
