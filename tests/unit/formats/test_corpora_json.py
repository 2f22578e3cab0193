"""JSON as people have it: one list or a record a line, with marks, line ends and values of every kind."""

import codecs
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corpora import plan, read_corpus

from pipeline.corpus.formats import json_files
from pipeline.corpus.formats import json_lines as lines
from pipeline.errors import InputError

RECORDS = [{"text": f"record {i} é ☃", "n": i, "more": {"a": [1, {"b": "]}{["}]}} for i in range(300)]
MARK = codecs.BOM_UTF8


def packed(content: bytes, ending: str) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(content)
    return pa.Codec("zstd").compress(content, asbytes=True) if ending.endswith(".zst") else content


@pytest.mark.parametrize("ending", ["json", "json.gz", "json.zst", "jsonl"])
@pytest.mark.parametrize("layout", ["compact", "pretty", "lines", "escaped"])
def test_one_list_of_records(tmp_path: Path, ending: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(json_files, "BLOCK_BYTES", 700)
    text = {
        "compact": json.dumps(RECORDS, ensure_ascii=False, separators=(",", ":")),
        "pretty": "\n " + json.dumps(RECORDS, ensure_ascii=False, indent=2) + "\n\n",
        "lines": "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n]",
        "escaped": json.dumps(RECORDS),
    }[layout]
    (tmp_path / f"c.{ending}").write_bytes(packed(text.encode(), ending))
    found = read_corpus(tmp_path, labels=["n"])
    assert found.contents == [r["text"] for r in RECORDS]
    assert found.labels["n"] == list(range(300))
    assert found.numbers == [(0, i) for i in range(300)]  # places in a list are counted from 0
    assert found.broken == []


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_a_list_that_is_cut_anywhere_into_blocks(block: int) -> None:
    values = [{"t": '"\\ é☃\U0001f600', "x": [-1.5e-7, True, None, -12345678901234567890]}, {}, {"y": {"z": []}}]
    text = json.dumps(values, ensure_ascii=block % 2 == 0).encode()
    content = (text[i : i + block] for i in range(0, len(text), block))
    file = lines.CorpusFile("c.json", len(text))
    assert [record for record, _ in json_files.records_in_list(content, file)] == values


def test_what_is_no_record_in_a_list_is_counted(tmp_path: Path, llama: Path) -> None:
    records = [{"text": "one"}, 5, None, ["two"], "three", {"other": 1}, {"text": None}, {"text": 7}, {"text": "two"}]
    (tmp_path / "c.json").write_text(json.dumps(records))
    table = plan(tmp_path, llama)
    assert table.sizes.documents == 2
    assert table.skipped.to_record() == {
        "not a JSON object": {"count": 4, "first": [f"c.json:{i}" for i in (1, 2, 3, 4)]},
        "no key 'text'": {"count": 1, "first": ["c.json:5"]},
        "empty": {"count": 1, "first": ["c.json:6"]},
        "not text": {"count": 1, "first": ["c.json:7"]},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"text": "a"}, {"text": "b"', r"beyond record 1 \(counted from 0\): it ends in the middle"),
        ('[{"text": "a"}, {"text": "b', "beyond record 1 .*: it ends in the middle"),
        ('[{"text": "a"}', "beyond record 0 .*: it ends in the middle"),
        ("[", "beyond record 0 .*: it ends in the middle"),
        ('[{"text": "a"}, {text: "b"}]', "beyond record 1 .*: broken JSON: Expecting property name"),
        ('[{"text": "a"} {"text": "b"}]', "beyond record 0 .*: '{' follows it"),
        ('[{"text": "a"}, ]', "beyond record 1 .*: broken JSON"),
        ('[\n{"text": "a"}]\n{"text": "b"}', "goes on after the list that it begins with; give one list"),
        ('[{"text": "a", "n": ' + "[" * 200_000 + "]", "nested too deeply"),
        ('[{"text": "a", "n": ' + "1" * 5000 + "}]", "a number of too many digits"),
    ],
)
def test_a_list_that_is_broken_is_refused_with_the_place(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=rf"c\.json (is no JSON.*|){problem}"):
        read_corpus(tmp_path)


def test_lists_that_are_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('[{"text": "a"}]\n[{"text": "b"}]\n{"text": "c"}\n')
    found = read_corpus(tmp_path)
    assert found.contents == ["c"]
    assert found.broken == [("c.jsonl", n, "not a JSON object") for n in (1, 2)]


def test_a_long_list_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 2**20)
    record = json.dumps({"text": "x" * 1000}) + ","
    with (tmp_path / "c.json").open("w") as file:
        file.write("[")
        for _ in range(120):
            file.write(record * 100)
        file.write('{"text": "last"}]')
    corpus = lines.JsonLines(lines.Columns("text", "text", ()))
    on_disk = lines.CorpusFile(str(tmp_path / "c.json"), (tmp_path / "c.json").stat().st_size)
    (piece,) = corpus.pieces(0, on_disk)
    tracemalloc.start()
    try:
        number = sum(len(chunk.contents) for chunk in corpus.read(on_disk, piece))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number == 12_001
    assert peak < 9e6 < on_disk.num_bytes


@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz"])
@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ({"data": RECORDS[:2]}, r"one object whose list 'data' .*`jq -c '\.\"data\"\[\]'"),
        ({"text": ["a", "b"], "n": [1, 2]}, r"one object that holds the records column by column; .*pandas\.read_json"),
        ({"text": {"0": "a", "1": "b"}}, r"one object that holds the records column by column"),
        ({"columns": ["text"], "data": [["a"]]}, r"no column 'text' in .*; it has columns, data"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_that_hold_records_are_refused_with_advice(
    tmp_path: Path, ending: str, content: Any, advice: str, indent: int | None
) -> None:
    (tmp_path / f"c.{ending}").write_bytes(packed(json.dumps(content, indent=indent).encode(), ending))
    with pytest.raises(InputError, match=advice):
        read_corpus(tmp_path)


def test_an_object_too_large_for_a_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MOST_CHARACTERS", 5000)
    monkeypatch.setattr(json_files, "BLOCK_BYTES", 1000)
    (tmp_path / "c.json").write_text(json.dumps({"version": [1], "docs": RECORDS}, indent=1))
    with pytest.raises(InputError, match="one object whose list 'docs' holds records"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("ending", ["json", "json.zst"])
def test_records_over_several_lines(tmp_path: Path, ending: str) -> None:
    """As `jq .` writes them; or a file for each record."""
    content = "\n".join(json.dumps(record, indent=1) for record in RECORDS)
    (tmp_path / f"a.{ending}").write_bytes(packed(content.encode(), ending))
    (tmp_path / f"b.{ending}").write_bytes(packed(json.dumps({"text": "b", "n": 1}, indent=4).encode(), ending))
    found = read_corpus(tmp_path, labels=["n"])
    assert found.contents == [*(record["text"] for record in RECORDS), "b"]
    assert found.numbers == [*((0, i) for i in range(300)), (1, 0)]
    (tmp_path / f"a.{ending}").write_bytes(packed(content[:-5].encode(), ending))
    with pytest.raises(InputError, match=r"no JSON, .* beyond record 299 \(counted from 0\): it ends in the middle"):
        read_corpus(tmp_path)


def test_a_first_line_that_is_cut_is_counted(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a",\n{"text": "b"}\n{"text": "c"}\n')
    found = read_corpus(tmp_path)
    assert found.contents == ["b", "c"]
    assert found.broken == [("c.jsonl", 1, "broken JSON")]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\r", "mixed"])
@pytest.mark.parametrize("is_last_ended", [True, False])
def test_every_kind_of_line_end(
    tmp_path: Path, ending: str, end: str, is_last_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "PIECE_BYTES", 70)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 13)
    ends = ["\n", "\r\n", "\r"] if end == "mixed" else [end]
    content = "".join(f'{{"text": "line {i}"}}{ends[i % len(ends)]}' for i in range(60))
    if not is_last_ended:
        content = content.rstrip("\r\n")
    (tmp_path / f"c.{ending}").write_bytes(packed(content.encode(), ending))
    found = read_corpus(tmp_path)
    assert found.contents == [f"line {i}" for i in range(60)]
    assert found.numbers == [(0, i * (2 if end == "\n\r" else 1) + 1) for i in range(60)]
    assert found.broken == []


def test_marks_of_utf8_are_no_text(tmp_path: Path) -> None:
    """Also in the middle, where files were put one after the other."""
    one, two = b'{"text": "a", "n": 1}\n', b'\n{"text": "b", "n": 2}'
    for ending in ("jsonl", "jsonl.gz"):
        (tmp_path / f"c.{ending}").write_bytes(packed(MARK + one + MARK + two, ending))
        assert read_corpus(tmp_path / f"c.{ending}").contents == ["a", "b"]
    (tmp_path / "c.json").write_bytes(MARK + b"[" + one + b"," + two + b"]")
    assert read_corpus(tmp_path / "c.json", labels=["n"]).labels["n"] == [1, 2]
    (tmp_path / "c.txt").write_bytes(MARK + b"text\r\nmore")
    assert read_corpus(tmp_path / "c.txt").contents == [b"text\r\nmore"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("ending", ["jsonl", "json.gz"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str, ending: str) -> None:
    (tmp_path / f"c.{ending}").write_bytes(packed('{"text": "a"}\n{"text": "b"}\n'.encode(encoding), ending))
    with pytest.raises(InputError, match=r"is in UTF-16 or UTF-32 and JSON is read as UTF-8: .*iconv"):
        read_corpus(tmp_path)


def test_texts_in_other_encodings_are_counted(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_bytes("hello".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "c.txt").write_text("hello")
    assert plan(tmp_path, llama).skipped.to_record() == {
        "in UTF-16 or UTF-32, not UTF-8": {"count": 1, "first": ["a.txt:0"]},
        "undecodable": {"count": 1, "first": ["b.txt:0"]},
    }


@pytest.mark.parametrize("ending", ["txt.gz", "txt.zst"])
def test_compressed_texts(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(packed(b"hello\nworld", ending))
    found = read_corpus(tmp_path, labels=["file"])
    assert found.contents == [b"hello\nworld"]
    assert found.labels["file"] == [f"a.{ending}"]
    (tmp_path / f"a.{ending}").write_bytes(packed(b"hello world" * 100, ending)[:-9])
    with pytest.raises(InputError, match="is damaged"):
        read_corpus(tmp_path)


def test_every_broken_line_has_its_own_reason(tmp_path: Path, llama: Path) -> None:
    bad = [
        b'{"text": "cut',
        b"[1, 2]",
        b'{"text": "caf\xe9"}',
        b'{"text": "\\udc80"}',
        b'{"text": ' + b"[" * 100_000 + b"]",
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
        b'{"text": NaN}',
        b'{"text": {"a": 1}}',
    ]
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n' + b"\n".join(bad) + b'\n{"text": "good"}')
    table = plan(tmp_path, llama)
    assert table.sizes.documents == 2
    assert {reason: about["first"] for reason, about in table.skipped.to_record().items()} == {
        "broken JSON": ["c.jsonl:2"],
        "not a JSON object": ["c.jsonl:3"],
        "undecodable": ["c.jsonl:4", "c.jsonl:5"],
        "JSON that is nested too deeply": ["c.jsonl:6"],
        "a number of too many digits": ["c.jsonl:7"],
        "not text": ["c.jsonl:8", "c.jsonl:9"],
    }


def test_of_a_key_that_is_there_twice_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a", "n": 1, "text": "b", "n": 2}\n')
    (tmp_path / "c.json").write_text('[{"text": "a", "n": 1, "text": "b", "n": 2}]')
    for name in ("c.jsonl", "c.json"):
        found = read_corpus(tmp_path / name, labels=["n"])
        assert (found.contents, found.labels["n"]) == (["b"], [2])


@pytest.mark.parametrize("value", ["NaN", "null"])
def test_no_number_is_no_label(tmp_path: Path, value: str) -> None:
    (tmp_path / "c.json").write_text(f'[{{"text": "a", "n": 1.5}}, {{"text": "a", "n": {value}}}]')
    with pytest.raises(InputError, match=r"'n' has no value in .*c\.json:1"):
        read_corpus(tmp_path, labels=["n"])


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"[]", MARK, b" [ \n ] "])
def test_files_without_records_beside_others(tmp_path: Path, content: bytes) -> None:
    for ending in ("jsonl", "jsonl.gz", "json.zst"):
        (tmp_path / f"a.{ending}").write_bytes(packed(content, ending))
    (tmp_path / "b.jsonl").write_text('{"text": "a", "n": 1}')
    found = read_corpus(tmp_path, labels=["n"])
    assert found.contents == ["a"]
    assert found.broken == []


def test_a_gzip_file_with_changed_bytes(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"\n".join(json.dumps(r).encode() for r in RECORDS)))
    content[60:80] = bytes(20)
    (tmp_path / "c.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"c\.jsonl\.gz is damaged"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(("content", "ending"), [(gzip.compress(b"{}", mtime=0), "gz"), (b"PAR1....", "parquet")])
def test_a_file_of_another_kind_under_the_name(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"c\.jsonl is no JSON: it begins as \.{ending} files do"):
        read_corpus(tmp_path)


def test_chats_as_texts_of_json(tmp_path: Path) -> None:
    chat: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    columns = {"role": ["user", "assistant"], "content": ["hi", None]}
    held = [chat, json.dumps(chat), [json.dumps(m) for m in chat], columns, json.dumps(columns)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"m": messages}) for messages in [*held, "no JSON", 5]))
    assert read_corpus(tmp_path, "m", kind="messages").contents == [*[chat] * len(held), "no JSON", 5]
