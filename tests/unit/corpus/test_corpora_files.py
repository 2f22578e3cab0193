"""Finding the files of a corpus, here and at URLs, and telling them apart by what is in them."""

import gzip
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import read_corpus

from pipeline.corpus.formats.open import open_corpus
from pipeline.corpus.formats.records import Columns
from pipeline.corpus.sources import files as corpus_files
from pipeline.corpus.sources.files import CorpusFile, find_files, fingerprint
from pipeline.errors import InputError

COLUMNS = Columns("text", "text", ())
ANY = [".parquet", ".jsonl", ".txt"]


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def names(found: list[CorpusFile]) -> list[str]:
    return [file.name for file in found]


def test_a_path_a_folder_and_a_pattern_name_files_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write(tmp_path / f"part-{i}.parquet", text=["a"])
    (tmp_path / ".hidden.parquet").write_text("")
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "part-3.parquet", text=["a"])
    every = ["part-3.parquet", *(f"part-{i}.parquet" for i in range(3))]
    assert names(find_files(str(tmp_path / "part-1.parquet"), ANY)) == ["part-1.parquet"]
    assert names(find_files(str(tmp_path), ANY)) == every
    assert names(find_files(str(tmp_path / "part-[01].parquet"), ANY)) == ["part-0.parquet", "part-1.parquet"]
    assert names(find_files(str(tmp_path / "**" / "*.parquet"), ANY)) == every


@pytest.mark.parametrize("pattern", ["missing.parquet", "none-*.parquet", "empty", "memory://no/such/folder"])
def test_no_file_is_an_error(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"corpus\.path: no file matches") as caught:
        find_files(pattern if "://" in pattern else str(tmp_path / pattern), ANY)
    assert pattern in str(caught.value)


def test_files_at_a_url_are_read_as_local_ones_are(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=["one", "two"], year=[1, 2])
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.parquet", (tmp_path / "a.parquet").read_bytes())
    memory.pipe("/corpus/deep/b.jsonl", (tmp_path / "b.jsonl").read_bytes())
    try:
        assert read_corpus("memory://corpus/a.parquet", labels=["year"]) == read_corpus(
            tmp_path / "a.parquet", labels=["year"]
        )
        assert read_corpus("memory://corpus/*/*.jsonl").contents == ["three"]
        assert read_corpus("memory://corpus/deep").contents == ["three"]
        remote, local = (
            open_corpus(str(p), COLUMNS).files for p in ("memory://corpus/a.parquet", tmp_path / "a.parquet")
        )
        assert fingerprint(remote) == fingerprint(local)
        memory.pipe("/corpus/a.parquet", b"cut")
        with pytest.raises(InputError, match=r"memory://.*a\.parquet cannot be read as Parquet"):
            read_corpus("memory://corpus/a.parquet")
    finally:
        memory.rm("/corpus", recursive=True)


def test_a_scheme_nobody_knows() -> None:
    with pytest.raises(InputError, match=r"corpus\.path: nosuch://bucket/x cannot be read"):
        find_files("nosuch://bucket/x", ANY)


def test_fingerprint_follows_content_and_order_and_not_place(tmp_path: Path) -> None:
    found = [
        CorpusFile(str(write(tmp_path / f"{n}.parquet", text=[text])), 0)
        for n, text in enumerate(["one", "one", "two"])
    ]
    one, same, other = [CorpusFile(f.url, Path(f.url).stat().st_size) for f in found]
    assert fingerprint([one]) == fingerprint([same])
    assert fingerprint([one]) != fingerprint([other])
    assert fingerprint([one, other]) != fingerprint([other, one])
    assert fingerprint([one, other])["files"] == 2


def test_fingerprint_of_a_large_file_samples_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "HASHED_WHOLE_BYTES", 1000)
    monkeypatch.setattr(corpus_files, "SAMPLED_BYTES", 100)
    path = tmp_path / "large"
    content = bytes(range(256)) * 100
    path.write_bytes(content)
    before = fingerprint([CorpusFile(str(path), len(content))])
    path.write_bytes(content[:-1] + b"x")
    assert fingerprint([CorpusFile(str(path), len(content))]) != before


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.log").write_text("text\nx\n")
    with pytest.raises(
        InputError,
        match=r"the ending of .*corpus\.log says nothing of its format; known are \.parquet, .*corpus\.format",
    ):
        open_corpus(str(tmp_path / "corpus.log"), COLUMNS)
    (tmp_path / "lines.dat").write_text('{"text": "x"}')
    assert read_corpus(tmp_path / "lines.dat", format="jsonl").contents == ["x"]


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=["one"])
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    with pytest.raises(InputError, match=r"has files of several formats \(.*a\.parquet, .*b\.jsonl\); give a pattern"):
        open_corpus(str(tmp_path), COLUMNS)
    assert read_corpus(tmp_path, format="jsonl").contents == ["two"]
    assert read_corpus(tmp_path / "*.parquet").contents == [b"one"]


@pytest.mark.parametrize("label", ["text", "document", "row_start", "row_stop", "source"])
def test_labels_of_our_own_columns_are_refused(tmp_path: Path, label: str) -> None:
    path = write(tmp_path / "corpus.parquet", body=["a"], **{label: ["x"]})
    with pytest.raises(InputError, match=rf"corpus\.labels: {label} is a column of Granary's own"):
        open_corpus(str(path), Columns("body", "text", (label,)))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("c.csv", r"a table without types: write it as Parquet first, .*read_csv\('c\.csv', all_varchar = true\)"),
        ("c.TSV.gz", "a table without types"),
        ("c.jsonl.xz", r"unpack it first, as with `xz -d c\.jsonl\.xz`, or compress it as \.gz or \.zst"),
        ("c.jsonl.bz2", "unpack it first, as with `bzip2 -d"),
        ("c.tar.gz", "an archive: unpack it first"),
        ("c.feather", "a table of another kind: write it as Parquet first"),
    ],
)
def test_files_of_kinds_that_are_not_read_are_refused_with_advice(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=rf"corpus\.path: .*{name} cannot be read, {advice}"):
        open_corpus(str(tmp_path / name), COLUMNS)


def test_endings_in_upper_case(tmp_path: Path) -> None:
    write(tmp_path / "A.PARQUET", text=["one"])
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "B.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "two"}'))
    assert read_corpus(tmp_path / "lines").contents == ["two"]
    assert read_corpus(tmp_path / "A.PARQUET").contents == [b"one"]
    (tmp_path / "lines" / "B.JSONL.GZ").unlink()
    assert read_corpus(tmp_path).contents == [b"one"]


def test_what_other_tools_leave_beside_their_files(tmp_path: Path) -> None:
    """Spark's marks and sums, pandas' index, Parquet's summaries, empty row groups, files without rows."""
    frame = pandas.DataFrame({"text": ["a", "b"], "n": [1, 2]}, index=[7, 9])
    frame.to_parquet(tmp_path / "part-1.parquet")
    frame.iloc[:0].to_parquet(tmp_path / "part-0.parquet")
    schema = pq.read_schema(tmp_path / "part-1.parquet")
    with pq.ParquetWriter(tmp_path / "part-2.parquet", schema) as writer:
        table = pq.read_table(tmp_path / "part-1.parquet")
        for part in (table.slice(0, 0), table, table.slice(0, 0), table.slice(1)):
            writer.write_table(part)
    pq.write_metadata(schema, tmp_path / "_common_metadata")
    pq.write_metadata(schema, tmp_path / "_metadata")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".part-0.parquet.crc").write_bytes(b"crc")
    found = read_corpus(tmp_path, labels=["n"])
    assert found.contents == [b"a", b"b", b"a", b"b", b"b"]
    assert found.labels["n"] == [1, 2, 1, 2, 2]
    assert found.numbers == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]


def test_a_folder_that_only_looks_like_a_saved_dataset(tmp_path: Path) -> None:
    for content in ("no JSON", "[]", '{"step": 5}', '{"_data_files": [1]}'):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(InputError, match=r"state\.json that is not one of a saved dataset"):
            read_corpus(tmp_path)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"ARROW1\0\0" + bytes(50), b"text", bytes(100)])
def test_an_arrow_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.arrow").write_bytes(content)
    with pytest.raises(InputError, match=r"corpus\.path: .*c\.arrow is damaged"):
        read_corpus(tmp_path / "c.arrow")


def test_labels_that_sql_takes_for_one_are_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path / "c.parquet", body=["a"], lang=["x"], Lang=["y"], Document=["z"]))
    for labels, problem in (
        (("Document",), "document is a column of Granary's own, and SQL does not tell Document from it; rename"),
        (("lang", "Lang"), "lang is kept already, and SQL does not tell Lang from it; rename"),
        (("",), "a column without a name"),
    ):
        with pytest.raises(InputError, match=rf"corpus\.labels: {problem}"):
            open_corpus(path, Columns("body", "text", labels))
    open_corpus(path, Columns("body", "text", ("lang", "lang")))
