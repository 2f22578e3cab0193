"""Labels of spans and tokens as they are read: in every layout, refused, or left out with the reason."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from corpora import plan, store_of
from spans import SPANS, TEXT, as_layout, expected, stored_values, table_values, write_lines

from pipeline.corpus import spans
from pipeline.corpus.token_labels import MOST_VALUES
from pipeline.errors import InputError
from workers.plan.calls import Cuts

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
            f"tag: {spans.UNEVEN}": 1,
            f"tag: {spans.NULL}": 1,
            f"span: {spans.BEYOND}": 1,
        }
        assert store.info.values_of_rows == {"tag": ["B", "O"], "span": ["10", "4"]}  # texts


BAD = {
    spans.NULL: [None],
    spans.NO_LIST: ["PER", {"a": 1}, 5, ["PER"], [[1, 2]]],
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
        wanted[f"ner: {reason}"] = (len(bad) + (reason == spans.NULL), f"c.jsonl:{at}")
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
    with pytest.raises(InputError, match=r"corpus\.labels: ner is kept already, and SQL does not tell NER from it"):
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
