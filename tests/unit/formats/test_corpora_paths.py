"""Dotted paths to texts, tokens, messages and labels, in tables and in JSON; keys of folders as labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import plan, read_corpus, store_of

from pipeline.errors import InputError
from storage.errors import StorageError
from storage.sql.conditions import Conditions
from storage.sql.query import sql

Write = Callable[[Path, list[dict[str, Any]]], None]


def as_lines(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, records)))


def as_list(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "c.json").write_text(json.dumps(records))


def as_parquet(folder: Path, records: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(records), folder / "c.parquet", row_group_size=2)


def as_arrow(folder: Path, records: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_file(folder / "c.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)


EVERY = pytest.mark.parametrize("write", [as_lines, as_list, as_parquet, as_arrow])


def texts(contents: list[Any]) -> list[Any]:
    return [c.decode() if isinstance(c, bytes) else c for c in contents]


@EVERY
def test_paths_lead_into_structs(tmp_path: Path, write: Write) -> None:
    chat = [{"role": "user", "content": "hi"}]
    records = [
        {"doc": {"body": {"text": f"t{i}", "ids": [i, 5]}, "chat": chat}, "meta": {"source": s, "n": i, "big": "x"}}
        for i, s in enumerate(["web", "web", "book"])
    ]
    write(tmp_path, records)
    found = read_corpus(tmp_path, "doc.body.text", ["meta.source", "meta.n"])
    assert texts(found.contents) == ["t0", "t1", "t2"]
    assert found.labels == {"meta.source": ["web", "web", "book"], "meta.n": [0, 1, 2]}
    assert read_corpus(tmp_path, "doc.body.ids", kind="tokens").contents == [[0, 5], [1, 5], [2, 5]]
    assert read_corpus(tmp_path, "doc.chat", kind="messages").contents == [chat] * 3


@EVERY
def test_a_name_with_a_dot_wins(tmp_path: Path, write: Write) -> None:
    write(tmp_path, [{"text": "a", "meta.source": "name", "meta": {"source": "path", "a.b": 1, "a": {"b": 2}}}])
    assert read_corpus(tmp_path, labels=["meta.source"]).labels["meta.source"] == ["name"]
    assert read_corpus(tmp_path, labels=["meta.a.b"]).labels["meta.a.b"] == [1]


@EVERY
def test_a_path_that_leads_nowhere_is_told_with_the_names_there_are(tmp_path: Path, write: Write) -> None:
    write(tmp_path, [{"text": "a", "meta": {"url": "u", "n": 1}, "x": 5}] * 3)
    with pytest.raises(InputError, match=r"corpus\.labels: no column 'meta\.source' in .*has .*meta, .*meta\.url"):
        read_corpus(tmp_path, labels=["meta.source"])
    with pytest.raises(InputError, match=r"corpus\.text: no column 'meta\.body' in .*has .*meta\.n"):
        read_corpus(tmp_path, "meta.body")
    with pytest.raises(InputError, match=r"corpus\.labels: no column 'x\.y' in .*it has .*text.*, x"):
        read_corpus(tmp_path, labels=["x.y"])
    with pytest.raises(InputError, match=r"'meta' is .*; (labels are|name one of its fields, as meta\.)"):
        read_corpus(tmp_path, labels=["meta"])


@EVERY
def test_none_on_the_way_is_none(tmp_path: Path, llama: Path, write: Write) -> None:
    write(tmp_path, [{"doc": {"text": "a", "n": 1}}, {"doc": None}, {"doc": {"text": "b", "n": 2}}])
    with pytest.raises(InputError, match=r"'doc\.n' has no value in .*:[12]; fill"):
        read_corpus(tmp_path, "doc.text", ["doc.n"])
    assert plan(tmp_path, llama, text="doc.text").skipped.to_record()["empty"]["count"] == 1


def test_a_key_that_some_lines_lack_is_told_by_line(tmp_path: Path, llama: Path) -> None:
    as_lines(tmp_path, [{"t": {"a": "one"}, "m": {"n": 1}}, {"t": {"b": "two"}, "m": {"n": 2}}, {"t": 5, "m": {}}])
    assert plan(tmp_path, llama, text="t.a").skipped.to_record() == {
        "no key 't.a'": {"count": 2, "first": ["c.jsonl:2", "c.jsonl:3"]}
    }
    as_lines(tmp_path, [{"t": {"a": "one"}, "m": {"n": 1}}, {"t": {"a": "two"}, "m": {}}])
    with pytest.raises(InputError, match=r"'m\.n' has no value in .*c\.jsonl:2"):
        read_corpus(tmp_path, "t.a", ["m.n"])


@pytest.mark.parametrize("kind", ["text", "json", "map"])
def test_paths_lead_into_json_and_maps(tmp_path: Path, kind: str) -> None:
    values = [{"source": "web", "text": "one"}, {"source": "book", "text": "two"}]
    column = {
        "text": pa.array(map(json.dumps, values)),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(map(json.dumps, values))),
        "map": pa.array([list(v.items()) for v in values], pa.map_(pa.string(), pa.string())),
    }[kind]
    pq.write_table(pa.table({"text": ["a", "b"], "meta": column}), tmp_path / "c.parquet")
    found = read_corpus(tmp_path, "meta.text", ["meta.source"])
    assert found.contents == ["one", "two"]
    assert found.labels["meta.source"] == ["web", "book"]
    with pytest.raises(
        InputError, match=r"no column 'meta\.lang' in .*'meta' holds values in which there is no 'lang'"
    ):
        read_corpus(tmp_path, labels=["meta.lang"])
    as_lines(tmp_path, [{"text": "a", "meta": json.dumps(value)} for value in values])
    assert read_corpus(tmp_path / "c.jsonl", labels=["meta.source"]).labels["meta.source"] == ["web", "book"]


def test_labels_are_called_what_the_user_wrote(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "corpus").mkdir()
    records = [{"text": f"the grain of field {i}", "meta": {"source": "web" if i % 3 else "book"}} for i in range(30)]
    as_parquet(tmp_path / "corpus", records)
    store = store_of(tmp_path / "store", tmp_path / "corpus", llama, labels=("meta.source",))
    assert store.info.labels == ["meta.source"]
    assert set(store.documents.column("meta.source").to_pylist()) == {"web", "book"}
    query = 'select "meta.source" as s, count(*) as n from documents group by 1 order by 1'
    assert sql(store, query).fetchall() == [("book", 10), ("web", 20)]
    (rows,) = Conditions(store, ["\"meta.source\" = 'book'"]).rows(0, store.num_rows)
    documents = store.documents.filter(pa.compute.equal(store.documents.column("meta.source"), "book"))
    assert len(rows) == sum(s["row_stop"] - s["row_start"] for s in documents.to_pylist())
    with pytest.raises(StorageError, match=r"meta\.source = 'book'.*\"meta\.source\""):
        Conditions(store, ["meta.source = 'book'"])


def test_keys_of_folders_are_labels(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a", "b", "c"], "lang": ["en", "de", "x y"], "year": [1, 1, 2]})
    frame.to_parquet(tmp_path / "c", partition_cols=["lang", "year"])
    found = read_corpus(tmp_path / "c", labels=["lang", "year"])
    assert dict(zip(texts(found.contents), found.labels["lang"], strict=True)) == {"a": "en", "b": "de", "c": "x y"}
    assert dict(zip(texts(found.contents), found.labels["year"], strict=True)) == {"a": "1", "b": "1", "c": "2"}
    with pytest.raises(InputError, match=r"no column 'month' in .*; it has text"):
        read_corpus(tmp_path / "c", labels=["month"])
    for lang in ("en", "de"):
        (tmp_path / "lines" / f"lang={lang}").mkdir(parents=True)
        (tmp_path / "lines" / f"lang={lang}" / "c.jsonl").write_text('{"text": "a"}\n{"text": "b", "lang": "own"}\n')
        (tmp_path / "texts" / f"lang={lang}").mkdir(parents=True)
        (tmp_path / "texts" / f"lang={lang}" / "c.txt").write_text("a")
    assert read_corpus(tmp_path / "lines", labels=["lang"]).labels["lang"] == ["de", "own", "en", "own"]
    assert read_corpus(tmp_path / "texts", labels=["lang"]).labels["lang"] == ["de", "en"]


def test_a_folder_without_a_value_gives_none(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a", "b"], "lang": ["en", None]})
    frame.to_parquet(tmp_path / "c", partition_cols=["lang"])
    folder = tmp_path / "c" / "lang=__HIVE_DEFAULT_PARTITION__"
    if not folder.exists():  # pandas drops such rows
        (tmp_path / "c" / "lang=en").rename(folder)
    with pytest.raises(InputError, match=r"'lang' has no value in "):
        read_corpus(tmp_path / "c", labels=["lang"])


@pytest.mark.parametrize("path", ["m.", ".m", "m..a", ".", "m.a.", "text.a"])
def test_paths_that_are_none(tmp_path: Path, path: str) -> None:
    records = [{"text": "a", "m": {"a": 1}}]
    for write in (as_parquet, as_lines):
        write(tmp_path, records)
    for name in ("c.parquet", "c.jsonl"):
        with pytest.raises(InputError, match=rf"corpus\.labels: no column '{path}' in "):
            read_corpus(tmp_path / name, labels=[path])
