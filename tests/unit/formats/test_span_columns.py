"""Labels of spans as row columns of a store: which row has which value, numbers, growing, damage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import ensure_rows, store_of
from spans import TEXT, expected, faults, records, stored_values, write_lines

from pipeline.errors import InputError
from storage.errors import CorruptChunk
from storage.store import Store, open_store
from workers.plan.calls import Cuts
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings


def test_the_value_of_a_row_in_windows_with_bos(tmp_path: Path, llama: Path) -> None:
    """BOS, where it is a row, is in no span; every window's rows have the values of their own characters."""
    lines = records(12, words=60)
    path = write_lines(tmp_path / "c.jsonl", lines)
    store = store_of(tmp_path / "store", path, llama, labels=("entities", "language"), context=32, skip_first=0)
    assert (store.info.labels, list(store.info.values_of_rows)) == (["language"], ["entities"])
    token = store.columns(0, store.num_rows, ["position", "document"])
    values = np.array(stored_values(store, "entities"), dtype=object)
    assert set(values[token["position"] == 0]) == {None}
    sources = store.documents.column("source").to_pylist()
    for number, line in enumerate(lines, 1):
        document = sources.index(f"c.jsonl:{number}")
        given = [(s["start"], s["end"], s["label"]) for s in line["entities"]]
        of_document = values[(token["document"] == document) & (token["position"] > 0)].tolist()
        assert of_document == expected(llama, line["text"], given)
        assert len(of_document) > 64
    assert store.sql("select count(distinct language) from documents").fetchall() == [(2,)]


def test_the_innermost_span_counts_and_of_two_alike_the_later(tmp_path: Path, llama: Path) -> None:
    text = "abcdefgh ij"
    given = [(0, 4, "short"), (0, 11, "long"), (0, 4, "later"), (5, 5, "empty"), (8, 9, "space"), (0, 11, "long")]
    lines = [{"text": text, "ner": [{"start": a, "stop": b, "value": v} for a, b, v in given]}]
    store = store_of(tmp_path / "store", write_lines(tmp_path / "c.jsonl", lines), llama, labels=("ner",))
    pieces = store.sql("select ner, piece from rows join tokens using (token) order by row").fetchall()
    assert "".join(piece for _, piece in pieces) == "abcdefghĠij"
    found = {ner: "".join(piece for value, piece in pieces if value == ner) for ner, _ in pieces}
    assert found["later"].startswith("abcd")
    assert {*found} <= {"later", "long", "space"}  # a token of a space alone is in the span of that space
    assert "Ġi" not in found.get("space", "")


def test_the_table_does_not_depend_on_how_it_is_cut(tmp_path: Path, llama: Path) -> None:
    """Rare values, which only some documents have: of the first rows some are not there, and have no number."""
    lines = records(60, words=30)
    for number, line in enumerate(lines):
        line["entities"].append({"start": 0, "end": 3, "label": f"of {number}"})
    path = write_lines(tmp_path / "c.jsonl", lines)
    stores = [
        store_of(tmp_path / f"store {n}", path, llama, cuts, labels=("entities",), rows=1000)
        for n, cuts in enumerate([Cuts(), Cuts(task_bytes=500, bucket_bytes=700), Cuts(task_bytes=2000)])
    ]
    assert len({store.info.corpus_digest for store in stores}) == 1
    (names,) = {json.dumps(store.info.row_labels) for store in stores}
    values = json.loads(names)[0]["values"]
    assert values == sorted({value for value in stored_values(stores[0], "entities") if value})
    assert 5 < len([value for value in values if value.startswith("of")]) < 40


def test_a_store_without_such_labels_has_the_record_it_had(tmp_path: Path, llama: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", records(4))
    store = store_of(tmp_path / "store", path, llama, labels=("language",))
    root = json.loads((tmp_path / "store" / "zarr.json").read_text())["attributes"]["granary"]
    assert "row_labels" not in root
    assert open_store(tmp_path / "store").info == store.info
    assert sorted(store.columns(0, 5)) == ["context", "document", "position", "token"]


def test_growing_keeps_the_numbers_of_values(tmp_path: Path, llama: Path) -> None:
    """Values that come later have later numbers, whatever their names; the rows there were keep theirs."""
    first, second = records(40), records(40, seed=1)
    for line in second:
        line["entities"] += [{"start": 0, "end": 1, "label": "A first name"}]
    write_lines(tmp_path / "a.jsonl", first)
    write_lines(tmp_path / "b.jsonl", second)
    model = ModelSettings(id=str(llama), dtype="float32")

    def ensure(*files: str, **more: Any) -> Store:
        paths = tuple(str(tmp_path / file) for file in files)
        settings = {"labels": ("entities",), "rows_per_unit": 1024, "context": 64, **more}
        store, _ = ensure_rows(tmp_path / "store", CorpusSettings(path=paths, **settings), model, grow=True)
        return store

    before = ensure("a.jsonl")
    assert before.info.values_of_rows == {"entities": ["LOC", "ORG", "PER"]}
    grown = ensure("a.jsonl", "b.jsonl")
    assert grown.info.values_of_rows == {"entities": ["LOC", "ORG", "PER", "A first name"]}
    assert stored_values(grown, "entities")[: before.num_rows] == stored_values(before, "entities")
    assert "A first name" in stored_values(grown, "entities")
    assert faults(grown) == []
    write_lines(tmp_path / "c.jsonl", [{"text": TEXT, "entities": "PER"}])
    with pytest.raises(InputError, match="'entities' is a list of spans or tokens in some files and a single value"):
        ensure("a.jsonl", "b.jsonl", "c.jsonl")


def test_a_damaged_column_is_found(tmp_path: Path, llama: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", records(20))
    store = store_of(tmp_path / "store", path, llama, labels=("entities",))
    assert faults(store) == []
    chunk = tmp_path / "store" / "corpus" / "label.0" / "c" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    (fault,) = faults(store)
    assert str(fault.place).endswith("corpus/label.0/c/0")
    with pytest.raises(CorruptChunk, match=r"label\.0"):
        open_store(tmp_path / "store").sql("select entities from rows").fetchall()
    chunk.unlink()
    (fault,) = faults(store)
    assert str(fault.place).endswith("corpus/label.0/c/0")
