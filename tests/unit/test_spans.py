"""Labels of spans and tokens: read in every layout, numbered, stored as a row column, shown by a query."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from corpora import plan, store_of
from spans import records, stored_values, write_lines

from pipeline.corpora import spans
from pipeline.errors import InputError
from pipeline.token_labels import MOST_VALUES
from storage.errors import CorruptChunk
from storage.findings import Fault
from storage.store import Store, open_store
from storage.verify import verify
from workers.planning import ensure_store
from workers.settings import CorpusSettings, ModelSettings
from workers.tabling import Cuts

TEXT = "Ada Lovelace met Körner in London"
SPANS = [(0, 12, "PER"), (17, 23, "PER"), (27, 33, "LOC")]


def table_values(store: Store, label: str) -> dict[str, list[str | None]]:
    """Of each document, by its source, the values of its rows."""
    values = np.array(stored_values(store, label), dtype=object)
    document = store.columns(0, store.num_rows, ["document"])["document"]
    sources = store.documents.column("source").to_pylist()
    return {source: values[document == n].tolist() for n, source in enumerate(sources)}


def expected(llama: Path, text: str, given: list[tuple[int, int, str]]) -> list[str | None]:
    """The values of the tokens of a text, character by character: of spans that do not overlap."""
    of_character: dict[int, str] = {at: value for start, stop, value in given for at in range(start, stop)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found: list[str | None] = []
    for start, stop in encoding["offset_mapping"]:
        solid = [at for at in range(start, stop) if not text[at].isspace()] or list(range(start, stop))
        found.append(next((of_character[at] for at in solid if at in of_character), None))
    return found


def faults(store: Store) -> list[Fault]:
    return [finding for finding in verify(store.root) if isinstance(finding, Fault)]


def as_layout(layout: str) -> Any:
    """SPANS as data sets have them."""
    keys = {
        "start end label": ("start", "end", "label"),
        "start stop value": ("start", "stop", "value"),
        "pipeline": ("start", "end", "entity_group"),
        "offsets": ("start_offset", "end_offset", "label"),
    }
    if layout in keys:
        return [dict(zip(keys[layout], span, strict=True)) for span in SPANS]
    if layout == "triples":
        return [list(span) for span in SPANS]
    if layout == "label and value":
        return [{"value": TEXT[a:b], "start": a, "end": b, "label": value} for a, b, value in SPANS]
    if layout == "floats":
        return [{"start": float(a), "end": float(b), "label": value} for a, b, value in SPANS]
    assert layout == "columns"
    starts, ends, values = zip(*SPANS, strict=True)
    return {"start": list(starts), "end": list(ends), "label": list(values), "text": [TEXT[a:b] for a, b, _ in SPANS]}


LAYOUTS = ("start end label", "start stop value", "pipeline", "offsets", "label and value", "floats", "columns")
NOBODY = "nobody met nobody"


@pytest.mark.parametrize("layout", [*LAYOUTS, "triples"])
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_spans_in_every_layout_are_the_same_column(tmp_path: Path, llama: Path, layout: str, format: str) -> None:
    none: Any = {key: [] for key in ("start", "end", "label", "text")} if layout == "columns" else []
    lines = [{"text": TEXT, "ner": as_layout(layout)}, {"text": NOBODY, "ner": none}]
    path = tmp_path / f"c.{format}"
    if format == "jsonl":
        write_lines(path, lines)
    elif layout == "triples":  # Arrow has no lists of mixed types, but JSON
        texts = pa.array([json.dumps(line["ner"]) for line in lines])
        column = pa.ExtensionArray.from_storage(pa.json_(pa.string()), texts)
        pq.write_table(pa.table({"text": [TEXT, NOBODY], "ner": column}), path)
    else:
        pq.write_table(pa.Table.from_pylist(lines), path)
    store = store_of(tmp_path / "store", path, llama, labels=("ner",))
    assert store.info.labels == []
    assert store.info.row_labels == [{"label": "ner", "values": ["LOC", "PER"]}]
    found = sorted(table_values(store, "ner").values(), key=len)
    assert found == [[None] * len(expected(llama, NOBODY, [])), expected(llama, TEXT, SPANS)]
    values = [value for of in found for value in of]
    counts = store.sql("select ner, count(*) n from rows group by 1 order by 1 nulls last").fetchall()
    assert counts == [(value, values.count(value)) for value in ("LOC", "PER", None)]
    assert store.sql("select count(*) from rows where ner = 'LOC'").fetchall() == [(values.count("LOC"),)]


@pytest.mark.parametrize("sequence", ["list of structs", "struct of lists"])
def test_data_sets_of_hugging_face_saved_and_streamed(tmp_path: Path, llama: Path, sequence: str) -> None:
    """A sequence of structs is stored as a struct of sequences; class labels are their numbers."""
    span = {
        "start": datasets.Value("int32"),
        "end": datasets.Value("int32"),
        "label": datasets.ClassLabel(names=["PER", "LOC"]),
    }
    inner = [span] if sequence == "list of structs" else {key: [feature] for key, feature in span.items()}
    features = datasets.Features({"text": datasets.Value("string"), "ner": inner})
    given = as_layout("start end label" if sequence == "list of structs" else "columns")
    if isinstance(given, dict):
        del given["text"]
    made = datasets.Dataset.from_list([{"text": TEXT, "ner": given}] * 2, features=features)
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "named").mkdir()
    made.to_parquet(tmp_path / "named" / "train.parquet")
    numbers = {"PER": "0", "LOC": "1", None: None}
    wanted = [numbers[value] for value in expected(llama, TEXT, SPANS)]
    saved = store_of(tmp_path / "a", tmp_path / "saved", llama, labels=("ner",))
    assert stored_values(saved, "ner") == wanted * 2
    named = store_of(tmp_path / "b", tmp_path / "named", llama, labels=("ner",), format="datasets", rows=len(wanted))
    assert stored_values(named, "ner") == wanted


@pytest.mark.parametrize("kind", ["list", "large_list", "list_view"])
def test_lists_of_every_type(tmp_path: Path, llama: Path, kind: str) -> None:
    of = pa.struct([("start", pa.int32()), ("end", pa.int64()), ("label", pa.large_string())])
    column = pa.array(
        [as_layout("start end label")], getattr(pa, f"{kind}_")(of) if kind == "list" else getattr(pa, kind)(of)
    )
    with (
        pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("text", pa.string()), ("ner", column.type)])) as stream,
    ):
        stream.write_table(pa.table({"text": [TEXT], "ner": column}))
    store = store_of(tmp_path / "store", tmp_path / "c.arrow", llama, labels=("ner",))
    assert stored_values(store, "ner") == expected(llama, TEXT, SPANS)


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


def test_values_of_token_ids(tmp_path: Path, llama: Path) -> None:
    """A list as long as the ids, null for none; the ids' own BOS takes its value with it. Or spans of places."""
    lines = [
        {"ids": [0, 5, 6, 7], "tag": ["BOS", "B", None, "B"], "span": [{"start": 1, "end": 3, "label": 4}]},
        {"ids": [8, 9], "tag": [None, "O"], "span": []},
        {"ids": [10, 11], "tag": ["O"], "span": []},
        {"ids": [12], "tag": None, "span": []},
        {"ids": [13], "tag": ["O"], "span": [{"start": 0, "end": 2, "label": 4}]},
        {"ids": [14], "tag": [None], "span": [{"start": 0, "end": 1, "label": 10}]},
    ]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "c.parquet")
    write_lines(tmp_path / "c.jsonl", lines)
    for file in ("c.parquet", "c.jsonl"):
        store = store_of(tmp_path / f"store of {file}", tmp_path / file, llama, tokens="ids", labels=("tag", "span"))
        rows = store.sql("select token, tag, span from rows order by token").fetchall()
        assert rows == [
            (5, "B", "4"), (6, None, "4"), (7, "B", None), (8, None, None), (9, "O", None), (14, None, "10")
        ]  # fmt: skip
        assert {reason: entry["count"] for reason, entry in store.info.skipped.items()} == {
            f"tag: {spans.UNEVEN}": 2,
            f"span: {spans.BEYOND}": 1,
        }
        assert store.info.values_of_rows == {"tag": ["B", "O"], "span": ["10", "4"]}  # texts


BAD = {
    spans.NO_LIST: [None, "PER", {"a": 1}, 5, ["PER"], [[1, 2]]],
    spans.NO_ENDS: [
        [{"label": "PER"}],
        [{"start": 0, "label": "PER"}],
        [{"start": "0", "end": "3", "label": "PER"}],
        [{"start": 0.5, "end": 3, "label": "PER"}],
        [{"start": True, "end": 3, "label": "PER"}],
        [[0, None, "PER"]],
    ],
    spans.REVERSED: [[{"start": 3, "end": 2, "label": "PER"}]],
    spans.BEYOND: [[{"start": 0, "end": 34, "label": "PER"}], [{"start": -1, "end": 3, "label": "PER"}]],
    spans.NO_VALUE: [
        [{"start": 0, "end": 3, "label": None, "value": "Ada"}],
        [{"start": 0, "end": 3}],
        [[0, 3, None]],
        [[0, 3, float("nan")]],
    ],
    spans.NOT_PLAIN: [[[0, 3, ["PER"]]], [[0, 3, "\ud800"]]],
}


def test_records_with_bad_spans_are_left_out_by_reason(tmp_path: Path, llama: Path) -> None:
    assert len(TEXT) == 33
    lines = [{"text": TEXT, "ner": as_layout("start end label")}]
    lines += [{"text": TEXT, "ner": one} for bad in BAD.values() for one in bad]
    lines += [{"text": TEXT}, {"text": " ", "ner": None}]
    path = write_lines(tmp_path / "c.jsonl", lines)
    store = store_of(tmp_path / "store", path, llama, labels=("ner",))
    assert store.info.num_documents == 1
    assert stored_values(store, "ner") == expected(llama, TEXT, SPANS)
    found = {reason: (entry["count"], entry["first"][0]) for reason, entry in store.info.skipped.items()}
    at, wanted = 2, {"empty": (1, f"c.jsonl:{len(lines)}")}
    for reason, bad in BAD.items():
        wanted[f"ner: {reason}"] = (len(bad) + (reason == spans.NO_LIST), f"c.jsonl:{at}")
        at += len(bad)
    assert found == wanted


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_spans_that_do_not_count_characters_are_found_by_their_own_text(
    tmp_path: Path, llama: Path, format: str
) -> None:
    """Offsets of bytes and of UTF-16, in texts beyond ASCII; white space is not compared."""

    def line(text: str, word: str, unit: str, width: int) -> dict[str, Any]:
        start, stop = (len(text[:at].encode(unit)) // width for at in (text.index(word), text.index(word) + len(word)))
        return {"text": text, "ner": [{"start": start, "end": stop, "label": "PER", "text": word}]}

    lines = [
        line("Körner met Ada there", "Ada", "utf-8", 1),
        line("plain Ada there", "Ada", "utf-8", 1),
        line("😀 met Ada there", "Ada", "utf-16-le", 2),
        line("Körner met Ada there", "Ada", "utf-16-le", 2),
        {"text": "a  b c", "ner": [{"start": 0, "end": 4, "label": "PER", "text": " a b"}]},
        {"text": "a b c", "ner": [{"start": 0, "end": 4, "label": "PER", "text": ""}]},
    ]
    path = tmp_path / f"c.{format}"
    if format == "jsonl":
        write_lines(path, lines)
    else:
        pq.write_table(pa.Table.from_pylist(lines), path)
    first = 1 if format == "jsonl" else 0
    table = plan(path, llama, labels=("ner",))
    assert table.skipped.to_record() == {
        f"ner: {spans.ELSEWHERE}": {"count": 2, "first": [f"c.{format}:{first}", f"c.{format}:{first + 2}"]}
    }


def test_what_cannot_be_a_label_of_rows(tmp_path: Path, llama: Path) -> None:
    good = as_layout("start end label")
    text = write_lines(tmp_path / "c.jsonl", [{"text": TEXT, "Token": good, "ner": good, "NER": "x", "tag": ["O"] * 6}])
    with pytest.raises(InputError, match=r"corpus\.labels: Token is a column of Granary's own rows; rename"):
        plan(text, llama, labels=("Token",))
    with pytest.raises(InputError, match=r"corpus\.labels: ner and NER are one name in SQL"):
        plan(text, llama, labels=("ner", "NER"))
    with pytest.raises(InputError, match=r"'tag' is no single value but list<.*or spans, \{start, stop, value\}"):
        plan(text, llama, labels=("tag",))
    folder = tmp_path / "chat"
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    chats = write_lines(tmp_path / "chats.jsonl", [{"m": [{"role": "user", "content": TEXT}], "ner": good}])
    with pytest.raises(
        InputError, match=r"corpus\.labels: 'ner' is a list of spans in .*chats\.jsonl; spans are places"
    ):
        plan(chats, folder, messages="m", labels=("ner",))


def test_files_that_have_spans_and_files_that_have_one_value(tmp_path: Path, llama: Path) -> None:
    write_lines(tmp_path / "0.jsonl", [{"text": TEXT, "ner": as_layout("start end label")}] * 3)
    write_lines(tmp_path / "1.jsonl", [{"text": TEXT, "ner": "PER"}] * 3)
    for cuts in (Cuts(), Cuts(task_bytes=100, bucket_bytes=100)):
        with pytest.raises(InputError, match="'ner' is a list of spans or tokens in some files and a single value in"):
            plan(tmp_path, llama, cuts, labels=("ner",))


def test_too_many_values_are_refused_with_the_key(tmp_path: Path, llama: Path) -> None:
    def lines(number: int) -> list[dict[str, Any]]:
        return [{"text": "a b c", "id": [{"start": 0, "end": 1, "label": f"id {n}"}]} for n in range(number)]

    path = write_lines(tmp_path / "c.jsonl", lines(MOST_VALUES))
    assert len(plan(path, llama, labels=("id",)).label_names["id"]) == MOST_VALUES
    write_lines(path, lines(MOST_VALUES + 1))
    for cuts in (Cuts(), Cuts(task_bytes=10_000, bucket_bytes=10_000)):
        with pytest.raises(
            InputError, match=r"corpus\.labels: the spans of 'id' have more than 4,096 different values"
        ):
            plan(path, llama, cuts, labels=("id",))


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
        store, _ = ensure_store(
            tmp_path / "store",
            CorpusSettings(path=paths, **settings),
            model,
            lambda done, total: None,
            grow=True,
        )
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
