"""Labels of spans from harvest to page: moments, anchors, queries, evaluation, verify, repair and growing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import start_harvest
from lab import Lab
from spans import ENTITIES, faults, records, stored_values, write_lines

from jobs.report import report_page
from jobs.status import status_record, status_text
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from storage.harvest.log import log_of
from storage.harvest.moments import MomentKey
from storage.read.held_out import values_without_held_out_rows
from storage.read.moments import merged_moments, training_units
from storage.results.anchors import AnchorSet
from storage.store import Store, open_store
from workers.anchors.stage import make_anchors
from workers.check.recompute import Recomputer, find_model, repair_from_rows
from workers.evaluate.evaluator import EvaluationPlan, evaluate
from workers.settings.anchors import AnchorSettings
from workers.settings.dictionaries import DictionarySettings
from workers.settings.experiment import EvaluateSettings, TrainSettings
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

SITES = ("resid_post.1", "mlp_out.0")
OPTIONS: dict[str, Any] = {"labels": ("language", "entities"), "rows_per_unit": 1024, "holdout": 0.3, "context": 32}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines") / "c.jsonl", records(70))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path, lines: Path) -> Store:
    """Harvested; int8 at one site. Not to be written to."""
    place = tmp_path_factory.mktemp("made") / "store"
    harvesting = start_harvest(place, llama, lines, [*SITES, "attn_out.0@int8"], **OPTIONS)
    harvesting.run()
    return open_store(place)


@pytest.fixture
def store(tmp_path: Path, made: Store) -> Store:
    return open_store(shutil.copytree(made.path, tmp_path / "store"))


def of_rows(store: Store) -> np.ndarray:
    return np.array(stored_values(store, "entities"), dtype=object)


def test_the_moments_are_those_of_the_rows(made: Store) -> None:
    assert made.info.num_units > 4
    values = of_rows(made)
    assert 0.1 < np.mean([value is not None for value in values]) < 0.9
    for site in (*SITES, "attn_out.0@int8"):
        x = made.read(site).astype(np.float64)
        moments = merged_moments(made, site, range(made.info.num_units))
        assert {key.value for key in moments if key.label == "entities"} == {*ENTITIES}
        for entity in ENTITIES:
            rows = x[values == entity]
            found = moments[MomentKey(site, "entities", entity)]
            assert found.count == len(rows)
            np.testing.assert_allclose(found.sum, rows.sum(axis=0), rtol=1e-5, atol=1e-3)
            np.testing.assert_allclose(found.sum_squares, (rows**2).sum(axis=0), rtol=1e-5, atol=1e-3)


def test_anchors_by_a_label_of_rows_are_means_and_read_no_activations(store: Store) -> None:
    values = of_rows(store)[: store.info.held_out_start]
    wide = {site: store.read(site).astype(np.float64)[: store.info.held_out_start] for site in SITES}
    for folder in ("activations", "norms"):
        shutil.rmtree(store.path / folder / store.harvests[0].model / SITES[1] / "c", ignore_errors=True)
    made: AnchorSet = make_anchors(store, AnchorSettings(name="both", by=("entities", "language"), min_rows=10), SITES)
    assert made.labels == ["entities"] * 3 + ["language"] * 2
    assert made.values == [*ENTITIES, "de", "en"]
    assert made.counts[:3] == [int((values == entity).sum()) for entity in ENTITIES]
    for site, x in wide.items():
        means = np.stack([x[values == entity].mean(axis=0) - x.mean(axis=0) for entity in ENTITIES])
        np.testing.assert_allclose(made.vectors[site][:3], means, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no label people; it has language, entities"):
        make_anchors(store, AnchorSettings(name="none", by=("people",)), SITES)


def test_conditions_over_a_label_of_rows(store: Store) -> None:
    """The same rows as the label's own subpopulation, and combined with what is known of the document."""
    by = make_anchors(store, AnchorSettings(name="by", by=("entities",), min_rows=10), SITES)
    where = {
        "people": "entities = 'PER'",
        "others": "entities IS NULL",
        "german": "entities = 'LOC' and language = 'de'",
    }
    made = make_anchors(store, AnchorSettings(name="where", where=where, min_rows=10), SITES)
    values = of_rows(store)[: store.info.held_out_start]
    assert made.counts[:2] == [int((values == "PER").sum()), int((values == None).sum())]  # noqa: E711 of each row
    for site in SITES:
        np.testing.assert_allclose(made.vectors[site][0], by.vectors[site][2], rtol=1e-3, atol=1e-4)
    rows = store.sql("select row from rows where entities = 'PER' order by row").fetchall()
    assert [row for (row,) in rows] == np.flatnonzero(of_rows(store) == "PER").tolist()


def test_dictionaries_are_evaluated_on_them_and_the_page_says_it(store: Store, llama: Path) -> None:
    made = make_anchors(store, AnchorSettings(name="entities", by=("entities",), min_rows=10), SITES)
    dictionary = DictionarySettings.model_validate(
        {
            "name": "sae",
            "input": SITES[:1],
            "latents": 16,
            "activation": {"kind": "topk", "k": 4},
            "anchors": "entities",
        }
    )
    Trainer(
        plan_training(store, TrainSettings(rows=2048, batch_rows=512, threads=1, dictionaries=(dictionary,)))
    ).train()
    torch.set_num_threads(1)
    plan = EvaluationPlan(
        store=store.url,
        run="sae",
        anchors=("entities",),
        model=describe_model(str(llama)),
        model_dtype="float32",
        attention="sdpa",
        batch_tokens=512,
        settings=EvaluateSettings(rows=512, contexts=2),
        threads=1,
    )
    evaluation = evaluate(plan)
    values = of_rows(store)[evaluation["row_start"] :][: evaluation["auroc_rows"]]
    assert [(group["label"], group["value"]) for group in evaluation["subpopulations"]] == [
        ("entities", entity) for entity in made.values
    ]
    for group in evaluation["subpopulations"]:
        assert group["rows"] == int((values == group["value"]).sum()) > 0
        assert 0.3 < group["best_auroc"] <= 1
    shown = [context for latent in evaluation["latents"] for context in latent["contexts"]]
    for context in shown:
        value = of_rows(store)[context["row"]]
        assert context["labels"].get("entities") == value
        assert "language" in context["labels"]
    assert any("entities" in context["labels"] for context in shown)
    assert values_without_held_out_rows(store) == {}
    page = report_page(store, "granary report")
    assert "language and entities (of rows, 3 values)" in page
    assert "PER" in page
    record = status_record(store)
    assert record["row_labels"] == {"entities": 3}
    assert "labels    language, entities (of rows, 3 values)" in status_text(record)


def test_values_without_held_out_rows(tmp_path: Path, llama: Path) -> None:
    lines = records(70)
    lines[0]["entities"] = [{"start": 0, "end": 3, "label": "once"}]
    path = write_lines(tmp_path / "c.jsonl", lines)
    outcomes = []
    for seed in range(4):
        store = start_harvest(tmp_path / f"{seed}", llama, path, SITES, seed=seed, **OPTIONS).store
        start = store.documents.filter(store.documents["row_start"].to_numpy() >= store.info.held_out_start)
        lacks = "once" not in of_rows(store)[start["row_start"][0].as_py() :]
        assert values_without_held_out_rows(store) == ({"entities": ["once"]} if lacks else {})
        outcomes.append(lacks)
    assert {*outcomes} == {True, False}


def test_units_are_repaired_and_audited_with_them(store: Store, llama: Path) -> None:
    (harvest,) = store.harvests
    assert faults(store) == []
    moments = sorted((store.path / "moments" / harvest.digest).iterdir())
    content = moments[1].read_bytes()
    moments[1].write_bytes(content[:100] + b"x" + content[101:])
    assert len(faults(store)) == 1
    repair_from_rows(store, harvest, 1, "test")
    assert moments[1].read_bytes() == content
    assert faults(store) == []
    rerunner = Recomputer(store, harvest, find_model(harvest, [(str(llama), "main")]))
    assert list(rerunner.audit(2)) == ["bit-exact"]


def test_a_store_that_grows(tmp_path: Path, store: Store, llama: Path, lines: Path) -> None:
    """As one that was made at once, but for the numbers of values, whose order is that in which they came."""
    later = records(30, seed=5)
    for line in later:
        line["entities"].append({"start": 0, "end": 2, "label": "EARLY"})
    second = write_lines(tmp_path / "d.jsonl", later)
    sites = [*SITES, "attn_out.0@int8"]
    harvesting = start_harvest(store.path, llama, [lines, second], sites, grow=True, **OPTIONS)
    harvesting.run()
    grown = open_store(store.path)
    assert grown.info.values_of_rows == {"entities": [*ENTITIES, "EARLY"]}
    (harvest,) = grown.harvests
    assert len(log_of(grown, harvest).committed()) == grown.info.num_units
    assert faults(grown) == []
    start_harvest(tmp_path / "once", llama, [lines, second], sites, **OPTIONS).run()
    once = open_store(tmp_path / "once")
    assert once.info.values_of_rows == {"entities": ["EARLY", *ENTITIES]}
    assert stored_values(grown, "entities") == stored_values(once, "entities")
    for site in sites:
        ours, theirs = (merged_moments(of, site, training_units(of)) for of in (grown, once))
        assert ours.keys() == theirs.keys()
        for key, found in ours.items():
            assert found.count == theirs[key].count
            np.testing.assert_allclose(found.sum, theirs[key].sum, rtol=1e-6, atol=1e-6)


# ---- refused, with nothing written


@pytest.mark.parametrize(
    ("spans", "corpus", "expected"),
    [
        (
            [{"start": 0, "end": 999, "label": "PER"}],
            {},
            "the corpus gives no rows: its records are left out, 40 for 'ner: a span beyond the end of the content'",
        ),
        ([{"start": 0, "end": 3}], {}, "40 for 'ner: a span without a value'"),
        (["PER", "O"], {}, "corpus.labels: 'ner' is no single value but list<"),
        (
            None,
            {"corpus.labels": ["token"]},
            "corpus.labels: token is a column of Granary's own rows; rename the label",
        ),
        (None, {"corpus.labels": ["row_start"]}, "corpus.labels: row_start is a column of Granary's own"),
    ],
)
def test_labels_of_rows_that_cannot_be(
    lab: Lab, no_ray: None, spans: Any, corpus: dict[str, Any], expected: str
) -> None:
    lines = [{"text": "the grain was carried", "ner": spans, "token": [], "row_start": []} for _ in range(40)]
    write_lines(lab.folder / "c.jsonl", lines)
    spec = lab.spec({"corpus.path": str(lab.folder / "c.jsonl"), "corpus.labels": ["ner"], **corpus})
    for verb in ("plan", "harvest"):
        assert expected in lab.refused(verb, spec)


def test_anchors_by_a_label_that_the_store_has_not(lab: Lab, no_ray: None) -> None:
    write_lines(lab.folder / "c.jsonl", records(40))
    changes = {"corpus.path": str(lab.folder / "c.jsonl"), "corpus.labels": ["entities"]}
    err = lab.refused("harvest", lab.spec({**changes, "anchors": {"name": "a", "by": ["entity"]}}))
    assert "anchors.by: 'entity' is not one of corpus.labels (entities)" in err


def test_a_label_that_no_row_has(tmp_path: Path, llama: Path) -> None:
    """Spans are there, and all empty: a column without values, which is no error until anchors are asked for."""
    lines = [{**line, "entities": []} for line in records(30)]
    start_harvest(tmp_path / "store", llama, write_lines(tmp_path / "c.jsonl", lines), SITES, **OPTIONS).run()
    made = open_store(tmp_path / "store")
    assert made.info.row_labels == [{"label": "entities", "values": []}]
    assert made.sql("select entities, count(*) from rows group by 1").fetchall() == [(None, made.num_rows)]
    assert made.sql("select count(*) from rows where entities = 'PER'").fetchall() == [(0,)]
    assert values_without_held_out_rows(made) == {}
    assert faults(made) == []
    with pytest.raises(InputError, match="no value of entities has at least 10 training rows"):
        make_anchors(made, AnchorSettings(name="none", by=("entities",), min_rows=10), SITES)
    make_anchors(
        made, AnchorSettings(name="null", where={"none": "entities is null and position > 3"}, min_rows=10), SITES
    )
