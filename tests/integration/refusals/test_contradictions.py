"""A spec against what is there: another store, another model, no store at all, a stage before its turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import harvest, start_harvest, write_corpus
from lab import DICTIONARY, SITE, SITES, TRAIN, Lab, RayStarted, changed, snapshot

from jobs.cli.main import main
from storage.backends.place import open_place
from storage.format.records import encode_zarr, read_record
from storage.store import Store, open_store
from workers.settings.dictionaries import DictionarySettings
from workers.settings.experiment import TrainSettings
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"corpus.context": 32}, "corpus.context: 64 in the store, 32 in the spec"),
        ({"corpus.seed": 3}, "corpus.seed: 0 in the store, 3 in the spec"),
        ({"corpus.rows": 1500}, "corpus.rows: nothing in the store, 1500 in the spec"),
        ({"corpus.labels": ["year"]}, "corpus.labels: ['language', 'year'] in the store, ['year'] in the spec"),
        ({"harvest.dtype": "float32"}, "harvest.dtype: 'bfloat16' in the store, 'float32' in the spec"),
        ({"model.dtype": "bfloat16"}, "model.dtype: 'float32' in the store, 'bfloat16' in the spec"),
        ({"harvest.batch_tokens": 100}, "harvest.batch_tokens: 4096 in the store, 100 in the spec"),
        ({"harvest.attention": "eager"}, "harvest.attention: 'sdpa' in the store, 'eager' in the spec"),
        ({"harvest.threads_per_worker": 2}, "harvest.threads_per_worker: 1 in the store, 2 in the spec"),
        (
            {"corpus.seed": 3, "corpus.context": 32},
            "corpus.context: 64 in the store, 32 in the spec; corpus.seed: 0 in the store, 3 in the spec",
        ),
    ],
)
def test_a_spec_that_contradicts_the_store(stored: Lab, changes: dict[str, Any], expected: str) -> None:
    for verb in ("harvest", "plan", "run"):
        err = stored.refused(verb, stored.spec(changes))
        assert f"{expected}. Give the spec the stored values, or " in err
        assert "another store" in err


def test_another_corpus_than_the_store_s(stored: Lab, texts: list[str]) -> None:
    write_corpus(stored.folder / "other.parquet", texts[1:])
    err = stored.refused("harvest", stored.spec({"corpus.path": "other.parquet"}))
    assert f"the spec contradicts the store at {stored.store}: corpus.path: '1 file(s) of " in err


def test_another_tokenizer_than_the_store_s(stored: Lab, inputs: Path, harvested: Store) -> None:
    other = inputs / "wide-tokenizer"
    err = stored.refused("harvest", stored.spec({"model.tokenizer": str(other)}))
    digest = harvested.info.tokenizer_digest
    assert f"the tokenizer of {other} (" in err
    assert f") is not the one the store was planned with ({digest}): " in err
    assert "Give model.tokenizer the right one, or use another store" in err


def test_a_finished_store_is_found_and_left_as_it_is(stored: Lab) -> None:
    spec = stored.spec()
    stored.run("harvest", spec)  # writes the bitmap of the commits, which the fixture has not
    before = snapshot(stored.folder)
    assert "all 4 units of resid_post.1, mlp_in.0, mlp_out.0 are there" in stored.run("harvest", spec)
    assert "(exists; 4 of 4 units have all that the spec asks for)" in stored.run("plan", spec)
    assert snapshot(stored.folder) == before


@pytest.fixture
def two_models(stored: Lab, make_model: Callable[..., Path], corpus: Path) -> tuple[Lab, Store]:
    """The store with the same sites of a second model, whose folder has the same name and other weights."""
    before = snapshot(stored.store)
    start_harvest(stored.store, make_model("llama", seed=1), corpus, SITES).run()
    after = snapshot(stored.store)
    assert {name: after[name] for name in before} == before
    return stored, open_store(stored.store)


def test_another_model_is_another_column_and_no_contradiction(two_models: tuple[Lab, Store], harvested: Store) -> None:
    lab, store = two_models
    first, second = (h.model for h in store.harvests)
    assert first != second
    assert {name.partition("-")[0] for name in (first, second)} == {"llama"}
    assert store.sites == [f"{model}/{site}" for model in (first, second) for site in SITES]
    np.testing.assert_array_equal(store.read(f"{first}/{SITE}"), harvested.read(SITE))
    assert not np.array_equal(store.read(f"{first}/{SITE}"), store.read(f"{second}/{SITE}"))
    assert "are there" in lab.run("harvest", lab.spec())
    out = lab.run("status", lab.store)
    for model in (first, second):
        assert f"resid_post.1, mlp_in.0, mlp_out.0 of {model}, bfloat16 x 32" in out
    fetch = ("query", lab.store, "select 5 as row", "--out", lab.folder / "x.npy", "--site")
    assert f"name one of {first}/{SITE}, {second}/{SITE}" in lab.refused(*fetch, SITE)
    lab.run(*fetch, f"{second}/{SITE}")
    np.testing.assert_array_equal(np.load(lab.folder / "x.npy"), store.read(f"{second}/{SITE}", [5]).astype(np.float32))


def test_a_spec_trains_on_its_own_model_of_a_store_with_two(two_models: tuple[Lab, Store]) -> None:
    """The spec names its model, and cannot write a site as <model>/<site>: there is nothing for it to choose."""
    lab, _ = two_models
    with pytest.raises(RayStarted):
        main(["train", str(lab.spec({"train": TRAIN}))])


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        ("taken", "is not an empty folder (it holds thesis.txt); name another place"),
        ("file", "is a file; a store is a folder"),
        ("file/store", "/file is a file; a store is a folder"),
    ],
)
def test_a_place_that_cannot_become_a_store(lab: Lab, inputs: Path, store: str, expected: str) -> None:
    before = snapshot(inputs)
    err = lab.refused("harvest", lab.spec({"store": store if "://" in store else str(inputs / store)}))
    assert expected in err
    assert snapshot(inputs) == before


def test_commands_that_need_a_store(lab: Lab) -> None:
    spec = lab.spec({"anchors": {"name": "a", "by": "year"}, "train": TRAIN})
    expected = f"granary: no store at {lab.store}: `granary harvest SPEC` makes one\n"
    for verb in ("anchors", "train", "evaluate", "status", "report"):
        assert lab.refused(verb, spec) == expected
    assert lab.refused("status", lab.store) == expected
    assert lab.refused("query", lab.store, "select 1") == expected


def test_commands_whose_section_the_spec_lacks(stored: Lab) -> None:
    for verb, section in {"anchors": "anchors", "train": "train", "evaluate": "train"}.items():
        err = stored.refused(verb, stored.spec())
        assert err == f"granary: the spec has no section {section!r}, which this command runs\n"


def reading_commands(lab: Lab) -> list[tuple[str | Path, ...]]:
    spec = lab.spec()
    return [
        ("status", lab.store),
        ("status", spec),
        ("query", lab.store, "select count(*) from rows"),
        ("report", lab.store),
        ("harvest", spec),
        ("plan", spec),
    ]


def test_a_store_of_another_format(stored: Lab) -> None:
    place = open_place(stored.store) / "zarr.json"
    root = read_record(place)
    root["attributes"]["granary"]["format"] = 2
    place.write(encode_zarr(root))
    for command in reading_commands(stored):
        err = stored.refused(*command)
        assert f"the store at {stored.store} has format 2; this version of Granary reads format 1" in err


def test_a_zarr_group_of_something_else(lab: Lab) -> None:
    lab.store.mkdir()
    (lab.store / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    for command in reading_commands(lab):
        assert f"{lab.store} is a Zarr group but not a Granary store" in lab.refused(*command)


# ---- anchors, training, evaluation


def test_anchors_with_too_few_rows(stored: Lab) -> None:
    err = stored.refused("anchors", stored.spec({"anchors": {"name": "a", "by": "language", "min_rows": 10**6}}))
    assert "anchors.by: no value of language has at least 1000000 training rows" in err
    assert "lower anchors.min_rows or choose another label" in err


def test_anchors_by_a_label_that_the_store_lacks(stored: Lab) -> None:
    err = stored.refused("anchors", stored.spec({"corpus.labels": ["genre"], "anchors": {"name": "a", "by": "genre"}}))
    assert "corpus.labels: ['language', 'year'] in the store, ['genre'] in the spec" in err


def test_anchors_of_the_same_name_made_otherwise(stored: Lab) -> None:
    stored.run("anchors", stored.spec({"anchors": {"name": "a", "by": "language", "min_rows": 10}}))
    err = stored.refused("anchors", stored.spec({"anchors": {"name": "a", "by": "language", "min_rows": 11}}))
    assert "anchors 'a' are in the store, made otherwise: min_rows: 10 in the store, 11 in the spec. Give" in err


@pytest.mark.parametrize("units", [[0], [0, 1, 2, 3]])
def test_anchors_stay_valid_when_another_site_is_harvested_later(
    stored: Lab, llama: Path, corpus: Path, units: list[int]
) -> None:
    """A site that the spec does not name, finished or not, is no reason to refuse what the spec made before."""
    spec = stored.spec({"anchors": {"name": "a", "by": "language", "min_rows": 10}})
    assert "made" in stored.run("anchors", spec)
    start_harvest(stored.store, llama, corpus, ["resid_mid.0"]).run(units)
    assert "are there" in stored.run("anchors", spec)


def test_training_on_anchors_that_are_not_made(stored: Lab) -> None:
    anchored = changed(TRAIN, {"dictionaries": [{**DICTIONARY, "anchors": "a"}]})
    err = stored.refused("train", stored.spec({"anchors": {"name": "a", "by": "language"}, "train": anchored}))
    assert "no anchors named 'a' in " in err
    assert "`granary anchors SPEC` makes" in err


def test_training_on_a_site_that_is_not_stored(stored: Lab) -> None:
    other = changed(TRAIN, {"dictionaries": [{**DICTIONARY, "input": ["resid_mid.0"]}]})
    err = stored.refused("train", stored.spec({"harvest.sites": ["resid_mid.0"], "train": other}))
    assert "resid_mid.0 of " in err
    assert "is not in the store at " in err
    assert "run `granary harvest` first" in err


@pytest.mark.parametrize("verb", ["anchors", "train", "evaluate"])
def test_later_stages_refuse_a_spec_of_another_harvest(stored: Lab, verb: str) -> None:
    sections = {"train": TRAIN, "anchors": {"name": "a", "by": "language", "min_rows": 10}}
    err = stored.refused(verb, stored.spec({"model.dtype": "bfloat16", **sections}))
    assert "model.dtype: 'float32' in the store, 'bfloat16' in the spec" in err
    err = stored.refused(verb, stored.spec({"corpus.context": 32, **sections}))
    assert "corpus.context: 64 in the store, 32 in the spec" in err


def test_a_dictionary_of_the_same_name_with_other_latents(stored: Lab) -> None:
    settings = TrainSettings(**{**TRAIN, "dictionaries": (DictionarySettings(**DICTIONARY),)})
    Trainer(plan_training(open_store(stored.store), settings)).train()
    assert "train: sae is trained" in stored.run("train", stored.spec({"train": TRAIN}))
    other = changed(TRAIN, {"dictionaries": [{**DICTIONARY, "latents": 128}]})
    err = stored.refused("train", stored.spec({"train": other}))
    assert "the run 'sae' is in the store, of another kind: dictionary.latents: 64 in the store, 128 in" in err
    assert "Give the dictionary another name, or the stored values" in err


def test_nothing_is_held_out(lab: Lab, llama: Path, corpus: Path) -> None:
    err = lab.refused("run", lab.spec({"train": TRAIN}))
    assert (
        "corpus.holdout is 0, which leaves no rows to evaluate on: hold some out, or run the stages one by one" in err
    )
    harvest(lab.store, llama, corpus, SITES, rows=1000, holdout=0.5)  # one unit, and no other to hold out
    err = lab.refused("evaluate", lab.spec({"train": TRAIN, "corpus.rows": 1000, "corpus.holdout": 0.5}))
    assert "the store holds no rows out to evaluate on: corpus.holdout was 0, or all rows are in one unit" in err


def test_evaluating_what_is_not_trained(lab: Lab, llama: Path, corpus: Path) -> None:
    harvest(lab.store, llama, corpus, SITES, holdout=0.25)
    err = lab.refused("evaluate", lab.spec({"train": TRAIN, "corpus.holdout": 0.25}))
    assert "the run 'sae' is not finished; `granary train` goes on with it" in err


def test_a_context_longer_than_the_model_has_positions(lab: Lab) -> None:
    err = lab.refused("harvest", lab.spec({"corpus.context": 10**6}))
    assert "corpus.context: 1000000 tokens are more than the " in err
