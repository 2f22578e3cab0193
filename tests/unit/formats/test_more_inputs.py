"""Inputs of the kinds that people bring, tried by hand: parts of contents, records put together, views in columns."""

import gzip
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpora import contexts_of, ids, plan, read_corpus, store_of, with_tokenizer, write

from pipeline.corpus.chats.messages import NO_TEXT, read_chat
from pipeline.corpus.formats import json_files
from pipeline.corpus.formats import json_lines as lines
from pipeline.corpus.formats.open import open_corpus
from pipeline.corpus.formats.records import Columns, label_array
from pipeline.corpus.sources.files import CorpusFile
from pipeline.errors import InputError

STRINGS = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %};{% endfor %}"
)
RECORDS = [{"text": "one two"}, {"text": "three"}, {"text": "four"}]


@pytest.mark.parametrize("template", [STRINGS, PARTS])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], ""),
        ([None], ""),
        ([None, {"type": "text", "text": "hello"}], "hello"),
        ([{"type": "text", "text": None}], ""),
        ([{"type": "text", "text": {"value": "hello", "annotations": []}}], "hello"),
        (["hel", {"type": "text", "text": "lo"}, None], "hello"),
        ({"text": "hello"}, "hello"),
    ],
)
def test_the_text_of_parts(tmp_path: Path, llama: Path, template: str, content: Any, text: str) -> None:
    model = with_tokenizer(tmp_path / "model", llama, lambda t: setattr(t, "chat_template", template))
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    store = store_of(tmp_path / "store", write(tmp_path / "c.jsonl", [{"m": chat}]), model, messages="m")
    assert contexts_of(store) == [[0, *ids(model, f"[user]{text};[assistant]yes;")]]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "content": "hello"},
        {"type": "text", "value": "hello"},
        {"content": "hello"},
        {"type": "text", "text": 5},
        {"type": "text", "text": ["hello"]},
        5,
        ["hello"],
    ],
)
def test_parts_with_their_words_elsewhere_are_left_out(part: Any) -> None:
    """Templates would write the message without them."""
    assert read_chat([{"role": "user", "content": [part]}]) == NO_TEXT


@pytest.mark.parametrize("calls", [[], [None], None])
def test_a_message_that_calls_nothing_keeps_its_content(tmp_path: Path, llama: Path, calls: Any) -> None:
    """Tables give every message a list of calls; some templates then write no content, as Mistral's."""
    template = STRINGS.replace(
        "{{ m.content }}", "{% if m.tool_calls is defined %}CALLS{% else %}{{ m.content }}{% endif %}"
    )
    model = with_tokenizer(tmp_path / "model", llama, lambda t: setattr(t, "chat_template", template))
    chat = [{"role": "user", "content": "hello", "tool_calls": calls}]
    store = store_of(tmp_path / "store", write(tmp_path / "c.jsonl", [{"m": chat}]), model, messages="m")
    assert contexts_of(store) == [[0, *ids(model, "[user]hello;")]]


LAYOUTS = {
    "marks of several files": "\ufeff\ufeff{0}\n\ufeff{1}\n{2}",
    "JSON text sequence": "\x1e{0}\n\x1e{1}\n\x1e{2}\n",
    "no ends of lines": "{0}{1}{2}",
    "blanks between": "{0} {1}\t{2}\n",
    "marks before a list": "\ufeff\ufeff[{0},{1},{2}]",
    "marks between pretty ones": "pretty",
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ending", [".json", ".jsonl.gz"])
@pytest.mark.parametrize("block", [1, 7, lines.BLOCK_BYTES])
def test_records_that_were_put_together(
    tmp_path: Path, llama: Path, name: str, ending: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    monkeypatch.setattr(json_files, "BLOCK_BYTES", block)
    content = LAYOUTS[name]
    for number, record in enumerate(RECORDS):
        content = content.replace(f"{{{number}}}", json.dumps(record))
    if content == "pretty":
        content = "\n\ufeff".join(json.dumps(record, indent=1) for record in RECORDS)
    path = tmp_path / f"c{ending}"
    path.write_bytes(gzip.compress(content.encode()) if ending.endswith("gz") else content.encode())
    store = store_of(tmp_path / "store", path, llama)
    assert store.info.skipped == {}
    assert sorted(contexts_of(store)) == sorted([0, *ids(llama, record["text"])] for record in RECORDS)


@pytest.mark.parametrize("line", ['{"text": "a"} and more', '{"text": "a"}, {"text": "b"}', '{"text": "a"}}'])
def test_a_broken_first_line_is_counted_as_before(tmp_path: Path, llama: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{line}\n{{"text": "three"}}\n')
    assert plan(path, llama).skipped.to_record() == {"broken JSON": {"count": 1, "first": ["c.jsonl:1"]}}


TWO = '{"text": "a"}{"text": "b"}'


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("rest", ['{"text": "three"}\n{broken\n{"text": "four"}\n', '{broken\n\x1e{"text": "three"}'])
def test_two_objects_in_the_first_of_many_lines_are_one_broken_line(
    tmp_path: Path, llama: Path, ending: str, rest: str
) -> None:
    """The other lines are records with the numbers that they have in stores made before; a broken one is counted."""
    path = tmp_path / f"c{ending}"
    text = f"{TWO}\n{rest}".encode()
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    numbers = [number for number, line in enumerate(rest.split("\n"), 2) if "text" in line]
    assert [number for _, number in read_corpus(path).numbers] == numbers
    first = [f"c{ending}:1", f"c{ending}:{2 if rest.startswith('{broken') else 3}"]
    assert plan(path, llama).skipped.to_record() == {"broken JSON": {"count": 2, "first": first}}


def test_such_a_file_is_still_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PIECE_BYTES", 64)
    path = tmp_path / "c.jsonl"
    path.write_text(f"{TWO}\n" + '{"text": "c"}\n' * 30)
    assert len(open_corpus(str(path), Columns("text", "text", ())).pieces()) > 3
    assert read_corpus(path).numbers == [(0, number) for number in range(2, 32)]


def test_two_objects_in_every_line_are_records(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f"{TWO}\n" * 3)
    assert read_corpus(path).contents == ["a", "b"] * 3


VIEW, BYTES = pa.string_view(), pa.binary_view()
NESTED: dict[str, tuple[pa.DataType, list[Any]]] = {
    "lists of views": (pa.list_(VIEW), [["a"], None, ["b", None]]),
    "records of views": (pa.struct([("s", VIEW), ("n", pa.int64())]), [{"s": "a", "n": 1}, None, {"s": None, "n": 2}]),
    "lists of lists": (pa.list_(pa.large_list(BYTES)), [[[b"a"]], [], None]),
    "views of lists of views": (pa.list_view(VIEW), [["a"], [], ["b"]]),
    "fixed lists of views": (pa.list_(VIEW, 2), [["a", "b"], None, ["c", "d"]]),
    "maps of views": (pa.map_(pa.string(), VIEW), [[("k", "a")], [], [("k", "b")]]),
}


@pytest.mark.parametrize("name", NESTED)
def test_columns_with_views_inside_are_kept(tmp_path: Path, llama: Path, name: str) -> None:
    kind, values = NESTED[name]
    table = pa.table({"text": ["a b", "c d", "e f"], "n": pa.array(values, kind), "k": [0, 1, 2]})
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    store = store_of(tmp_path / "store", tmp_path / "c.arrow", llama, columns=("n", "k"))
    found = dict(zip(store.documents["k"].to_pylist(), store.documents["n"].to_pylist(), strict=True))
    assert [found[n] for n in range(3)] == values
    assert len(store.sql("select n from documents").fetchall()) == 3


def test_runs_inside_records_are_kept(tmp_path: Path, llama: Path) -> None:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["x", "y"]))
    table = pa.table({"text": ["a b", "c d", "e f"], "n": pa.StructArray.from_arrays([runs], names=["s"])})
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    store = store_of(tmp_path / "store", tmp_path / "c.arrow", llama, columns=("n",))
    assert sorted(value["s"] for value in store.documents["n"].to_pylist()) == ["x", "x", "y"]


MIXED = {
    "whole and text": (
        [1, "x"],
        r"1 in record 1 and \"x\" in record 2; write all of them as texts, or leave the column",
    ),
    "record and text": ([{"a": 1}, "x"], r"\{\"a\": 1\} in record 1 and \"x\" in record 2; write all of them"),
    "deep": ([{"a": 1}, None, {"a": "x"}], r"in record 1 and \{\"a\": \"x\"\} in record 3"),
    "in one list": ([[1, "a"]], r"is a value whose parts are of different types in .*:1; columns keep what has a type"),
    "large": ([2**70], r"is a whole number of more than 64 bits in .*:1; columns keep what has a type in Parquet"),
}


@pytest.mark.parametrize("name", MIXED)
def test_columns_of_mixed_types_get_advice_for_columns(tmp_path: Path, llama: Path, name: str) -> None:
    values, advice = MIXED[name]
    path = write(tmp_path / "c.jsonl", [{"text": "a b", "n": value} for value in values])
    with pytest.raises(InputError, match=rf"corpus\.columns: 'n' .*{advice}") as caught:
        plan(path, llama, columns=("n",))
    assert "label" not in str(caught.value)


def test_files_that_do_not_agree_on_a_type(tmp_path: Path, llama: Path) -> None:
    write(tmp_path / "0.jsonl", [{"text": "a b", "n": 1}])
    write(tmp_path / "1.jsonl", [{"text": "a b", "n": "x"}])
    with pytest.raises(InputError, match=r"do not agree on a column's type: .*; give it one type in all of them,"):
        plan(tmp_path, llama, columns=("n",))


def test_lists_of_records_that_are_no_messages(tmp_path: Path, llama: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ids": [[{"id": 5}]]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"holds lists of records with id .*, not lists of token ids$"):
        plan(tmp_path, llama, tokens="ids")


@pytest.mark.parametrize("values", [["web", datetime(2026, 1, 2)], [5, b"bytes"], [Decimal("1.5"), "web"]])
def test_values_of_python_that_json_has_not_are_shown(tmp_path: Path, values: list[Any]) -> None:
    """`datasets` gives such values."""
    file, numbers = CorpusFile(str(tmp_path / "c"), 0), np.arange(2)
    with pytest.raises(InputError, match=r"different types in .*: .* in record 0 and .* in record 1; write"):
        label_array("k", values, numbers, file)
