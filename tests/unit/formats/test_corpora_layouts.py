"""Every layout in which Arrow holds texts, token ids, messages and labels says the same, in every kind of file."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import plan, read_corpus, store_of

from pipeline.corpus.formats import parquet as tables
from pipeline.errors import InputError
from storage.sql.query import sql

FILES = ["parquet", "stream", "file"]


def write(folder: Path, kind: str, *, rows: int = 2, **columns: Any) -> Path:
    """Write a table of several row groups or batches."""
    table = pa.table(columns)
    path = folder / ("c.parquet" if kind == "parquet" else "c.arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(path, table.schema) as file:
            file.write_table(table, max_chunksize=rows)
    return path


def runs(values: pa.Array) -> pa.Array:
    """Values in runs: one of each, and then the last once more."""
    ends = [*range(1, len(values)), len(values) + 1]
    return pa.RunEndEncodedArray.from_arrays(pa.array(ends, pa.int32()), values)


def json_array(values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))


# ---- texts

TEXTS = ["one", None, "", "caf\u00e9", "one", "two"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "layout", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "categories"]
)
def test_texts(tmp_path: Path, file: str, layout: str) -> None:
    if layout == "categories":
        column = pa.array(TEXTS).dictionary_encode()
    else:
        column = pa.array([None if t is None else t.encode() for t in TEXTS], pa.binary()).cast(getattr(pa, layout)())
    found = read_corpus(write(tmp_path, file, text=column)).contents
    assert [c if c is None else c.decode() for c in found] == TEXTS


@pytest.mark.parametrize("file", ["stream", "file"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_texts_in_runs(tmp_path: Path, file: str, kind: pa.DataType) -> None:
    column = runs(pa.array(["one", None, "two"]).cast(kind))
    path = write(tmp_path, file, rows=3, text=column, n=runs(pa.array([1, 2, 3])), s=runs(pa.array(["a", "b", "c"])))
    found = read_corpus(path, labels=["n", "s"])
    assert found.contents == [b"one", None, b"two", b"two"]
    assert found.labels == {"n": [1, 2, 3, 3], "s": ["a", "b", "c", "c"]}


@pytest.mark.parametrize("file", FILES)
def test_slices_of_batches(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of a file may be large: it is read slice by slice, in every layout."""
    monkeypatch.setattr(tables, "CHUNK_BYTES", 400)
    number = 60
    ids = [None if i % 7 == 3 else [i, 5, None if i % 5 == 4 else 6] for i in range(number)]
    columns: dict[str, Any] = {
        "fixed": pa.array(ids, pa.list_(pa.int32(), 3)),
        "list": pa.array(ids, pa.list_(pa.int64())),
        "large": pa.array(ids, pa.large_list(pa.int16())),
        "text": pa.array([f"t{i}" for i in range(number)]).dictionary_encode(),
        "n": pa.array(range(number)),
    }
    if file != "parquet":
        columns |= {"views": pa.array(ids, pa.list_view(pa.int64())), "runs": runs(pa.array(range(number - 1)))}
    path = write(tmp_path, file, rows=40, **columns)
    expected = [i for i in ids if i is None or None not in i]
    for name in ("fixed", "list", "large", *(["views"] if file != "parquet" else [])):
        found = read_corpus(path, name, ["n"], kind="tokens")
        assert found.contents == expected, name
        assert found.labels["n"] == [n for n, i in enumerate(ids) if i is None or None not in i]
        assert len(found.broken) == sum(i is not None and None in i for i in ids)
    if file != "parquet":
        assert read_corpus(path, labels=["runs"]).labels["runs"] == [*range(number - 1), number - 2]
    assert read_corpus(path).contents == [f"t{i}".encode() for i in range(number)]


# ---- token ids

IDS = [[5, 6, 7], None, [], [8], [9, None, 9], [5, 6]]
READ = [[5, 6, 7], None, [], [8], [5, 6]]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("layout", ["list_", "large_list", "list_view", "large_list_view"])
def test_token_ids(tmp_path: Path, file: str, kind: str, layout: str) -> None:
    try:
        path = write(tmp_path, file, ids=pa.array(IDS, getattr(pa, layout)(getattr(pa, kind)())))
    except pa.ArrowNotImplementedError:
        pytest.skip("older pyarrow writes no list views into Parquet")
    found = read_corpus(path, "ids", kind="tokens")
    assert found.contents == READ
    assert found.broken == [(path.name, 4, "a token id is missing")]


@pytest.mark.parametrize("file", FILES)
def test_token_ids_in_lists_of_one_size(tmp_path: Path, file: str, llama: Path) -> None:
    ids = [[5, 6, 7, 8], None, [5, None, 7, 8], [9, 9, 9, 9], [1, 2, 3, 4]]
    path = write(tmp_path, file, ids=pa.array(ids, pa.list_(pa.int32(), 4)))
    found = read_corpus(path, "ids", kind="tokens")
    assert found.contents == [ids[0], None, ids[3], ids[4]]
    assert found.broken == [(path.name, 2, "a token id is missing")]
    table = plan(path, llama, tokens="ids")
    assert table.sizes.rows == 12
    assert {reason: about["first"] for reason, about in table.skipped.to_record().items()} == {
        "a token id is missing": [f"{path.name}:2"],
        "empty": [f"{path.name}:1"],
    }


@pytest.mark.parametrize("file", ["stream", "file"])
def test_token_ids_in_categories_and_runs(tmp_path: Path, file: str) -> None:
    lists = pa.array([[5, 6], [7, None], None, [8]], pa.list_(pa.int64()))
    offsets = pa.array([0, 2, 2, 4, 5])
    values = pa.array([5, 6, 7, 7, 7])
    columns = {
        "runs": runs(lists.take(pa.array([0, 1, 2]))),
        "of_categories": pa.ListArray.from_arrays(offsets, values.dictionary_encode()),
        "of_runs": pa.ListArray.from_arrays(offsets, runs(values.slice(0, 4))),
    }
    path = write(tmp_path, file, **columns)
    assert read_corpus(path, "runs", kind="tokens").contents == [[5, 6], None, None]
    assert len(read_corpus(path, "runs", kind="tokens").broken) == 1
    for name in ("of_categories", "of_runs"):
        assert read_corpus(path, name, kind="tokens").contents == [[5, 6], [], [7, 7], [7]]


def test_a_missing_id_leaves_out_one_record_and_not_its_chunk(tmp_path: Path, llama: Path) -> None:
    """Line 10 of the inputs that people bring; and the same in JSON."""
    ids = [[5, i + 6, 7] if i != 4 else [5, None, 7] for i in range(10)]
    pq.write_table(pa.table({"ids": ids, "n": [None if i == 4 else i for i in range(10)]}), tmp_path / "c.parquet")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "c.jsonl").write_text("\n".join(f'{{"ids": {i}}}' for i in ids).replace("None", "null"))
    table = plan(tmp_path / "c.parquet", llama, tokens="ids", labels=("n",))  # what is left out needs no label
    assert table.sizes.documents == 9
    assert table.skipped.to_record() == {"a token id is missing": {"count": 1, "first": ["c.parquet:4"]}}
    assert plan(tmp_path / "lines", llama, tokens="ids").skipped.to_record() == {
        "a token id is missing": {"count": 1, "first": ["c.jsonl:5"]}
    }


@pytest.mark.parametrize("kind", [pa.uint64(), pa.int64(), pa.uint32(), pa.int32()])
@pytest.mark.parametrize("value", [2**63 + 5, 2**32 + 5, 2**31 + 5, -(2**32) + 5, 400])
def test_ids_are_never_wrapped(tmp_path: Path, llama: Path, kind: pa.DataType, value: int) -> None:
    try:
        column = pa.array([[5], [6, value]], pa.list_(kind))
    except (pa.ArrowInvalid, OverflowError):
        pytest.skip("no such value of this type")
    path = write(tmp_path, "parquet", ids=column)
    with pytest.raises(InputError, match=rf"c\.parquet:1 of .*: token id {value} is outside the model's vocabulary"):
        plan(path, llama, tokens="ids")


# ---- messages

CHATS: list[Any] = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    None,
    [],
    [{"role": "user", "content": None}],
]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def chat_columns() -> dict[str, pa.Array]:
    """Columns that hold CHATS."""
    texts = [None if chat is None else json.dumps(chat) for chat in CHATS]
    messages = [None if m is None else json.dumps(m) for chat in CHATS for m in chat or []]
    lists = pa.array(CHATS, pa.list_(MESSAGE))
    by_key = [None if c is None else {key: [m[key] for m in c] for key in ("role", "content")} for c in CHATS]
    strings = pa.list_(pa.string())
    as_map = [None if c is None else [list(m.items()) for m in c] for c in CHATS]
    roles = pa.array([m["role"] for chat in CHATS for m in chat or []]).dictionary_encode()
    content = pa.array([m["content"] for chat in CHATS for m in chat or []], pa.large_string())
    return {
        "list": lists,
        "large_list": pa.array(CHATS, pa.large_list(MESSAGE)),
        "text": pa.array(texts),
        "text_view": pa.array(texts, pa.string_view()),
        "bytes": pa.array([None if t is None else t.encode() for t in texts], pa.binary()),
        "text_categories": pa.array(texts).dictionary_encode(),
        "json": json_array(texts),
        "list_of_json": pa.ListArray.from_arrays(lists.offsets, json_array(messages), mask=lists.is_null()),
        "list_of_text": pa.ListArray.from_arrays(lists.offsets, pa.array(messages), mask=lists.is_null()),
        "by_key": pa.array(by_key, pa.struct([("role", strings), ("content", strings)])),
        "maps": pa.array(as_map, pa.list_(pa.map_(pa.string(), pa.string()))),
        "categories_within": pa.ListArray.from_arrays(
            lists.offsets,
            pa.StructArray.from_arrays([roles, content], ["role", "content"]),
            mask=lists.is_null(),
        ),
    }


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("layout", sorted(chat_columns()))
def test_messages(tmp_path: Path, file: str, layout: str) -> None:
    path = write(tmp_path, file, m=chat_columns()[layout])
    found = read_corpus(path, "m", kind="messages").contents
    expected: list[Any] = list(CHATS)
    assert found == expected


@pytest.mark.parametrize("file", ["stream", "file"])
@pytest.mark.parametrize("layout", ["views", "large_views", "fixed", "runs"])
def test_messages_in_layouts_that_only_arrow_has(tmp_path: Path, file: str, layout: str) -> None:
    chats = [c for c in CHATS if c and len(c) == 2] * 3
    column = {
        "views": pa.array(chats, pa.list_view(MESSAGE)),
        "large_views": pa.array(chats, pa.large_list_view(MESSAGE)),
        "fixed": pa.array(chats, pa.list_(MESSAGE, 2)),
        "runs": runs(pa.array(chats[:2], pa.list_(MESSAGE))),
    }[layout]
    assert read_corpus(write(tmp_path, file, m=column), "m", kind="messages").contents == chats


def test_messages_as_datasets_writes_them(tmp_path: Path) -> None:
    """Line 7: messages that differ in their keys become Arrow's JSON type, as a whole or in their content."""
    chats: list[Any] = [
        [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {"role": "assistant", "content": "5"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
        [{"role": "user", "content": '{"a": 1}'}, {"role": "assistant", "content": "plain [text"}],
    ]
    made = datasets.Dataset.from_dict({"messages": chats}, on_mixed_types="use_json")
    assert "extension<arrow.json>" in str(made.features.arrow_schema)
    made.to_parquet(str(tmp_path / "c.parquet"))
    made.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "c.parquet", tmp_path / "saved"):
        assert read_corpus(path, "messages", kind="messages").contents == chats


def test_what_is_said_is_never_read_as_a_number_or_record(tmp_path: Path) -> None:
    """`datasets` leaves a content that is JSON by itself as it is."""
    content = ["5", '{"a": 1}', "[1, 2]", '"quoted"', '[{"type": "text", "text": "x"}]', "null", "no JSON", None]
    column = pa.ListArray.from_arrays(
        pa.array([0, len(content)]), pa.StructArray.from_arrays([json_array(content)], ["content"])
    )
    (found,) = read_corpus(write(tmp_path, "parquet", m=column), "m", kind="messages").contents
    parts = [{"type": "text", "text": "x"}]
    assert [m["content"] for m in found] == ["5", '{"a": 1}', "[1, 2]", "quoted", parts, None, "no JSON", None]


def test_conversations_keep_their_keys(tmp_path: Path) -> None:
    chats = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": None}]]
    assert read_corpus(write(tmp_path, "parquet", c=chats), "c", kind="messages").contents == chats


# ---- labels


@pytest.mark.parametrize("file", FILES)
def test_labels_in_every_layout(tmp_path: Path, file: str, llama: Path) -> None:
    values = ["x", "y", "x"]
    columns: dict[str, Any] = {
        "categories": pa.array(values).dictionary_encode(),
        "large": pa.array(values, pa.large_string()),
        "view": pa.array(values, pa.string_view()),
        "json": json_array(['"x"', "y", '"x"']),
        "inner": pa.array([{"of": v} for v in values]).cast(
            pa.struct([("of", pa.dictionary(pa.int32(), pa.string()))])
        ),
    }
    path = write(tmp_path, file, text=["a b", "c d", "e f"], **columns)
    names = ["categories", "large", "view", "json", "inner.of"]
    assert read_corpus(path, labels=names).labels == dict.fromkeys(names, values)
    schema = plan(path, llama, labels=tuple(names)).schema
    assert not [field for field in schema if field.type not in (pa.string(), pa.large_string())]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, False]),
        pa.array([1.5, float("inf")]),
        pa.array(["1.50", "2.00"]).cast(pa.decimal128(5, 2)),
        pa.array([0, 1], pa.date32()),
        pa.array([0, 1], pa.timestamp("us", "UTC")),
        pa.array([0, 1], pa.timestamp("ns")),
        pa.array([255, 0], pa.uint8()),
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0], pa.int8())),
    ],
)
def test_labels_of_every_type(tmp_path: Path, llama: Path, values: pa.Array) -> None:
    path = write(tmp_path, "parquet", text=["a b", "c d"], n=values)
    assert read_corpus(path, labels=["n"]).labels["n"] == values.to_pylist()
    plain = pa.bool_() if isinstance(values.type, pa.BaseExtensionType) else values.type
    assert plan(path, llama, labels=("n",)).schema.field("n").type == plain


def test_labels_that_sql_does_not_know_are_stored_as_others_or_refused(tmp_path: Path, llama: Path) -> None:
    half = write(tmp_path, "parquet", text=["a b", "c d"], n=pa.array([0.5, 1], pa.float16()))
    store = store_of(tmp_path / "store", half, llama, labels=("n",))
    assert sorted(sql(store, "select n from documents").fetchall()) == [(0.5,), (1.0,)]
    for kind in (pa.decimal256(50, 2), pa.timestamp("us", "Nowhere/Land")):
        values = pa.array([1, 2]).cast(pa.decimal256(50, 2) if pa.types.is_decimal(kind) else kind)
        path = write(tmp_path, "parquet", text=["a b", "c d"], n=values)
        with pytest.raises(InputError, match=r"'n' has values of the type .* in .*c\.parquet:0, which SQL or Python"):
            read_corpus(path, labels=["n"])


def test_identifiers_as_labels_are_texts(tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16)))
    path = write(tmp_path, "parquet", text=["a"], id=column)
    assert read_corpus(path, labels=["id"]).labels["id"] == ["00000000-0000-0000-0000-000000000000"]


# ---- what does not fit


@pytest.mark.parametrize(
    ("kind", "column", "problem"),
    [
        ("text", pa.array([[5]]), r"holds lists of whole numbers \(.*\), not text; name it as corpus\.tokens"),
        ("text", pa.array(CHATS[:1]), r"lists of records with role, content .*, not text; name it as corpus\.messages"),
        ("text", pa.array([{"a": "b"}]), r"holds records with a .*, not text; name one of its fields, as c\.a"),
        ("text", pa.array([1.5]), r"holds numbers with fractions \(double\), not text$"),
        ("text", json_array(['"a"']), r"holds JSON \(.*\), not text"),
        ("text", pa.array([1]).dictionary_encode(), r"holds whole numbers \((dictionary|int64).*\), not text"),
        ("tokens", pa.array([5]), r"holds whole numbers \(int64\), not lists of token ids"),
        ("tokens", pa.array([[1.5]]), r"holds lists of numbers with fractions .*not lists of token ids"),
        ("tokens", pa.array([["5"]]), r"holds lists of text \(.*\), not lists of token ids$"),
        ("tokens", pa.array([[[5]]]), r"holds lists of lists of whole numbers .*not lists of token ids"),
        ("messages", pa.array([[5]]), r"lists of whole numbers .*, not lists of messages.*corpus\.tokens"),
        ("messages", pa.array([True]), r"holds truth values \(bool\), not lists of messages"),
        ("messages", pa.array([{"m": CHATS[0], "n": 1}]), r"records with m, n .*name one of its fields, as c\.m"),
    ],
)
@pytest.mark.parametrize("file", FILES)
def test_columns_of_another_kind(tmp_path: Path, file: str, kind: str, column: Any, problem: str) -> None:
    with pytest.raises(InputError, match=rf"corpus\.{kind}: column 'c' of .* {problem}"):
        read_corpus(write(tmp_path, file, c=column), "c", kind=kind)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["text", "tokens", "messages"])
def test_a_column_of_nulls_gives_empty_records(tmp_path: Path, file: str, kind: str) -> None:
    path = write(tmp_path, file, c=pa.nulls(3), d=pa.array([[], None, []]))
    assert read_corpus(path, "c", kind=kind).contents == [None] * 3
    if kind != "text":
        assert read_corpus(path, "d", kind=kind).contents == [[], None, []]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"has two columns of the name 'text': rename one"):
        read_corpus(tmp_path)
