"""Two models with one tokenizer in one store: the columns a crosscoder or a model diff reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import harvest, start_harvest
from lab import Lab
from safetensors.torch import load_file, save_file

from jobs.plan.text import plan_text
from jobs.report import write_report
from jobs.status import status_record, status_text
from pipeline.model.describe import describe_model
from pipeline.sdl.dictionary.files import load_dictionary
from storage.errors import StorageError, StoreMismatch
from storage.results.anchors import read_anchors
from storage.store import Store, open_store
from workers.evaluate.evaluator import evaluate
from workers.harvest.stage import name_in_store
from workers.settings.anchors import AnchorSettings
from workers.settings.dictionaries import ActivationSettings, DictionarySettings
from workers.settings.experiment import (
    EvaluateSettings,
    HarvestSettings,
    ModelSettings,
    TrainSettings,
)
from workers.stages import anchors, plan_evaluations
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

SITES = ["resid_post.1", "mlp_out.0"]
SITE = SITES[0]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A copy of the model whose weights were changed a little, as fine-tuning does."""
    folder = tmp_path_factory.mktemp("tuned") / "llama-tuned"
    shutil.copytree(llama, folder)
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(7)
    weights = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path, tuned: Path, corpus: Path) -> dict[str, Store]:
    """Each model in a store of its own: what the shared store must equal."""
    folder = tmp_path_factory.mktemp("alone")
    return {path.name: harvest(folder / path.name, path, corpus, SITES, holdout=0.2) for path in (llama, tuned)}


@pytest.fixture(scope="module")
def names(llama: Path, tuned: Path) -> list[str]:
    """The models' names inside a store."""
    return [describe_model(str(path)).name for path in (llama, tuned)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, llama: Path, tuned: Path, corpus: Path) -> Store:
    path = tmp_path_factory.mktemp("both") / "store"
    harvest(path, llama, corpus, SITES, holdout=0.2)
    harvest(path, tuned, corpus, SITES, holdout=0.2)
    return open_store(path)


def test_sites_are_named_with_their_model(both: Store, names: list[str]) -> None:
    base, tuned = names
    assert base != tuned
    assert both.sites == [f"{model}/{site}" for model in names for site in SITES]
    with pytest.raises(StorageError, match=rf"several models; name one of {base}/{SITE}, {tuned}/{SITE}"):
        both.read(SITE)
    with pytest.raises(StorageError, match=r"elsewhere/resid_post\.1 is not in the store; it has"):
        both.read(f"elsewhere/{SITE}")


def test_rows_equal_those_of_stores_of_one_model(
    both: Store, alone: dict[str, Store], names: list[str], llama: Path, tuned: Path
) -> None:
    read = {}
    for model, path in zip(names, (llama, tuned), strict=True):
        for site in SITES:
            read[model] = both.read(f"{model}/{site}")
            expected = alone[path.name].read(site)
            np.testing.assert_array_equal(read[model].view(np.uint16), expected.view(np.uint16))
            np.testing.assert_array_equal(both.for_model(model).norms(site), alone[path.name].norms(site))
    assert (read[names[0]] != read[names[1]]).any(axis=1).mean() > 0.9


def test_batches_of_both_models_hold_the_same_rows(both: Store, names: list[str]) -> None:
    sites = [f"{model}/{SITE}" for model in names]
    whole = {site: both.read(site) for site in sites}
    seen = []
    for batch in both.stream(sites, batch_rows=100, seed=1, steps=20):
        for site in sites:
            np.testing.assert_array_equal(batch[site], whole[site][batch["row"]])
        seen.append(batch["row"])
    rows = np.concatenate(seen)
    assert len(np.unique(rows)) == len(rows)
    order = [batch["row"] for batch in both.for_model(names[0]).stream([SITE], batch_rows=100, seed=1, steps=20)]
    np.testing.assert_array_equal(rows, np.concatenate(order))


def test_only_what_is_missing_is_computed(both: Store, llama: Path, tuned: Path, corpus: Path, tmp_path: Path) -> None:
    """Another site of the second model: its first ones and the other model are left alone."""
    path = tmp_path / "store"
    shutil.copytree(both.path, path)
    again = start_harvest(path, tuned, corpus, SITES, holdout=0.2)
    assert [len(job.units) for job in again.jobs] == [0]
    more = start_harvest(path, tuned, corpus, [*SITES, "resid_mid.1"], holdout=0.2)
    assert [(list(job.harvest.sites), len(job.units)) for job in more.jobs[1:]] == [(["resid_mid.1"], 4)]
    assert start_harvest(path, llama, corpus, SITES, holdout=0.2).jobs[0].units == set()


def test_queries_name_the_models(both: Store, names: list[str]) -> None:
    found = both.sql("select model, site from sites where units_committed = units order by all").fetchall()
    assert found == sorted((model, site) for model in names for site in SITES)


def trained(path: Path, name: str, model: Path) -> tuple[torch.Tensor, dict[str, object]]:
    """Train and evaluate a dictionary by a spec that names `model`, in a store; return its encoder and its figures."""
    store = open_store(path)
    info = describe_model(str(model))
    dictionary = DictionarySettings(name=name, input=SITE, latents=64, activation=ActivationSettings(k=4))
    settings = TrainSettings(rows=8192, batch_rows=512, threads=1, dictionaries=(dictionary,))
    Trainer(plan_training(store.for_model(name_in_store(store, info)), settings)).train()
    (plan,) = plan_evaluations(
        store.for_model(name_in_store(store, info)),
        ModelSettings(id=str(model), dtype="float32"),
        HarvestSettings(sites=tuple(SITES)),
        settings,
        (),
        EvaluateSettings(rows=500, contexts=8),
    )
    return load_file(path / "runs" / name / "dictionary.safetensors")["blocks.0.W_enc"], evaluate(plan)


def test_a_spec_trains_on_its_own_models_sites(
    tmp_path: Path, both: Store, alone: dict[str, Store], names: list[str], llama: Path, tuned: Path
) -> None:
    """The same weights and figures as in a store of this model alone: these are its rows and no others'."""
    shared = shutil.copytree(both.path, tmp_path / "both")
    write_report(open_store(shared))
    page = (shared / "report.html").read_text()
    assert all(name in page for name in names)
    assert f"input: {SITE}, latents: 256" in page  # as a spec names it, beside its model
    encoders = []
    for model in (llama, tuned):
        weights, figures = trained(shared, model.name, model)
        single = shutil.copytree(alone[model.name].path, tmp_path / model.name)
        expected, expected_figures = trained(single, model.name, model)
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        for key in ("fvu", "l0", "loss"):
            assert figures[key] == expected_figures[key]
        encoders.append(weights)
    assert not torch.equal(*encoders)
    write_report(open_store(shared))
    page = (shared / "report.html").read_text()
    assert all(f"{name}" in page for name in (*names, llama.name, tuned.name))


def test_a_run_of_the_other_model_under_the_same_name_is_refused(
    tmp_path: Path, both: Store, llama: Path, tuned: Path
) -> None:
    shared = shutil.copytree(both.path, tmp_path / "both")
    trained(shared, "sae", llama)
    with pytest.raises(StoreMismatch, match=r"harvests\.resid_post\.1"):
        trained(shared, "sae", tuned)


def test_a_dictionary_is_not_evaluated_on_the_other_models_activations(
    tmp_path: Path, both: Store, names: list[str], llama: Path, tuned: Path
) -> None:
    shared = shutil.copytree(both.path, tmp_path / "both")
    trained(shared, "sae", llama)
    dictionary = DictionarySettings(name="sae", input=SITE, latents=64)
    with pytest.raises(StoreMismatch) as refused:
        plan_evaluations(
            open_store(shared).for_model(names[1]),
            ModelSettings(id=str(tuned), dtype="float32"),
            HarvestSettings(sites=tuple(SITES)),
            TrainSettings(dictionaries=(dictionary,)),
            (),
            EvaluateSettings(),
        )
    assert all(name in str(refused.value) for name in names)


def test_anchors_of_the_other_model_under_the_same_name_are_refused(
    tmp_path: Path, both: Store, names: list[str]
) -> None:
    store = open_store(shutil.copytree(both.path, tmp_path / "both"))
    settings = AnchorSettings(name="languages", by=("language",), min_rows=10)
    first = anchors(store.for_model(names[0]), settings, [SITE]).anchors.vectors[SITE]
    with pytest.raises(StoreMismatch, match="languages"):
        anchors(store.for_model(names[1]), settings, [SITE])
    np.testing.assert_array_equal(read_anchors(store.for_model(names[0]), "languages").vectors[SITE], first)
    dictionary = DictionarySettings(name="anchored", input=SITE, latents=64, anchors="languages")
    settings_of_run = TrainSettings(rows=8192, batch_rows=512, threads=1, dictionaries=(dictionary,))
    assert plan_training(store.for_model(names[0]), settings_of_run).dictionaries
    with pytest.raises(StoreMismatch, match=r"'languages' at resid_post\.1 were made from another model's rows"):
        plan_training(store.for_model(names[1]), settings_of_run)


def test_a_crosscoder_over_both_models(tmp_path: Path, both: Store, names: list[str], llama: Path) -> None:
    """Shared latents have one decoder in both models, up to each one's scale; no model alone can run it."""
    store = open_store(shutil.copytree(both.path, tmp_path / "both"))
    sites = tuple(f"{model}/{SITE}" for model in names)
    dictionary = DictionarySettings(
        name="diff",
        input=sites,
        latents=64,
        shared_latents=24,
        activation=ActivationSettings(kind="batch_topk", k=4),
        learning_rate=0.01,
    )
    settings = TrainSettings(rows=65_536, batch_rows=512, threads=1, dictionaries=(dictionary,))
    Trainer(plan_training(store, settings)).train()
    trained = load_dictionary(store.path / "runs" / "diff", input=sites)
    for name in names:
        load_dictionary(store.path / "runs" / "diff", model=name)
    first, second = torch.nn.functional.normalize(trained.W_dec.view(64, 2, 32), dim=2).unbind(1)
    assert (first * second).sum(1)[:24].min() > 1 - 1e-6
    assert (first * second).sum(1)[24:].min() < 0.99
    (plan,) = plan_evaluations(
        store.for_model(names[0]),
        ModelSettings(id=str(llama), dtype="float32"),
        HarvestSettings(sites=tuple(SITES)),
        settings,
        (),
        EvaluateSettings(rows=500, contexts=8),
    )
    found = evaluate(plan)
    assert found["loss"] is None
    assert 0 < found["fvu"] < 0.9
    write_report(store)
    assert f"{sites[0]}, {sites[1]}" in (store.path / "report.html").read_text()
    # What is None for such a dictionary is so for all that read it: the report above, and the status.
    record = status_record(store)
    assert record["runs"][0]["evaluation"]["loss"] is None
    assert f"run       diff: trained; FVU {found['fvu']:.3f}" in status_text(record)
    assert "no loss to recover (it is over several models)" in status_text(record)


def diff_spec(lab: Lab, model: Path, sites: list[str]) -> Path:
    """A spec of one of the models whose dictionary is over sites of both."""
    diff = {"name": "diff", "input": sites, "latents": 64, "activation": {"k": 4}}
    changes = {
        "model.id": str(model),
        "corpus.holdout": 0.2,
        "harvest.sites": SITES,
        "train": {"rows": 2048, "batch_rows": 512, "dictionaries": [diff]},
    }
    return lab.spec(changes)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_plan_of_a_model_diff(
    lab: Lab, both: Store, names: list[str], llama: Path, tuned: Path, order: tuple[int, int]
) -> None:
    """Whichever of the two models' specs trains it. Its sites are counted as two of one model would be."""
    shutil.copytree(both.path, lab.store)
    sites = [f"{name}/{SITE}" for name in names]
    record = json.loads(lab.run("plan", diff_spec(lab, (llama, tuned)[order[0]], sites), "--json"))
    assert (record["units_left"], record["sites_to_harvest_first"]) == (0, [])
    within = json.loads(lab.run("plan", diff_spec(lab, llama, SITES), "--json"))
    assert record["requests_per_pass"] == within["requests_per_pass"]
    assert record["bytes"] == within["bytes"]  # of the spec's own sites: the other model's are another harvest's


def test_the_plan_of_a_model_diff_says_what_is_not_harvested(
    lab: Lab, alone: dict[str, Store], names: list[str], llama: Path, tuned: Path
) -> None:
    """Before there is any store, and beside a store of the other model alone."""
    sites = [f"{name}/{SITE}" for name in names]
    for expected in (sites[1:], []):
        record = json.loads(lab.run("plan", diff_spec(lab, llama, sites), "--json"))
        assert record["sites_to_harvest_first"] == expected
        text = plan_text(record)
        assert (f"training also reads {sites[1]}, which is not in the store" in text) == bool(expected)
        if not expected:
            break
        shutil.copytree(alone[tuned.name].path, lab.store)
