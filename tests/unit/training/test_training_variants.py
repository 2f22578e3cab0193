"""Dictionaries of several sites through the trainer and the evaluator: rows side by side, anchors, thresholds, loss."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import harvest, write_store
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.sdl.dictionary.activations import BatchTopK
from pipeline.sdl.dictionary.calibration import calibrate
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.files import load_dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.train.trainer import DictionaryTrainer
from storage.errors import StorageError, UncommittedRows
from storage.format.records import Record
from storage.results.runs import open_run
from storage.store import Store, open_store
from workers.evaluate.evaluator import EvaluationPlan, evaluate, first_held_out_row
from workers.settings.anchors import AnchorSettings
from workers.settings.dictionaries import DictionarySettings
from workers.settings.experiment import EvaluateSettings, TrainSettings
from workers.stages import anchors
from workers.tensors import to_torch
from workers.train.plan import DictionaryPlan, plan_training, unfinished
from workers.train.rows import normalisation
from workers.train.trainer import Trainer, anchors_of

SITES = ["mlp_in.0", "mlp_in.1", "mlp_out.0", "mlp_out.1", "resid_post.0", "resid_post.1"]
LATENTS, K = 48, 4
SEED = 3
DICTIONARIES = [
    {
        "name": "crosscoder",
        "input": "resid_post.{0,1}",
        "activation": {"kind": "batch_topk", "k": K},
        "anchors": "languages",
    },
    {
        "name": "cross-layer",
        "input": "mlp_in.{0,1}",
        "output": "mlp_out.{0,1}",
        "cross_layer": True,
        "activation": {"k": K},
        "anchors": {"name": "languages", "sides": "decoder", "control": "random", "distance": "cosine", "weight": 0.5},
    },
    {
        "name": "skip",
        "input": "mlp_in.1",
        "output": "mlp_out.1",
        "skip": True,
        "activation": {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.5},
        "loss": {"l0": 0.01, "l0_target": 6, "prefixes": [8, 24]},
        "resampling": {"at": [0.5], "rows": 512},
        "clip": 5,
        "anchors": "places",
    },
]
PLACES = {"early": "position < 5", "late French": "language = 'fr' and position >= 20"}
SETTINGS = TrainSettings.model_validate(
    {
        "rows": 40_960,
        "batch_rows": 256,
        "seed": SEED,
        "threads": 1,
        "dictionaries": [{"latents": LATENTS, "learning_rate": 0.01, **d} for d in DICTIONARIES],
    }
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> Store:
    store = harvest(tmp_path_factory.mktemp("variants") / "store", llama, corpus, SITES, holdout=0.2, dtype="float32")
    anchors(store, AnchorSettings(name="languages", by=("language",), min_rows=10), SITES)
    anchors(store, AnchorSettings(name="places", where=PLACES, min_rows=10), SITES)
    Trainer(plan_training(store, SETTINGS)).train()
    return store


def normalisation_at(store: Store, sites: Sequence[str]) -> Normalisation:
    return Normalisation.side_by_side([normalisation(store, site) for site in sites])


def evaluation_of(store: Store, run: str, model: Path) -> Record:
    return evaluate(
        EvaluationPlan(
            store=store.url,
            run=run,
            anchors=("languages", "places"),
            model=describe_model(str(model)),
            model_dtype="float32",
            attention="sdpa",
            batch_tokens=512,
            settings=EvaluateSettings(rows=700, contexts=8),
            threads=1,
        )
    )


def settings_of(name: str) -> DictionarySettings:
    return next(d for d in SETTINGS.dictionaries if d.name == name)


@pytest.mark.parametrize("name", [d["name"] for d in DICTIONARIES])
def test_a_trained_dictionary_is_evaluated(store: Store, llama: Path, name: str) -> None:
    curve = open_run(store, name).curve()
    assert curve[-1]["fvu"] < 0.7 * curve[0]["fvu"]
    dictionary = load_dictionary(store.path / "runs" / name, model=str(llama))
    assert dictionary.config.input == settings_of(name).input
    found = evaluation_of(store, name, llama)
    assert 0 < found["fvu"] < 1
    assert len(found["density"]) == dictionary.config.total_latents
    assert list(found["site_fvu"]) == list(dictionary.config.output)
    assert min(found["site_fvu"].values()) <= found["fvu"] <= max(found["site_fvu"].values())
    assert found["loss"]["clean"] < found["loss"]["mean_ablated"] + 1
    assert found["loss"]["spliced"] == pytest.approx(found["loss"]["clean"], rel=0.2)
    assert [group["value"] for group in found["subpopulations"]] == ["de", "en", "fr", *PLACES]
    how = settings_of(name).anchors
    assert how is not None
    for group in found["subpopulations"]:  # the latents of a control are none of the subpopulations'
        assert ("anchor_cosine" in group) == (how.control == "none" and group["anchors"] == how.name)


def test_subpopulations_of_conditions_are_scored_on_the_rows_that_fulfil_them(store: Store, llama: Path) -> None:
    found = evaluation_of(store, "skip", llama)
    start, stop = found["row_start"], found["row_stop"]
    dictionary = load_dictionary(store.path / "runs" / "skip")
    codes = dictionary.encode(to_torch(store.read("mlp_in.1", slice(start, stop))).float())
    for number, (group, condition) in enumerate(zip(found["subpopulations"][3:], PLACES.values(), strict=True)):
        rows = store.sql(
            f"select row from rows join documents using (document) where ({condition}) and row between {start} and "
            f"{stop - 1}"
        ).fetchall()
        belongs = torch.zeros(stop - start, dtype=torch.bool)
        belongs[[row - start for (row,) in rows]] = True
        assert group["rows"] == int(belongs.sum()) > 5
        assert group["anchored_latent"] == number
        inside, outside = codes[belongs, number], codes[~belongs, number]
        above = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
        assert group["anchored_auroc"] == pytest.approx(above.mean().item())


def test_the_threshold_gives_the_asked_l0_on_held_out_rows(store: Store) -> None:
    dictionary = load_dictionary(store.path / "runs" / "crosscoder")
    start = store.info.held_out_start
    x = torch.cat(
        [to_torch(store.read(s, slice(start, store.num_rows))).float() for s in dictionary.config.input], dim=1
    )
    assert int((dictionary.encode(x) > 0).sum()) == K * len(x)
    assert start <= first_held_out_row(store)


def test_each_layer_of_a_cross_layer_transcoder_has_its_latents(store: Store) -> None:
    dictionary = load_dictionary(store.path / "runs" / "cross-layer")
    assert [tuple(b.W_dec.shape) for b in dictionary.each_block()] == [(LATENTS, 64), (LATENTS, 32)]
    assert dictionary.config.total_latents == 2 * LATENTS
    assert all((b.W_dec.norm(dim=1) > 0).all() for b in dictionary.each_block())


@pytest.mark.parametrize("name", [d["name"] for d in DICTIONARIES])
def test_the_weights_are_those_of_training_on_the_stream_by_hand(store: Store, name: str) -> None:
    """To the bit: columns in the order of the spec, the store's own moments, its anchors."""
    (plan,) = [d for d in plan_training(store, SETTINGS).dictionaries if d.name == name]
    norms = [normalisation_at(store, sites) for sites in (plan.config.input, plan.config.output)]
    given = None if plan.anchors is None else anchors_of(store, plan.anchors, plan.config, SEED)
    trainer = DictionaryTrainer(Dictionary(plan.config), replace(plan.training, seed=SEED), *norms, given)
    sites = dict.fromkeys((*plan.config.input, *plan.config.output))
    torch.set_num_threads(1)
    for batch in store.stream(list(sites), batch_rows=256, seed=SEED, steps=plan.training.steps):
        x = torch.cat([to_torch(batch[site]) for site in plan.config.input], dim=1)
        y = torch.cat([to_torch(batch[site]) for site in plan.config.output], dim=1)
        trainer.step(x, x if plan.config.is_autoencoder else y)
    found, expected = load_dictionary(store.path / "runs" / name), trainer.result()
    if isinstance(plan.config.activation, BatchTopK):
        rows = [to_torch(store.read(s, slice(store.info.held_out_start, store.num_rows))) for s in plan.config.input]
        calibrate(expected, lambda: [torch.cat(rows, dim=1).float()], trainer.competing())
    weights = expected.state_dict()
    assert weights.keys() == found.state_dict().keys()
    for parameter, weight in found.state_dict().items():
        assert torch.equal(weights[parameter], weight), parameter


def test_what_fails_after_the_last_step_is_not_trained_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A threshold that cannot be set: the run keeps its checkpoint, and so do those after it."""
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    shutil.rmtree(copy / "runs")
    plan = plan_training(open_store(copy), SETTINGS)
    assert plan.dictionaries[0].name == "crosscoder"
    with monkeypatch.context() as patched:
        patched.setattr("workers.train.trainer.calibrate", Mock(side_effect=InputError("nan")))
        with pytest.raises(InputError, match="nan"):
            Trainer(plan).train()
    monkeypatch.setattr(DictionaryTrainer, "step", Mock(side_effect=AssertionError("trained again")))
    Trainer(unfinished(open_store(copy), plan)).train()
    for run in (d["name"] for d in DICTIONARIES):
        for file in ("dictionary.json", "dictionary.safetensors"):
            assert (copy / "runs" / run / file).read_bytes() == (store.path / "runs" / run / file).read_bytes()


def test_the_rows_of_a_threshold_are_asked_for_before_training(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", num_rows=75, rows_per_unit=16, units=[0, 1, 2, 3], held_out_start=64)

    def plan(kind: str) -> None:
        sae = {"name": "new", "input": "resid_post.0", "latents": 16, "activation": {"kind": kind, "k": 2}}
        plan_training(store, TrainSettings.model_validate({"batch_rows": 8, "dictionaries": [sae]}))

    plan("topk")
    with pytest.raises(UncommittedRows, match=r"not harvested for resid_post\.0: 4 "):
        plan("batch_topk")


def test_normalisation_of_several_sites_is_each_ones_own(store: Store) -> None:
    sites = ["resid_post.0", "mlp_out.1"]
    norm = normalisation_at(store, sites)
    x = torch.cat([to_torch(store.read(s, slice(0, store.info.held_out_start))).float() for s in sites], dim=1)
    for part in norm(x).split(32, dim=1):
        torch.testing.assert_close(part.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
        assert part.square().sum(1).mean().item() == pytest.approx(32, rel=1e-4)


def test_vectors_are_needed_only_where_a_side_is_anchored(store: Store, tmp_path: Path) -> None:
    given = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    save_file({"mlp_in.1": given}, tmp_path / "vectors.safetensors")
    anchors(store, AnchorSettings(name="given", vectors=str(tmp_path / "vectors.safetensors")), SITES)

    def plan(sides: str) -> DictionaryPlan:
        transcoder = {"name": "new", "input": "mlp_in.1", "output": "mlp_out.1", "latents": LATENTS}
        keys = {**transcoder, "anchors": {"name": "given", "sides": sides}}
        (found,) = plan_training(store, TrainSettings.model_validate({"dictionaries": [keys]})).dictionaries
        return found

    found = plan("encoder")
    assert found.anchors is not None
    made = anchors_of(store, found.anchors, found.config, 0)
    assert made.decoder is None
    torch.testing.assert_close(made.encoder, given)
    for sides in ("decoder", "both"):
        with pytest.raises(StorageError, match=r"the anchors 'given' do not cover mlp_out\.1"):
            plan(sides)


def test_what_normalisation_was_folded_in_is_kept(store: Store) -> None:
    for name in ("crosscoder", "skip"):
        found = load_file(store.path / "runs" / name / "normalisation.safetensors")
        config = load_dictionary(store.path / "runs" / name).config
        for side, sites in (("input", config.input), ("output", config.output)):
            norm = normalisation_at(store, sites)
            assert torch.equal(found[f"{side}.mean"], norm.mean)
            assert torch.equal(found[f"{side}.scale"], norm.scale)
        assert len(found) == 4


def test_what_cannot_be_trained_is_refused_before_it_begins(store: Store) -> None:
    def plan(**keys: object) -> None:
        dictionary = {"name": "new", "input": "resid_post.0", "latents": LATENTS, **keys}
        plan_training(store, TrainSettings.model_validate({"dictionaries": [dictionary]}))

    with pytest.raises(StorageError, match=r"resid_post\.7 is not in the store"):
        plan(input="resid_post.7")
    with pytest.raises(InputError, match="3 anchors of 'languages' do not fit into 2 latents"):
        plan(latents=2, activation={"k": 1}, anchors="languages")
    with pytest.raises(StorageError, match="elsewhere"):
        plan(anchors="elsewhere")
    with pytest.raises(InputError, match="nothing makes a relu dictionary sparse"):
        plan(activation={"kind": "relu"})
    with pytest.raises(InputError, match="a latent counts as dead after 10,000,000 silent rows, so that none ever"):
        plan(resampling={}, dead_after_rows=10_000_000)  # more rows than there are
