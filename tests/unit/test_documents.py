"""What can be wrong with a corpus, and that nothing of it is dropped without being counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.documents import Skipped, find_files, fingerprint, read_documents
from pipeline.errors import InputError
from pipeline.rows import ContextPolicy, build_rows


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lengths_as_tokens(texts: list[str]) -> list[list[int]]:
    """A tokenizer for tests: one token a character."""
    return [[ord(c) for c in text] for text in texts]


def test_a_path_a_folder_and_a_pattern_name_files_in_order(tmp_path: Path) -> None:
    files = [write(tmp_path / f"part-{i}.parquet", text=["a"]) for i in (2, 0, 1)]
    assert find_files(str(files[0])) == [files[0]]
    assert find_files(str(tmp_path)) == sorted(files)
    assert find_files(str(tmp_path / "part-[01].parquet")) == sorted(files)[:2]


@pytest.mark.parametrize("pattern", ["missing.parquet", "none-*.parquet", "empty"])
def test_no_file_is_an_error(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"corpus\.path: no file matches") as caught:
        find_files(str(tmp_path / pattern))
    assert pattern in str(caught.value)


def test_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    path.write_text("text\nnot parquet, a table of another kind\n")
    with pytest.raises(InputError, match=r"corpus\.parquet cannot be read as Parquet"):
        read_documents([path], "text", [])


def test_a_cut_file_is_not_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=["hello"] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_documents([path], "text", [])


def test_empty_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=pa.array([], pa.string()))
    with pytest.raises(InputError, match="the corpus is empty: 1 file"):
        read_documents([path], "text", [])


def test_a_corpus_of_empty_texts_says_why_it_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=["", " \n", None])
    with pytest.raises(InputError, match="3 empty"):
        read_documents([path], "text", [])


def test_absent_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", body=["a"], language=["en"])
    with pytest.raises(InputError, match=r"corpus\.text: no column 'text' in .*; it has body, language"):
        read_documents([path], "text", [])
    with pytest.raises(InputError, match=r"corpus\.labels: no column 'year'"):
        read_documents([path], "body", ["language", "year"])


@pytest.mark.parametrize("column", [[1, 2], [1.5, 2.5], [["a"], ["b"]], [True, False]])
def test_a_column_that_is_not_text(tmp_path: Path, column: list[Any]) -> None:
    path = write(tmp_path / "corpus.parquet", text=column)
    with pytest.raises(InputError, match=r"corpus\.text: column 'text' of .* holds .*, not text"):
        read_documents([path], "text", [])


def test_label_without_a_value_names_the_label_and_the_first_record(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=["a", "b", "c", "d"], language=["en", "en", None, None])
    with pytest.raises(InputError, match=r"'language' has no value in 2 of 4 records .*the first is record 2\b"):
        read_documents([path], "text", ["language"])


def test_label_without_a_value_across_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    table = pa.table({"text": ["a"] * 10, "language": [*["en"] * 7, None, "en", "en"]})
    pq.write_table(table, path, row_group_size=3)
    with pytest.raises(InputError, match=r"the first is record 7\b"):
        read_documents([path], "text", ["language"])


@pytest.mark.parametrize("label", ["document", "row_start", "row_stop", "source"])
def test_labels_of_our_own_columns_are_refused(tmp_path: Path, label: str) -> None:
    path = write(tmp_path / "corpus.parquet", text=["a"], **{label: ["x"]})
    with pytest.raises(InputError, match=label):
        read_documents([path], "text", [label])


def test_a_label_named_text_does_not_replace_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", body=["what is run"], text=["a label"])
    try:
        documents, _ = read_documents([path], "body", ["text"])
    except InputError:
        return  # refusing is as good
    assert documents.column("text").to_pylist() == ["what is run"]


def test_labels_of_different_types_are_refused(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "0.parquet", text=["a"], year=[1984]),
        write(tmp_path / "1.parquet", text=["b"], year=["x"]),
    ]
    with pytest.raises(InputError, match="do not agree on a label's type"):
        read_documents(files, "text", ["year"])


BAD_UTF8 = [b"good", b"\xff\xfe", b"caf\xc3\xa9", b"cut \xc3", b"\xed\xa0\x80"]


def binary_column() -> pa.Array:
    return pa.array(BAD_UTF8, pa.binary())


def string_column() -> pa.Array:
    offsets = np.cumsum([0, *map(len, BAD_UTF8)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(BAD_UTF8), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(BAD_UTF8))]
    )


@pytest.mark.parametrize("column", [binary_column, string_column])
def test_undecodable_texts_are_counted(tmp_path: Path, column: Any) -> None:
    path = write(tmp_path / "corpus.parquet", text=column(), language=list("abcde"))
    documents, skipped = read_documents([path], "text", ["language"])
    assert documents.column("text").to_pylist() == ["good", "café"]
    assert documents.column("language").to_pylist() == ["a", "c"]
    assert documents.column("source").to_pylist() == ["corpus.parquet:0", "corpus.parquet:2"]
    first = ["corpus.parquet:1", "corpus.parquet:3", "corpus.parquet:4"]
    assert skipped.to_record() == {"undecodable": {"count": 3, "first": first}}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_every_arrow_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "corpus.parquet", text=pa.array([b"one", b"two"], pa.binary()).cast(kind))
    documents, _ = read_documents([path], "text", [])
    assert documents.column("text").to_pylist() == ["one", "two"]


def test_empty_texts_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=["a", "", None, "  \n\t", "b", "", "", ""])
    documents, skipped = read_documents([path], "text", [])
    assert documents.column("text").to_pylist() == ["a", "b"]
    record = skipped.to_record()["empty"]
    assert record["count"] == 6
    assert record["first"] == [f"corpus.parquet:{i}" for i in (1, 2, 3, 5, 6)]


def test_records_of_several_files_keep_their_labels(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{i}.parquet", text=[f"{i}a", "", f"{i}b"], year=[10 * i, 10 * i + 1, 10 * i + 2])
        for i in range(3)
    ]
    documents, _ = read_documents(files, "text", ["year"])
    assert documents.column("text").to_pylist() == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert documents.column("year").to_pylist() == [0, 2, 10, 12, 20, 22]


def test_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", text=["one"])
    b = write(tmp_path / "b.parquet", text=["one"])
    c = write(tmp_path / "c.parquet", text=["two"])
    assert fingerprint([a]) == fingerprint([b])
    assert fingerprint([a]) != fingerprint([c])


def rows_of(texts: list[str], policy: ContextPolicy, max_rows: int | None = None) -> Any:
    documents = pa.table({"text": texts, "source": [f"f:{i}" for i in range(len(texts))]})
    return build_rows(documents, Skipped(), lengths_as_tokens, policy, seed=0, max_rows=max_rows)


def test_documents_too_short_to_give_a_row_are_counted() -> None:
    table = rows_of(["abcdef", "x", "yz", "uvw"], ContextPolicy(context=8, skip_first=3, bos=0))
    assert table.num_rows == 5  # BOS and two tokens of each document are no rows
    assert table.skipped.to_record()["too short to give a row"]["count"] == 2
    assert set(table.skipped.examples["too short to give a row"]) == {"f:1", "f:2"}
    assert sorted(table.documents.column("source").to_pylist()) == ["f:0", "f:3"]


def test_a_corpus_of_short_documents_gives_no_rows() -> None:
    with pytest.raises(InputError, match="every document is too short"):
        rows_of(["x", "yz"], ContextPolicy(context=8, skip_first=3, bos=0))


def test_more_rows_than_there_are() -> None:
    with pytest.raises(InputError, match=r"asks for 1,001 rows and the corpus has 10\b"):
        rows_of(["abcde", "fghij"], ContextPolicy(context=8, skip_first=1, bos=0), max_rows=1001)


def test_as_many_rows_as_there_are() -> None:
    assert rows_of(["abcde", "fghij"], ContextPolicy(context=8, skip_first=1, bos=0), max_rows=10).num_rows == 10


@pytest.mark.parametrize(("context", "skip_first", "bos"), [(1, 0, 0), (1, 1, None), (3, 3, 0), (2, 3, None)])
def test_contexts_without_rows_are_refused(context: int, skip_first: int, bos: int | None) -> None:
    with pytest.raises(InputError, match=r"corpus\.context"):
        ContextPolicy(context, skip_first, bos)
