"""The trainer: an actor of its own that streams rows from the store into dictionaries, and nothing else.

One pass over the stream trains every dictionary that is not finished. Checkpoints hold the step; the stream can be
asked for by step; so a run that was killed or stopped goes on and ends with the same weights, bit for bit, on the same
machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import torch
from safetensors.torch import load, save

from pipeline.checkpoints.hub import is_commit
from pipeline.model.placement import check_dtype
from pipeline.sdl.dictionary.activations import BatchTopK
from pipeline.sdl.dictionary.calibration import calibrate
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.files import save_dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.anchor_controls import controlled
from pipeline.sdl.train.objective import Anchors
from pipeline.sdl.train.trainer import DictionaryTrainer, StepMetrics
from storage.format.records import Record
from storage.read.norm_filter import NormFilter, norm_filter
from storage.results.anchors import read_anchors
from storage.results.runs import Run, open_run
from storage.store import Store, open_store
from workers.settings.dictionaries import AnchoringSettings
from workers.tensors import to_torch
from workers.train.plan import DictionaryPlan, TrainPlan
from workers.train.rows import READ_ROWS, calibration_rows, normalisations, pair, side_by_side
from workers.versions import versions

CURVE_POINTS = 200
"""Points of a training curve: enough to draw it, whatever the number of steps."""


@dataclass(frozen=True)
class Progress:
    """How far a training run is."""

    step: int
    steps: int
    latest: dict[str, StepMetrics]


class Trainer:
    """Plain class; `TrainerActor` is the actor. `train` runs to the end while `progress` may be called beside it."""

    def __init__(self, plan: TrainPlan):
        self.plan = plan
        store = open_store(plan.store)
        self.store = store if plan.model is None else store.for_model(plan.model)
        self._progress = Progress(0, plan.steps, {})
        self._is_stopping = False

    def progress(self) -> Progress:
        return self._progress

    def stop(self) -> None:
        """Let `train` end after the step it is at, with a checkpoint."""
        self._is_stopping = True

    def train(self) -> int:
        """Train all dictionaries of the plan, from their checkpoints if there are any, to the end or until `stop`.

        Return the steps that are done: all of the plan's when the dictionaries are finished. Raises InputError for a
        GPU that is not there.
        """
        plan = self.plan
        torch.set_num_threads(plan.threads)
        device = "cuda" if plan.gpus else "cpu"
        check_dtype(torch.float32, device)
        sites = sorted({site for d in plan.dictionaries for site in (*d.config.input, *d.config.output)})
        kept = None if plan.max_norm is None else norm_filter(self.store, plan.norm_site, plan.max_norm, READ_ROWS)
        norms = normalisations(self.store, sites, plan, kept)
        members = [_Member.begin(self.store, d.on(device), device, norms) for d in plan.dictionaries]
        start = min(m.trainer.step_number for m in members)
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
            # At the end too: what is left, a threshold on held-out rows, may fail, and this need not be trained again.
            is_last, is_stopping = step + 1 == plan.steps, self._is_stopping
            if (step + 1) % plan.checkpoint_every == 0 or is_last or is_stopping:
                for member in members:
                    member.checkpoint()
            if is_stopping and not is_last:
                return step + 1
        for member in members:
            member.finish(kept)
        return plan.steps


# Two threads: one trains, the other answers how far it is.
TrainerActor = ray.remote(max_restarts=0, max_concurrency=2)(Trainer)


class _Member:
    """One dictionary in the pass: its trainer, its run's folder and its curve."""

    def __init__(self, store: Store, run: Run, plan: DictionaryPlan, trainer: DictionaryTrainer, curve: list[Record]):
        self.store, self.run, self.plan, self.trainer, self.curve = store, run, plan, trainer, curve
        self.latest: StepMetrics | None = None

    @classmethod
    def begin(cls, store: Store, plan: DictionaryPlan, device: str, norms: Mapping[str, Normalisation]) -> "_Member":
        run = open_run(store, plan.name)
        name = None if plan.anchors is None else plan.anchors.shown
        run.begin(plan.identity, {"anchors": name, "made_with": versions()})
        trainer = DictionaryTrainer(
            Dictionary(plan.config),
            plan.training,
            Normalisation.side_by_side([norms[site] for site in plan.config.input]),
            Normalisation.side_by_side([norms[site] for site in plan.config.output]),
            None if plan.anchors is None else anchors_of(store, plan.anchors, plan.config, plan.training.seed),
            device,
        )
        if (checkpoint := run.read_checkpoint()) is not None:
            trainer.load_state(load(checkpoint))
        return cls(store, run, plan, trainer, run.curve(up_to_step=trainer.step_number))

    def step(self, batch: dict[str, torch.Tensor], every: int) -> None:
        step = self.trainer.step_number
        x, y = pair(self.plan.config, lambda site: batch[site])
        self.latest = self.trainer.step(x, y)
        if step % every == 0 or step + 1 == self.plan.training.steps or self.latest.resampled:
            self.curve.append({"step": step, **asdict(self.latest)})

    def checkpoint(self) -> None:
        self.run.save_checkpoint(self.curve, save(self.trainer.state()))

    def finish(self, kept: NormFilter | None) -> None:
        dictionary = self.trainer.result()
        about: dict[str, Any] = {
            "models": models_of(self.store, self.plan.config),
            "identity": self.plan.identity,
            "normalisation": {
                "folded": True,  # the weights are of activations as they are stored
                "input_scale": scales_of(self.trainer.x_norm, self.plan.config.input, self.plan.config.input_widths),
                "output_scale": scales_of(self.trainer.y_norm, self.plan.config.output, self.plan.config.output_widths),
            },
            "anchors": None if self.plan.anchors is None else self.plan.anchors.model_dump(),
            "made_with": versions(),
        }
        if isinstance(self.plan.config.activation, BatchTopK):
            rows = partial(calibration_rows, self.store, self.plan.config, kept)
            calibrate(dictionary, rows, self.trainer.competing())
        about["last_step"] = {name: value for name, value in self.curve[-1].items() if name != "step"}
        self.run.finish(self.curve, save_dictionary(dictionary, about, (self.trainer.x_norm, self.trainer.y_norm)))


def scales_of(norm: Normalisation, sites: Sequence[str], widths: Sequence[int]) -> Record:
    """Site -> what its centred activations were multiplied with in training."""
    return {site: part[0].item() for site, part in zip(sites, norm.scale.split(list(widths)), strict=True)}


def anchors_of(store: Store, wanted: AnchoringSettings, config: DictionaryConfig, seed: int) -> Anchors:
    """The anchors of a dictionary's sites, or the control that is asked for in their place."""
    vectors = {site: torch.from_numpy(v) for site, v in read_anchors(store, wanted.name).vectors.items()}
    used = controlled({site: vectors[site] for site in sorted(wanted.sites(config))}, wanted.control, seed)
    encoder = side_by_side([used[site] for site in config.input]) if wanted.sides != "decoder" else None
    decoder = side_by_side([used[site] for site in config.output]) if wanted.sides != "encoder" else None
    return Anchors(encoder, decoder)


def models_of(store: Store, config: DictionaryConfig) -> Record:
    """The models whose activations the dictionary is of: name in the store -> its fingerprint, the id it had, and its
    commit if it is on the hub."""
    harvests = [store.find(site)[0] for site in dict.fromkeys((*config.input, *config.output))]
    models = {}
    for harvest in harvests:
        revision = str(harvest.made_with.get("revision"))
        models[harvest.model] = {
            **harvest.identity.model,
            "id": harvest.made_with.get("model", harvest.model),
            **({"revision": revision} if is_commit(revision) else {}),
        }
    return models
