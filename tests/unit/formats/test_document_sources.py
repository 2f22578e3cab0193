"""Where a document came from: the file's name, or its path where files have the same name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import plan, store_of

from pipeline.corpus.sources.files import CorpusFile, distinguished
from storage.store import Store


def lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def sources(store: Store) -> list[str]:
    return sorted(store.documents["source"].to_pylist())


def test_names_that_repeat_are_told_by_their_folders(tmp_path: Path, llama: Path) -> None:
    for lang in ("de", "en"):
        (tmp_path / "corpus" / f"lang={lang}").mkdir(parents=True)
        pq.write_table(pa.table({"text": [f"town {lang}"]}), tmp_path / "corpus" / f"lang={lang}" / "0.parquet")
    store = store_of(tmp_path / "store", tmp_path / "corpus", llama, labels=("lang",))
    assert sources(store) == ["lang=de/0.parquet:0", "lang=en/0.parquet:0"]
    assert store.sql("select lang from documents where source like 'lang=en/%'").fetchall() == [("en",)]


def test_names_that_are_unique_stay_as_they_were(tmp_path: Path, llama: Path) -> None:
    lines(tmp_path / "corpus" / "a" / "0.jsonl", "grain")
    lines(tmp_path / "corpus" / "b" / "1.jsonl", "town")
    store = store_of(tmp_path / "store", tmp_path / "corpus", llama)
    assert sources(store) == ["0.jsonl:1", "1.jsonl:1"]


def test_what_is_stored_besides_does_not_depend_on_it(tmp_path: Path, llama: Path) -> None:
    """The digest of a table has no sources, so stores that were made before go on."""
    for name in ("x", "y"):
        lines(tmp_path / "one" / "a" / f"{name}.jsonl", "grain", f"river {name}")
    lines(tmp_path / "two" / "a" / "x.jsonl", "grain", "river x")
    lines(tmp_path / "two" / "b" / "x.jsonl", "grain", "river y")
    one, two = (store_of(tmp_path / f"store {n}", tmp_path / n, llama) for n in ("one", "two"))
    assert sources(two)[0] == "a/x.jsonl:1"
    assert (one.info.corpus_digest, one.info.plan) == (two.info.corpus_digest, two.info.plan)


def test_names_that_repeat_in_several_entries(tmp_path: Path, llama: Path) -> None:
    from corpora import VOCABULARY

    from storage.backends.place import open_place
    from workers.cluster.tasks import Here
    from workers.plan.source import open_source
    from workers.plan.stage import plan_rows, write_plan
    from workers.settings.corpus import CorpusSettings
    from workers.settings.experiment import ModelSettings

    for year in ("2024", "2025"):
        lines(tmp_path / year / "part.jsonl", f"grain {year}", "")
    paths = (str(tmp_path / "2024"), str(tmp_path / "2025" / "*.jsonl"))
    source = open_source(CorpusSettings(path=paths), ModelSettings(id=str(llama)), VOCABULARY, "main")
    table = plan_rows(source, lambda done, total: None, Here())
    assert table.skipped.to_record()["empty"]["first"] == ["2024/part.jsonl:2", "2025/part.jsonl:2"]
    store = write_plan(open_place(tmp_path / "store"), source, table, Here())
    assert sources(store) == ["2024/part.jsonl:1", "2025/part.jsonl:1"]


def test_what_is_left_out_is_told_so_too(tmp_path: Path, llama: Path) -> None:
    lines(tmp_path / "a" / "x.jsonl", "grain", "")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "town"}\n{"text": ""}\n{broken\n')
    record = plan(tmp_path, llama).skipped.to_record()
    assert record["empty"]["first"] == ["a/x.jsonl:2", "b/x.jsonl:2"]
    assert record["broken JSON"]["first"] == ["b/x.jsonl:3"]


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["/d/0.txt"], ["0.txt"]),
        (["/d/0.txt", "/d/sub/0.txt"], ["0.txt", "sub/0.txt"]),
        (["/d/ab/0.txt", "/d/ac/0.txt", "/d/ac/1.txt"], ["ab/0.txt", "ac/0.txt", "ac/1.txt"]),
        (["s3://b/x/0.gz", "s3://b/y/0.gz"], ["x/0.gz", "y/0.gz"]),
        (["s3://b/0.gz", "s3://c/0.gz"], ["b/0.gz", "c/0.gz"]),
        (["/d/0.gz", "https://h/0.gz"], ["d/0.gz", "h/0.gz"]),
        (["/h/0.gz", "https://h/0.gz"], ["/h/0.gz", "https://h/0.gz"]),
        (["/home/me/a/0.gz", "/mnt/b/0.gz"], ["a/0.gz", "b/0.gz"]),
        (["/home/me/x/0.gz", "/mnt/x/0.gz", "/mnt/1.gz"], ["me/x/0.gz", "mnt/x/0.gz", "1.gz"]),
        (["https://me:se@cret@h/x/0.gz", "s3://b/y/0.gz"], ["x/0.gz", "y/0.gz"]),
        (["https://me:secret@h/0.gz", "https://you:secret@i/0.gz"], ["h/0.gz", "i/0.gz"]),
        (["https://me:secret@h/0.gz", "https://you:secret@h/0.gz"], ["0.gz", "0.gz"]),
        (["https://me:secret@h/x/0.gz", "https://me:secret@h/y/0.gz"], ["x/0.gz", "y/0.gz"]),
        (["/a/0.gz", "a/0.gz", "b/a/0.gz"], ["/a/0.gz", "a/0.gz", "b/a/0.gz"]),  # none is cut to what another has
    ],
)
def test_paths_below_what_all_files_share(urls: list[str], expected: list[str]) -> None:
    assert [file.source for file in distinguished([CorpusFile(url, 1) for url in urls])] == expected
