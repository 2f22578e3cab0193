"""Values of labels that the held-out rows lack: found and said; and the demo's split, which lacks none."""

import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import sentence, write_corpus
from corpora import ensure_rows

from jobs.demo import demo
from jobs.demo.corpus import LABELS, DemoDocument, split_documents, write_documents
from jobs.progress import no_held_out_rows
from jobs.report.harvest_section import _held_out
from storage.read.held_out import values_without_held_out_rows
from storage.store import Store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings


def test_values_that_held_out_rows_lack(tmp_path: Path, llama: Path, corpus: Path) -> None:
    rare = [sentence(random.Random(n), 40) for n in range(40)]
    path = write_corpus(tmp_path / "rare.parquet", rare, topic=["rare" if n == 7 else "common" for n in range(40)])
    settings = {"path": str(path), "labels": ["language", "topic", "year"], "context": 64, "rows_per_unit": 1024}
    model = ModelSettings(id=str(llama), dtype="float32")

    def lacking(name: str, **more: object) -> dict[str, list[str]]:
        store, _ = ensure_rows(tmp_path / name, CorpusSettings.model_validate({**settings, **more}), model)
        found = values_without_held_out_rows(store)
        for label in store.info.labels:  # the same, row by row
            sql = f"select cast({label} as varchar), count(*) filter (row_start >= {store.info.held_out_start}) as n"
            counts = store.sql(f"{sql} from documents group by 1 order by 1").fetchall()
            expected = [value for value, n in counts if not n]
            assert found.get(label, []) == (expected if store.info.held_out_start < store.num_rows else [])
        return found

    outcomes = [lacking(f"seed {seed}", holdout=0.3, seed=seed) for seed in range(6)]
    assert {"topic": ["rare"]} in outcomes
    assert {} in outcomes
    assert lacking("nothing held out", holdout=0.0) == {}


def test_the_sentence() -> None:
    assert no_held_out_rows({"kind": ["docs"]}) == "no held-out rows of kind docs"
    found = no_held_out_rows({"kind": ["docs"], "package": list("abcdefg")})
    assert found == "no held-out rows of kind docs; of package a, b, c, d, e and 2 more"


def test_a_report_says_it(harvested: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "jobs.report.harvest_section.values_without_held_out_rows", lambda store: {"language": ["<de>"]}
    )
    assert "no held-out rows of language &lt;de&gt;, of which nothing can be measured" in _held_out(harvested, 5)


# ---- the demo


def made_up(kinds: dict[str, int], packages: dict[str, int], characters: int) -> list[DemoDocument]:
    names = [name for name, number in kinds.items() for _ in range(number)]
    of = [name for name, number in packages.items() for _ in range(number)]
    assert len(names) == len(of)
    return [
        DemoDocument(f"{n} " + "x" * (characters - len(str(n)) - 1), kind, package, f"{n}.py")
        for n, (kind, package) in enumerate(zip(names, of, strict=True))
    ]


def test_each_value_is_on_both_sides() -> None:
    documents = made_up({"code": 700, "docs": 3, "comment": 297}, {"big": 500, "small": 2, "middle": 498}, 1000)
    training, held_out = split_documents(documents, characters=100_000, share=0.1)
    for part in (training, held_out):
        for label, values in (("kind", {"code", "docs", "comment"}), ("package", {"big", "small", "middle"})):
            assert {getattr(d, label) for d in part} == values
    assert (len(training), len(held_out)) == (90, 10)
    assert not {*training} & {*held_out}
    assert (training, held_out) == split_documents(documents[::-1], characters=100_000, share=0.1)


def test_a_value_of_one_document_is_trained_on() -> None:
    documents = made_up({"code": 99, "docs": 1}, {"big": 100}, 500)
    training, held_out = split_documents(documents, characters=50_000, share=0.1)
    assert Counter(d.kind for d in training)["docs"] == 1
    assert {d.kind for d in held_out} == {"code"}


def test_the_demo_holds_out_some_of_every_value(tmp_path: Path, library: Path) -> None:
    """The standard library of the Python that runs this, planned by the demo's own spec."""
    documents = [DemoDocument(**record) for record in pq.read_table(library).to_pylist()]
    for name, part in zip(("corpus", "held-out"), split_documents(documents), strict=True):
        write_documents(tmp_path / f"{name}.parquet", part)
    spec = yaml.safe_load((demo.HERE / "demo.yaml").read_text())
    paths = [str(tmp_path / name) for name in spec["corpus"]["path"]]
    settings = CorpusSettings.model_validate({**spec["corpus"], "path": paths})
    model = ModelSettings(id=str(demo.HERE / "model"), dtype="float32")
    store, _ = ensure_rows(tmp_path / "store", settings, model)
    assert values_without_held_out_rows(store) == {}
    assert tuple(store.info.labels) == LABELS
    evaluated = spec["evaluate"]["rows"]
    assert 700_000 < store.num_rows < 820_000
    assert store.num_rows - store.info.held_out_start <= evaluated  # all of them are measured on
    first_of_second_file = store.num_rows - store.info.segments[1]["rows"]
    assert first_of_second_file >= store.info.held_out_start
