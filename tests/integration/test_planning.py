"""A store is the same, byte by byte, however its planning is cut and wherever it runs."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import sentence
from corpora import ensure_rows, store_of
from lab import snapshot

from pipeline.corpus.formats import json_lines as lines
from pipeline.model.describe import describe_model
from storage.make import create
from storage.store import Store
from storage.table import table as tables
from workers.cluster.connect import connected
from workers.plan import source
from workers.plan import table_plan as tabling
from workers.plan import write_table as table_writing
from workers.plan.calls import Cuts
from workers.plan.stage import ensure_store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

RECORDS = 400


def record(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    text = "" if number % 50 == 7 else sentence(rng, rng.choice([1, 3, 10, 40]))
    first = text.partition(" ")[0]
    words = [{"start": 0, "end": len(first), "label": first}, {"start": 0, "end": 1, "label": str(number)}]
    return {"text": text, "language": ("de", "en")[number % 2], "word": words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of lines, one of them broken here and there."""
    folder = tmp_path_factory.mktemp("lines")
    records = [json.dumps(record(n)) for n in range(RECORDS)]
    records[33] = records[222] = '{"text": '
    (folder / "0.jsonl").write_text("\n".join(records[:250]))
    (folder / "1.jsonl").write_text("\n".join(records[250:]))
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small table has many chunks and several documents files."""
    monkeypatch.setattr(create, "COLUMN_CHUNK_ROWS", 256)
    monkeypatch.setattr(table_writing, "COLUMN_CHUNK_ROWS", 256)
    monkeypatch.setattr(table_writing, "WRITE_ROWS", 512)
    for module in (tables, table_writing, create):
        monkeypatch.setattr(module, "DOCUMENTS_PER_FILE", 40)


def content(store: Store) -> dict[str, str]:
    return snapshot(store.root.path)


@pytest.mark.parametrize("rows", [None, 3000])
def test_stores_do_not_depend_on_how_planning_is_cut(
    tmp_path: Path, folder: Path, llama: Path, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = sum(f.stat().st_size for f in folder.iterdir())
    settings: dict[str, Any] = {"labels": ("language", "word"), "context": 64, "rows": rows}
    whole = store_of(tmp_path / "whole", folder, llama, **settings)
    first = whole.info.skipped["broken JSON"]["first"]
    assert set(first) <= {"0.jsonl:34", "0.jsonl:223"}
    assert len(first) == 2 or rows is not None  # of fewer rows, what comes before the last one taken
    assert whole.num_rows == rows or rows is None
    assert len(list((whole.root.path / "corpus" / "token" / "c").iterdir())) > 5
    assert len(list((whole.root.path / "corpus" / "documents").iterdir())) > 1
    expected = content(whole)
    for buckets in (1, 3, 17):
        for piece_bytes in (10**9, 1500):
            monkeypatch.setattr(lines, "PIECE_BYTES", piece_bytes)
            cuts = Cuts(task_bytes=4 * piece_bytes, bucket_bytes=-(-num_bytes // buckets))
            cut = store_of(tmp_path / f"{buckets}-{piece_bytes}", folder, llama, cuts, **settings)
            assert content(cut) == expected


def test_a_table_is_what_its_files_say(tmp_path: Path, folder: Path, llama: Path) -> None:
    """Chunks that several buckets share are put together right."""
    store = store_of(
        tmp_path / "store", folder, llama, Cuts(bucket_bytes=2000), labels=("language", "word"), context=64
    )
    columns = store.columns(0, store.num_rows)
    contexts = store.context_tokens(0, store.info.num_contexts - 1)
    assert [contexts[c][p] for c, p in zip(columns["context"], columns["position"], strict=True)] == columns[
        "token"
    ].tolist()
    for document in store.documents.to_pylist():
        rows = range(document["row_start"], document["row_stop"])
        assert set(columns["document"][rows].tolist()) == {document["document"]}
        file, line = document["source"].split(":")
        number = int(line) - 1 + (250 if file == "1.jsonl" else 0)
        assert document["language"] == record(number)["language"]


def test_planned_on_ray_and_here(tmp_path: Path, folder: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same store, and a refusal that leaves nothing."""
    corpus = CorpusSettings(path=str(folder), labels=("language", "word"), context=64)
    model = ModelSettings(id=str(llama))
    monkeypatch.undo()  # workers are processes of their own
    here, _ = ensure_rows(tmp_path / "here", corpus, model)
    monkeypatch.setattr(source, "SMALL_BYTES", 0)
    monkeypatch.setattr(tabling.Cuts, "__init__", _cuts_of(tabling.Cuts.__init__))
    done: list[int] = []
    with connected("local", cpus=2):
        calls: list[int] = []
        info = describe_model(model.id)
        arguments = (model, info, lambda rows, total: done.append(rows), lambda rows: None, lambda: calls.append(1))
        there, made = ensure_store(tmp_path / "there", corpus, *arguments)
        assert made
        assert calls == [1]
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match="asks for 1,000,000 rows and the corpus has"):
            ensure_store(tmp_path / "other", corpus.model_copy(update={"rows": 10**6}), *arguments)
        (folder / "2.jsonl").write_text('{"text": "no label"}\n')
        with pytest.raises(ValueError, match=r"no column 'language' in .*2\.jsonl; it has text"):
            ensure_store(tmp_path / "other", corpus, *arguments)
        (folder / "2.jsonl").unlink()
        assert snapshot(tmp_path) == before
    assert content(there) == content(here)
    assert done[-1] > 0


def _cuts_of(init: Callable[..., None]) -> Callable[..., None]:
    def small(self: Cuts) -> None:
        init(self, task_bytes=4000, bucket_bytes=8000)

    return small
