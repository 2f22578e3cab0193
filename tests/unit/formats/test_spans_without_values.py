"""Labels that are null: of spans a record is left out, of documents it is an error, however the corpus is cut."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import VOCABULARY, plan, store_of, write
from spans import TEXT, as_layout, faults

from pipeline.corpus import spans
from pipeline.corpus.formats import json_lines as lines
from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.open import Corpus
from pipeline.corpus.formats.records import Chunk, Piece
from pipeline.errors import InputError
from workers.plan import calls
from workers.plan.calls import Cuts, Found, read_pieces
from workers.plan.source import open_source
from workers.plan.table_plan import ALL_KEYS
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

GOOD = as_layout("start end label")
ALL_CUTS = (Cuts(), Cuts(task_bytes=1, bucket_bytes=500))


@pytest.fixture(params=[1, 200, lines.CHUNK_BYTES])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of JSON from one record on."""
    monkeypatch.setattr(lines, "CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("place", ["first", "last", "whole file"])
@pytest.mark.parametrize("layout", ["start end label", "triples", "columns", "in a text"])
def test_null_among_spans_does_not_depend_on_chunks(
    tmp_path: Path, llama: Path, chunk_bytes: int, place: str, layout: str
) -> None:
    good = json.dumps(GOOD) if layout == "in a text" else as_layout(layout)
    with_spans = [{"text": TEXT, "ner": good, "k": "a"}] * 3
    without: list[Any] = [{"text": TEXT, "ner": None, "k": "b"}] * 3 + [{"text": " ", "ner": None, "k": "b"}]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if place == "whole file":
        write(corpus / "0.jsonl", without)
        write(corpus / "1.jsonl", with_spans)
    else:
        write(corpus / "c.jsonl", without + with_spans if place == "first" else with_spans + without)
    for number, cuts in enumerate(ALL_CUTS):
        store = store_of(tmp_path / f"store {number}", corpus, llama, cuts, labels=("ner", "k"))
        counts = {reason: entry["count"] for reason, entry in store.info.skipped.items()}
        assert counts == {f"ner: {spans.NULL}": 3, "empty": 1}
        assert (store.info.labels, store.info.values_of_rows) == (["k"], {"ner": ["LOC", "PER"]})
        assert store.documents["k"].to_pylist() == ["a"] * 3
        assert faults(store) == []


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("values", [["web", None], [None, "web"], [None, None], [None, 5], [None, True]])
def test_null_among_labels_of_documents_is_refused(
    tmp_path: Path, llama: Path, chunk_bytes: int, values: list[Any], ending: str
) -> None:
    path = tmp_path / f"c.{ending}"
    records = [{"text": TEXT, "k": value} for value in values]
    if ending == "jsonl":
        write(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=1)
    number = values.index(None) + (ending == "jsonl")
    for cuts in ALL_CUTS:
        with pytest.raises(InputError, match=rf"corpus\.labels: 'k' has no value in .*c\.{ending}:{number}; fill or"):
            plan(path, llama, cuts, labels=("k",))


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.list_(pa.null()), pa.json_()])
def test_files_of_parquet_with_nothing_but_null(tmp_path: Path, llama: Path, kind: pa.DataType) -> None:
    storage = pa.nulls(2, getattr(kind, "storage_type", kind))
    nulls = pa.ExtensionArray.from_storage(kind, storage) if isinstance(kind, pa.BaseExtensionType) else storage
    pq.write_table(pa.table({"text": [TEXT] * 2, "ner": nulls}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": [TEXT], "ner": [GOOD]}), tmp_path / "1.parquet")
    table = plan(tmp_path, llama, labels=("ner",))
    entry = {"count": 2, "first": ["0.parquet:0", "0.parquet:1"]}
    assert table.skipped.to_record() == {f"ner: {spans.NULL}": entry}


@pytest.mark.parametrize("odd", [[None], [None, GOOD[0]], {"start": None, "end": None, "label": None}])
def test_null_within_spans_does_not_depend_on_chunks(tmp_path: Path, llama: Path, chunk_bytes: int, odd: Any) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"text": TEXT, "ner": odd}, {"text": TEXT, "ner": GOOD}])
    table = plan(corpus, llama, labels=("ner",))
    assert table.skipped.to_record() == {f"ner: {spans.NO_LIST}": {"count": 1, "first": ["c.jsonl:1"]}}


def test_values_of_token_ids_that_are_all_empty(tmp_path: Path, llama: Path, chunk_bytes: int) -> None:
    """An empty list says of no token what it is, among others and by itself; null leaves the record out."""
    tagged = [{"ids": [5, 6], "tag": ["B", None]}] * 2
    others = [{"ids": [7, 8], "tag": []}, {"ids": [7, 8], "tag": [None, None]}, {"ids": [7, 8], "tag": None}]
    for number, records in enumerate([tagged + others, others + tagged]):
        corpus = write(tmp_path / f"{number}.jsonl", records)
        store = store_of(tmp_path / f"store {number}", corpus, llama, tokens="ids", labels=("tag",))
        rows = store.sql("select token, tag from rows order by token").fetchall()
        assert rows == [(5, "B")] * 2 + [(6, None)] * 2 + [(7, None)] * 2 + [(8, None)] * 2
        assert {reason: entry["count"] for reason, entry in store.info.skipped.items()} == {f"tag: {spans.NULL}": 1}


def test_spans_beside_chats_are_refused_at_once(tmp_path: Path, llama: Path) -> None:
    from corpora import with_tokenizer

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = with_tokenizer(tmp_path / "model", llama, lambda tokenizer: setattr(tokenizer, "chat_template", template))
    corpus = write(tmp_path / "c.jsonl", [{"m": [{"role": "user", "content": TEXT}], "k": None}])
    with pytest.raises(InputError, match=r"corpus\.labels: 'k' has no value in .*c\.jsonl:1"):
        plan(corpus, model, messages="m", labels=("k",))


@pytest.mark.parametrize("values", [["web", None], [None, "web"]])
def test_a_label_of_documents_that_is_null_is_refused_before_all_is_read(
    tmp_path: Path, llama: Path, values: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 1)
    corpus = write(tmp_path / "c.jsonl", [{"text": TEXT, "k": value} for value in [*values, *["web"] * 500]])
    whole, taken = Corpus.chunks, []

    def counted(self: Corpus, piece: Piece) -> Iterator[Chunk]:
        for chunk in whole(self, piece):
            taken.append(len(chunk.numbers))
            yield chunk

    monkeypatch.setattr(Corpus, "chunks", counted)
    with pytest.raises(InputError, match=rf"'k' has no value in .*c\.jsonl:{1 + values.index(None)}; fill or"):
        plan(corpus, llama, labels=("k",))
    assert len(taken) < 150  # of which the most are for a look at contents, before anything is planned


def stream(monkeypatch: pytest.MonkeyPatch, nulls: int, value: Any) -> list[int]:
    """Let a stream give so many records without a label, and then `value` without end. Returns what it gave."""
    given: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        while True:
            given.append(len(given))
            yield {"text": TEXT, "k": None if len(given) <= nulls else value}

    endless = datasets.iterable_dataset.ExamplesIterable(lambda: enumerate(records()), {})
    monkeypatch.setattr(NamedDataset, "_open", lambda self: datasets.IterableDataset(endless))
    monkeypatch.setattr(calls, "MOST_UNTOLD", 1000)
    return given


def test_a_stream_without_any_value_of_a_label_ends(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = stream(monkeypatch, 10**9, None)
    with pytest.raises(
        InputError, match=r"corpus\.labels: 'k' has no value in the first 1,024 records of the dataset d,"
    ):
        plan("d", llama, format="datasets", rows=10, labels=("k",))
    assert len(given) < 1500


def test_spans_that_come_late_in_a_stream_are_waited_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream(monkeypatch, 700, GOOD)
    table = plan("d", llama, format="datasets", rows=10, labels=("k",))
    assert (table.sizes.rows, table.label_names) == (10, {"k": ["PER"]})


def test_a_label_of_documents_that_comes_late_in_a_stream(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = stream(monkeypatch, 512, "web")
    with pytest.raises(InputError, match=r"'k' has no value in d:0; fill or"):
        plan("d", llama, format="datasets", rows=10, labels=("k",))
    assert len(given) < 1500


def test_records_that_are_left_out_count_as_held(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 1)
    path = write(tmp_path / "c.jsonl", [{"text": " "}] * 400)
    source = open_source(CorpusSettings(path=str(path)), ModelSettings(id=str(llama)), VOCABULARY, "main")
    (corpus,) = source.corpora
    assert isinstance(corpus, Corpus)
    given = read_pieces(source.recipe(), corpus, corpus.pieces(), [0, ALL_KEYS], Cuts(task_bytes=2000))
    assert sum(isinstance(found, Found) for found in given) > 5
