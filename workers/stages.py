"""The stages, one function each: take the spec's sections, do what is not done yet, say what happened.

Every stage may be run again at any time; what is finished is found in the store and left alone. `jobs` adds the spec
file, the messages and the terminal; Ray must be up for the stages that use actors.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from pipeline.model.describe import ModelInfo, describe_model
from storage.errors import StorageError
from storage.format.records import Record
from storage.format.units import UnitSet, shown
from storage.harvest.failures import Failure
from storage.harvest.harvest import sweep
from storage.results.anchors import AnchorSet, anchor_names, check_identity, read_anchors
from storage.results.runs import open_run
from storage.store import Store
from workers.anchors.stage import make_anchors, plan_anchors, tasks_for
from workers.cluster.connect import require_gpus
from workers.cluster.stopping import GOES_ON, POLL_S, Stopped, StopRequest, results, stop_requests
from workers.evaluate.evaluator import EvaluationPlan, check_model, evaluate_remotely, is_evaluated
from workers.harvest.failure_limits import HarvestFailed
from workers.harvest.harvester import UnitResult
from workers.harvest.stage import HarvestJob, declare, run_harvest
from workers.settings.anchors import AnchorSettings
from workers.settings.experiment import (
    ClusterSettings,
    EvaluateSettings,
    HarvestSettings,
    ModelSettings,
    TrainSettings,
)
from workers.train.plan import TrainPlan, plan_training, unfinished
from workers.train.trainer import Progress, TrainerActor

NO_CHECKPOINT = ": training is cut off in the middle of a step; the same command goes on from the last checkpoint"
TRAINER_STARTS = 3
"""Times a trainer is started before its deaths are taken for a pattern."""


def harvest(
    store: Store,
    jobs: list[HarvestJob],
    settings: HarvestSettings,
    cluster: ClusterSettings,
    on_unit: Callable[[UnitResult], None],
    on_elsewhere: Callable[[UnitSet], None],
) -> None:
    """Harvest the units that are missing. Raises HarvestFailed at the end, naming them, if units were set aside."""
    set_aside: list[Failure] = []
    for job in jobs:
        declare(store, job)
        if job.units:
            set_aside += run_harvest(job, settings, cluster, on_unit, on_elsewhere).set_aside
        tidy(store, [job])
    if set_aside:
        units = shown((failure.unit for failure in set_aside), most=len(set_aside))
        raise HarvestFailed(
            f"{len(set_aside)} units were set aside and the rest is harvested: {units}; unit {set_aside[0].unit} "
            f"failed with {set_aside[0].errors[-1]}. `granary status` shows each; the same command tries them again"
        )


def tidy(store: Store, jobs: list[HarvestJob]) -> None:
    """Where every unit is committed: remove what killed writers left, complete the bitmap of commits, write what was
    lost of the harvest's own records.

    Nothing depends on it, so a store that cannot be written is left as it is."""
    for job in jobs:
        committed = job.log.committed()
        if committed.is_full:
            with suppress(OSError, StorageError):
                declare(store, job)
                job.log.compact(committed)
                sweep(store.root, job.harvest)


@dataclass(frozen=True)
class AnchorResult:
    anchors: AnchorSet
    made: bool


def anchors(
    store: Store, settings: AnchorSettings, sites: Sequence[str], connect: Callable[[], None] | None = None
) -> AnchorResult:
    """Make a set of anchors of `sites`, unless the same ones are there. `connect` brings up Ray, for many rows."""
    plan = plan_anchors(store, settings, sites)
    if settings.name in anchor_names(store):
        found = read_anchors(store, settings.name)
        if found.identity_at(plan.sites) == plan.identity:
            return AnchorResult(found, made=False)
        check_identity(found, plan.identity, store)
    return AnchorResult(make_anchors(store, plan, tasks=tasks_for(store, plan, connect)), made=True)


def train(
    store: Store,
    settings: TrainSettings,
    cluster: ClusterSettings,
    on_progress: Callable[[Progress], None],
) -> list[str]:
    """Train the dictionaries that are not finished, in one pass; return their names.

    Raises Stopped at a signal, once a checkpoint is written or `cluster.grace_s` is over; HarvestFailed when the
    trainer keeps dying; InputError for GPUs that are not there.
    """
    plan = unfinished(store, plan_training(store, settings))
    if not plan.dictionaries:
        return []
    require_gpus(plan.gpus, "train.gpus")
    words = f"training ends with a checkpoint of the step it is at, within {cluster.grace_s:g} s (once more: at once)"
    with stop_requests(words) as stop:
        for start in range(TRAINER_STARTS):
            try:
                _train_once(plan, on_progress, stop, cluster.grace_s)
                break
            except RayActorError as error:
                if stop.signum is not None:
                    raise Stopped(stop.signum, NO_CHECKPOINT) from error
                if start + 1 == TRAINER_STARTS:
                    raise HarvestFailed(f"the trainer died {TRAINER_STARTS} times; the last: {error}") from error
    return [d.name for d in plan.dictionaries]


def _train_once(plan: TrainPlan, on_progress: Callable[[Progress], None], stop: StopRequest, grace_s: float) -> None:
    """Run one trainer to the end. Raises RayActorError if it dies, and Stopped."""
    cpus = min(plan.threads, ray.cluster_resources().get("CPU", 1))
    actor = TrainerActor.options(num_cpus=cpus, num_gpus=plan.gpus).remote(plan)
    try:
        running, asked = actor.train.remote(), actor.progress.remote()
        has_begun = False
        while not (is_over := bool(ray.wait([running], timeout=POLL_S)[0])) and stop.signum is None:
            if ray.wait([asked], timeout=0)[0]:
                on_progress(ray.get(asked))
                has_begun, asked = True, actor.progress.remote()
        if stop.signum is not None:
            if has_begun and not is_over:  # else it is not placed yet, and has nothing to save
                actor.stop.remote()
                is_over = _is_over_within(running, stop, grace_s)
            raise Stopped(stop.signum, _where_training_is(plan, ray.get(running)) if is_over else NO_CHECKPOINT)
        ray.get(running)
        on_progress(ray.get(actor.progress.remote()))
    finally:
        ray.kill(actor)


def _is_over_within(running: Any, stop: StopRequest, grace_s: float) -> bool:
    """Wait for a trainer that was asked to stop; return whether it has, in time and without a second signal."""
    deadline = time.monotonic() + grace_s
    while not (is_over := bool(ray.wait([running], timeout=POLL_S)[0])):
        if stop.at_once or time.monotonic() > deadline:
            break
    return is_over


def _where_training_is(plan: TrainPlan, steps_done: int) -> str:
    if steps_done == plan.steps:
        return f": training is finished; {GOES_ON}"
    return f": training has a checkpoint of step {steps_done:,} of {plan.steps:,}, and the same command goes on from it"


def plan_evaluations(
    store: Store,
    model: ModelSettings,
    harvest_settings: HarvestSettings,
    train_settings: TrainSettings,
    anchors: Sequence[AnchorSettings],
    settings: EvaluateSettings,
    info: ModelInfo | None = None,
) -> list[EvaluationPlan]:
    """What is left to evaluate. `info`: of the model, where it was described already. Raises StorageError when a
    dictionary of the spec is not trained."""
    info = info or describe_model(model.id, model.revision)
    plans = []
    for wanted in train_settings.dictionaries:
        run = open_run(store, wanted.name)
        run.dictionary_record()  # raises when it is not trained
        check_model(store, run)
        plan = EvaluationPlan(
            store=store.url,
            run=wanted.name,
            anchors=tuple(scored.name for scored in anchors),
            model=info,
            model_dtype=model.dtype,
            attention=harvest_settings.attention,
            batch_tokens=harvest_settings.batch_tokens,
            settings=settings,
            threads=train_settings.threads,
            gpus=harvest_settings.gpus_per_worker,
            placement=harvest_settings.placement,
        )
        if not is_evaluated(store, plan):
            plans.append(plan)
    return plans


def evaluate(plan: EvaluationPlan) -> Record:
    """Evaluate one dictionary in a worker of its own and return the record that is now in its run.

    Raises Stopped at a signal, which leaves no record, and InputError for GPUs that are not there."""
    require_gpus(plan.gpus, "harvest.gpus_per_worker")
    cpus = min(plan.threads, ray.cluster_resources().get("CPU", 1))
    asked = evaluate_remotely.options(num_cpus=cpus, num_gpus=plan.gpus).remote(plan)
    record: Record = results([asked], f"evaluating {plan.run}")[0]
    return record
