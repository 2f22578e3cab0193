"""Every stage refuses GPUs that are not there at once, in one sentence: waiting for them would be for ever.

Ray is not started: what it would say of its machines is given. `harvest.gpus_per_worker` is part of a harvest, so the
stages after it need a store that looks as if GPUs had made it.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from corpora import ensure_rows
from lab import SITES, TRAIN, Lab

from pipeline.model.describe import describe_model
from pipeline.model.placement import Placement
from storage.store import open_store
from workers import stages
from workers.cluster import connect as cluster
from workers.harvest.harvester import Harvester
from workers.harvest.stage import declare, prepare_harvests
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import EvaluateSettings, HarvestSettings, ModelSettings, TrainSettings
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

TRAINED = {**TRAIN, "gpus": 0}
REFUSED = "asks for {} GPU(s) and this Ray cluster of one machine has 0; set it to 0 for CPU\n"


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connected", lambda address, cpus, env=(): nullcontext())
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{}])


def spec_of(lab: Lab, changes: dict[str, Any]) -> Path:
    anchors = {"name": "languages", "where": {"German": "language = 'de'"}, "min_rows": 10}
    return lab.spec({"corpus.holdout": 0.25, "anchors": anchors, "train": TRAIN, **changes})


@pytest.fixture
def made_on_gpus(lab: Lab, llama: Path) -> Lab:
    """A store that a harvest with one GPU a worker would have made, with a dictionary that is trained."""
    model = ModelSettings(id=str(llama), dtype="float32")
    of_corpus = {**lab.base["corpus"], "holdout": 0.25}
    store, _ = ensure_rows(lab.store, CorpusSettings.model_validate(of_corpus), model)
    settings = HarvestSettings(sites=tuple(SITES), threads_per_worker=1, workers=1, gpus_per_worker=1)
    (job,) = prepare_harvests(store, model, describe_model(str(llama)), settings)
    declare(store, job)
    harvester = Harvester(replace(job.setup, placement=Placement("cpu")))
    for unit in job.units:
        harvester.harvest_unit(unit)
    Trainer(plan_training(open_store(lab.store), TrainSettings.model_validate(TRAINED))).train()
    return lab


@pytest.mark.parametrize("verb", ["harvest", "run"])
def test_harvesting(lab: Lab, verb: str) -> None:
    err = lab.refused(verb, spec_of(lab, {"harvest.gpus_per_worker": 2}))
    assert err == "granary: harvest.gpus_per_worker " + REFUSED.format(2)


def test_a_run_is_refused_before_the_harvest_whose_training_cannot_follow(lab: Lab) -> None:
    """The harvest itself needs none. Nothing is written, as by every refusal."""
    err = lab.refused("run", spec_of(lab, {"train.gpus": 1}))
    assert err == "granary: train.gpus " + REFUSED.format(1)


def test_training(made_on_gpus: Lab) -> None:
    other = {**TRAIN["dictionaries"][0], "name": "other"}
    changes = {"harvest.gpus_per_worker": 1, "train": {**TRAIN, "gpus": 1, "dictionaries": [other]}}
    err = made_on_gpus.refused("train", spec_of(made_on_gpus, changes))
    assert err == "granary: train.gpus " + REFUSED.format(1)


def test_evaluating(made_on_gpus: Lab) -> None:
    err = made_on_gpus.refused("evaluate", spec_of(made_on_gpus, {"harvest.gpus_per_worker": 1}))
    assert err == "granary: harvest.gpus_per_worker " + REFUSED.format(1)


def test_evaluating_without_the_command_line(made_on_gpus: Lab, llama: Path) -> None:
    """The stage itself asks, too."""
    (plan,) = stages.plan_evaluations(
        open_store(made_on_gpus.store),
        ModelSettings(id=str(llama), dtype="float32"),
        HarvestSettings(sites=tuple(SITES), gpus_per_worker=1),
        TrainSettings.model_validate(TRAINED),
        (),
        EvaluateSettings(),
    )
    with pytest.raises(ValueError, match=r"harvest\.gpus_per_worker asks for 1 GPU"):
        stages.evaluate(plan)


def test_what_needs_no_gpu_is_not_refused(
    made_on_gpus: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchors are made on any machine, also where their rows are enough to take Ray; and a dictionary that is trained
    needs no GPU again."""
    spec = spec_of(made_on_gpus, {"harvest.gpus_per_worker": 1, "train.gpus": 1})
    assert "anchors: 1 means of conditions made" in made_on_gpus.run("anchors", spec)
    assert "train: sae is trained" in made_on_gpus.run("train", spec)
    made_on_gpus.run("verify", made_on_gpus.store, "--audit", "1")
    made_on_gpus.run("verify", spec, "--audit", "1")
    made_on_gpus.run("plan", spec)
