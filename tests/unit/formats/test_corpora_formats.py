"""Every format gives its records, whole and once; what is wrong with a file is said, or counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import plan, read_corpus

from pipeline.corpus.formats import json_lines as lines
from pipeline.corpus.formats import parquet as tables
from pipeline.corpus.formats import records
from pipeline.errors import InputError
from workers.plan.table_plan import TablePlan


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def skipped(table: TablePlan) -> dict[str, Any]:
    return table.skipped.to_record()


# ---- Parquet


def test_parquet_is_read_by_row_groups_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CHUNK_BYTES", 2000)
    texts = [f"{i} " * (i % 40) for i in range(500)]
    pq.write_table(pa.table({"text": texts, "n": list(range(500))}), tmp_path / "c.parquet", row_group_size=70)
    found = read_corpus(tmp_path, labels=["n"])
    assert [c.decode() for c in found.contents] == texts
    assert found.labels["n"] == list(range(500))
    assert found.numbers == [(0, i) for i in range(500)]


@pytest.mark.parametrize("content", [b"text\nnot parquet, a table of another kind\n", None])
def test_not_parquet(tmp_path: Path, content: bytes | None) -> None:
    path = write(tmp_path / "corpus.parquet", text=["hello"] * 100)
    path.write_bytes(content or path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"corpus\.parquet cannot be read as Parquet"):
        read_corpus(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=[f"hello {i}" for i in range(1000)])
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes(500) + whole[550:])
    with pytest.raises(InputError, match=r"corpus\.parquet (is damaged|cannot be read)"):
        read_corpus(path)


def test_absent_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", body=["a"], language=["en"])
    with pytest.raises(InputError, match=r"corpus\.text: no column 'text' in .*; it has body, language"):
        read_corpus(path)
    with pytest.raises(InputError, match=r"corpus\.labels: no column 'year'"):
        read_corpus(path, "body", ["language", "year"])
    with pytest.raises(InputError, match=r"corpus\.tokens: no column 'ids'"):
        read_corpus(path, "ids", kind="tokens")


@pytest.mark.parametrize("column", [[1, 2], [1.5, 2.5], [["a"], ["b"]], [True, False]])
def test_a_column_that_is_not_text(tmp_path: Path, column: list[Any]) -> None:
    path = write(tmp_path / "corpus.parquet", text=column)
    with pytest.raises(InputError, match=r"corpus\.text: column 'text' of .* holds .*, not text"):
        read_corpus(path)


def test_columns_that_are_not_token_ids_or_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=["a"], ids=[[1.5]])
    with pytest.raises(InputError, match=r"corpus\.tokens: column 'ids' of .* not lists of token ids"):
        read_corpus(path, "ids", kind="tokens")
    with pytest.raises(InputError, match=r"corpus\.messages: column 'ids' of .* not lists of messages"):
        read_corpus(path, "ids", kind="messages")


def test_a_label_without_a_value_names_the_label_and_the_record(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"] * 10, "language": [*["en"] * 7, None, "en", "en"]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=3)
    with pytest.raises(InputError, match=r"'language' has no value in .*/c\.parquet:7; fill"):
        read_corpus(tmp_path, labels=["language"])
    (tmp_path / "c.parquet").unlink()
    (tmp_path / "c.jsonl").write_text('{"text": "a", "language": "en"}\n\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"'language' has no value in .*/c\.jsonl:3; fill"):
        read_corpus(tmp_path, labels=["language"])


def test_labels_of_different_types_are_refused(tmp_path: Path, llama: Path) -> None:
    write(tmp_path / "0.parquet", text=["a b"], year=[1984])
    write(tmp_path / "1.parquet", text=["b c"], year=["x"])
    with pytest.raises(InputError, match="do not agree on a column's type"):
        plan(tmp_path, llama, labels=("year",))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.jsonl").write_text('{"text": "a", "year": 1}\n{"text": "b", "year": "x"}\n')
    with pytest.raises(InputError, match="'year' has values of different types"):
        read_corpus(tmp_path / "one", labels=["year"])


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ('"\\ud800"', r"a text with half of a surrogate pair \(no Unicode\) in .*c\.jsonl:3; labels are"),
        (str(2**64), r"a whole number of more than 64 bits in .*c\.jsonl:3; labels are"),
        ("[1, 2]", r"a list in .*c\.jsonl:3; labels are texts, numbers or truth values"),
        ('{"a": 1}', r"a dictionary in .*c\.jsonl:3; labels are"),
    ],
)
def test_labels_that_are_no_scalars_are_refused_with_their_line(tmp_path: Path, label: str, problem: str) -> None:
    (tmp_path / "c.jsonl").write_text(f'{{"text": "a", "n": 1}}\n\n{{"text": "b", "n": {label}}}\n')
    with pytest.raises(InputError, match=rf"corpus\.labels: 'n' is {problem}"):
        read_corpus(tmp_path, labels=["n"])


def test_labels_that_are_lists_everywhere_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c.parquet", text=["a"], n=[[1, 2]])
    with pytest.raises(InputError, match=r"'n' is no single value but list<.*> in .*c\.parquet:0; labels are"):
        read_corpus(tmp_path, labels=["n"])
    (tmp_path / "c.parquet").unlink()
    (tmp_path / "c.jsonl").write_text('{"text": "a", "n": [1]}\n{"text": "b", "n": [2]}\n')
    with pytest.raises(InputError, match=r"'n' is no single value but list<.*> in .*c\.jsonl:1; labels are"):
        read_corpus(tmp_path, labels=["n"])


def test_labels_of_types_that_agree_become_one_type(tmp_path: Path, llama: Path) -> None:
    write(
        tmp_path / "0.parquet",
        text=["a b"],
        year=pa.array([1984], pa.int32()),
        kind=pa.array(["x"]).dictionary_encode(),
    )
    write(
        tmp_path / "1.parquet",
        text=["b c"],
        year=pa.array([1985], pa.int64()),
        kind=pa.array(["y"]).dictionary_encode(),
    )
    assert plan(tmp_path, llama, labels=("year",)).schema.field("year").type == pa.int64()
    assert plan(tmp_path, llama, labels=("kind",)).schema.field("kind").type == pa.string()


BAD_UTF8 = [b"good", b"\xff\xfe", b"caf\xc3\xa9", b"cut \xc3", b"\xed\xa0\x80"]


def binary_column() -> pa.Array:
    return pa.array(BAD_UTF8, pa.binary())


def string_column() -> pa.Array:
    offsets = np.cumsum([0, *map(len, BAD_UTF8)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(BAD_UTF8), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(BAD_UTF8))]
    )


@pytest.mark.parametrize("column", [binary_column, string_column])
def test_undecodable_texts_are_counted(tmp_path: Path, llama: Path, column: Any) -> None:
    path = write(tmp_path / "corpus.parquet", text=column())
    table = plan(path, llama)
    assert table.sizes.documents == 2
    first = ["corpus.parquet:1", "corpus.parquet:3", "corpus.parquet:4"]
    assert skipped(table) == {"undecodable": {"count": 3, "first": first}}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()])
def test_every_arrow_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "corpus.parquet", text=pa.array([b"one", b"two"], pa.binary()).cast(kind))
    assert read_corpus(path).contents == [b"one", b"two"]


def test_empty_texts_are_counted_and_the_first_few_named(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=["a", "", None, "  \n\t", "b", "", "", ""])
    table = plan(path, llama)
    first = [f"corpus.parquet:{i}" for i in (1, 2, 3, 5, 6)]
    assert skipped(table) == {"empty": {"count": 6, "first": first}}
    assert table.sizes.documents == 2


def test_an_empty_corpus_says_why_it_is_empty(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "corpus.parquet", text=pa.array([], pa.string()))
    with pytest.raises(InputError, match="gives no rows: it has no records"):
        plan(path, llama)
    with pytest.raises(InputError, match="records are left out, 3 for 'empty'"):
        plan(write(path, text=["", " \n", None]), llama)
    with pytest.raises(InputError, match="records are left out, 2 for 'too short to give a row'"):
        plan(write(path, text=["a", "b"]), llama, skip_first=5)


# ---- JSON lines and text


LINES = [{"text": f"line {i} ü", "n": i, "more": [1, {"x": None}]} for i in range(200)]


def json_lines(records: list[Any] = LINES, end: str = "\n") -> bytes:
    return ("\n".join(json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records)) + end).encode()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "ndjson"])
@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_json_lines_plain_and_compressed(
    tmp_path: Path, ending: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(lines, "PIECE_BYTES", 3000)
    content = json_lines(end=end)
    if ending.endswith("gz"):
        content = gzip.compress(content[:5000]) + gzip.compress(content[5000:])  # two members, as parallel tools write
    elif ending.endswith("zst"):
        content = pa.Codec("zstd").compress(content, asbytes=True)
    (tmp_path / f"c.{ending}").write_bytes(content)
    found = read_corpus(tmp_path, labels=["n"])
    assert found.contents == [line["text"] for line in LINES]
    assert found.labels["n"] == list(range(200))
    assert found.numbers == [(0, i + 1) for i in range(200)]  # lines are counted from 1
    assert found.broken == []


def test_broken_lines_are_counted_with_file_and_number(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "PIECE_BYTES", 100)  # lines keep their numbers in every piece
    bad = {3: b'{"text": "cut', 8: b"[1, 2]", 15: b"\xff\xfe", 16: b'{"text": 5}', 18: b'{"other": 5}'}
    content = [bad.get(n, json.dumps({"text": f"line {n}"}).encode()) for n in range(1, 21)]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(content))
    table = plan(tmp_path, llama)
    assert skipped(table) == {
        "broken JSON": {"count": 1, "first": ["c.jsonl:3"]},
        "not a JSON object": {"count": 1, "first": ["c.jsonl:8"]},
        "undecodable": {"count": 1, "first": ["c.jsonl:15"]},
        "no key 'text'": {"count": 1, "first": ["c.jsonl:18"]},
        "not text": {"count": 1, "first": ["c.jsonl:16"]},
    }
    assert table.sizes.documents == 15


def test_a_file_of_broken_lines_is_refused(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "c.jsonl").write_text("not json\n" * 7)
    with pytest.raises(InputError, match="records are left out, 7 for 'broken JSON'"):
        plan(tmp_path, llama)


def test_json_lines_without_the_column_say_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"body": "x", "id": 1}\n' * 3)
    with pytest.raises(InputError, match=r"corpus\.text: no column 'text' in .*c\.jsonl; it has body, id"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("harm", ["cut", "not compressed"])
def test_a_compressed_file_that_is_damaged(tmp_path: Path, ending: str, harm: str) -> None:
    content = gzip.compress(json_lines()) if ending == "gz" else pa.Codec("zstd").compress(json_lines(), asbytes=True)
    (tmp_path / f"c.jsonl.{ending}").write_bytes(content[: len(content) // 2] if harm == "cut" else json_lines())
    with pytest.raises(InputError, match=rf"c\.jsonl\.{ending} is damaged"):
        read_corpus(tmp_path)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    assert skipped(plan(tmp_path, llama)) == {"undecodable": {"count": 1, "first": ["c.jsonl:2"]}}


def test_texts_are_one_document_a_file_labelled_by_file_and_folder(tmp_path: Path) -> None:
    for folder in ("de", "en"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            (tmp_path / folder / f"{name}.txt").write_text(f"{folder} {name}\nsecond line")
    found = read_corpus(tmp_path, labels=["folder", "file"])
    assert found.contents == [f"{f} {n}\nsecond line".encode() for f in ("de", "en") for n in ("a", "b")]
    assert found.labels == {"folder": ["de", "de", "en", "en"], "file": ["a.txt", "b.txt"] * 2}
    assert read_corpus(tmp_path / "en" / "*.txt").contents[1].startswith(b"en b")
    with pytest.raises(InputError, match="no column 'language' in text files; it has text, file, folder"):
        read_corpus(tmp_path, labels=["language"])


# ---- Hugging Face datasets


def dataset(number: int = 300) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "text": [f"text {i}" for i in range(number)],
            "n": list(range(number)),
            "ids": [[i % 300, 5] for i in range(number)],
        }
    )


def test_a_saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tables, "CHUNK_BYTES", 1000)
    dataset().shuffle(seed=1).save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"left by somebody's map()")
    found = read_corpus(tmp_path / "saved", labels=["n"])
    assert [c.decode() for c in found.contents] == [f"text {n}" for n in found.labels["n"]]
    assert sorted(found.labels["n"]) == list(range(300))
    assert {file for file, _ in found.numbers} == {0, 1, 2}
    assert read_corpus(tmp_path / "saved", "ids", ["n"], kind="tokens").contents == [
        [n % 300, 5] for n in found.labels["n"]
    ]
    with pytest.raises(InputError, match=r"corpus\.text: no column 'body'"):
        read_corpus(tmp_path / "saved", "body")


def test_a_saved_dataset_of_several_splits_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict(train=dataset(5), test=dataset(5)).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        InputError, match=r"holds the splits train, test of a dataset; give the folder of one: .*saved/train"
    ):
        read_corpus(tmp_path / "saved")
    assert len(read_corpus(tmp_path / "saved" / "test").contents) == 5


def test_a_saved_dataset_that_is_cut(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("data*.arrow")
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"data-00000.* is damaged"):
        read_corpus(tmp_path / "saved")
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_corpus(tmp_path / "saved")


def test_a_dataset_by_name_is_streamed_until_there_are_rows_enough(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines([{"text": f"the grain of field {i}", "n": i} for i in range(2000)]))
    some = plan(folder, llama, format="datasets", rows=1000, labels=("n",))
    assert some.sizes.rows == 1000
    (bucket,) = some.buckets
    numbers = bucket.documents.about.column("n").to_pylist()
    assert max(numbers) < 256  # the first 256 records have more than 1,000 rows; the stream was not read on
    assert numbers != sorted(numbers)
    assert bucket.documents.about.column("source").to_pylist() == [f"named:{n}" for n in numbers]
    with pytest.raises(InputError, match=r"asks for 1,000,000 rows and the corpus has [0-9,]+:"):
        plan(folder, llama, format="datasets", rows=10**6)
    with pytest.raises(InputError, match=r"no column 'body' in the dataset .*named; it has n, text"):
        plan(folder, llama, format="datasets", rows=10, text="body")
    with pytest.raises(InputError, match=r"cannot be streamed: .*nosuch"):
        plan(folder, llama, format="datasets", rows=10, split="nosuch")


def test_a_dataset_that_is_nowhere(llama: Path) -> None:
    with pytest.raises(InputError, match=r"the dataset no/such-dataset cannot be (read|streamed): "):
        plan("no/such-dataset", llama, format="datasets", rows=10)


# ---- token ids


def test_token_ids_become_rows_as_they_are(tmp_path: Path, llama: Path) -> None:
    ids = [[5, 6, 7], [0, 8, 9], [], [10]]
    write(tmp_path / "c.parquet", input_ids=ids)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "c.jsonl").write_bytes(json_lines([{"input_ids": i} for i in ids]))
    for path in (tmp_path / "c.parquet", tmp_path / "lines"):
        table = plan(path, llama, tokens="input_ids")
        (bucket,) = table.buckets
        contexts = np.split(bucket.documents.tokens, np.cumsum(bucket.documents.context_lengths)[:-1])
        # a BOS that is there already is not doubled
        assert sorted(c.tolist() for c in contexts) == [[0, 5, 6, 7], [0, 8, 9], [0, 10]]
        assert skipped(table)["empty"]["count"] == 1


def test_token_ids_of_another_vocabulary_are_refused(tmp_path: Path, llama: Path) -> None:
    write(tmp_path / "c.parquet", ids=[[5], [6, 400, 7]])
    with pytest.raises(
        InputError, match=r"record c\.parquet:1 of .*: token id 400 is outside the model's vocabulary of 400"
    ):
        plan(tmp_path, llama, tokens="ids")
    write(tmp_path / "c.parquet", ids=[[5], [-1]])
    with pytest.raises(InputError, match="token id -1"):
        plan(tmp_path, llama, tokens="ids")


def test_lines_that_hold_no_token_ids_are_counted(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(json_lines([{"ids": i} for i in ([5, 6], "five", [[5], [6, 7]], [1.5], None)]))
    assert skipped(plan(tmp_path, llama, tokens="ids")) == {
        "empty": {"count": 1, "first": ["c.jsonl:5"]},
        "not a list of token ids": {"count": 3, "first": ["c.jsonl:2", "c.jsonl:3", "c.jsonl:4"]},
    }
