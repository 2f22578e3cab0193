"""Labels with names that columns of the rows have: refused for a new store, and read in one that there is."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import ensure_rows, plan, write

import workers.plan.stage
from pipeline.errors import InputError
from storage.sql.conditions import Conditions
from storage.store import Store, open_store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

TEXT = "count every town"
RECORDS = [{"text": TEXT, "position": 70 + n, "k": "x"} for n in range(8)]


@pytest.mark.parametrize("key", ["labels", "columns"])
@pytest.mark.parametrize("name", ["position", "token", "row", "context", "role", "Position", "ROLE"])
def test_names_that_rows_have(tmp_path: Path, llama: Path, name: str, key: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": TEXT, name: "x"}])
    with pytest.raises(
        InputError, match=rf"corpus\.{key}: {name} is a column of Granary's own rows; rename (it|the label), so"
    ):
        plan(corpus, llama, **{key: (name,)})


@pytest.mark.parametrize("name", ["document", "Source", "row_start", "TEXT"])
def test_names_that_documents_have(tmp_path: Path, llama: Path, name: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"body": TEXT, name: "x"}])
    with pytest.raises(InputError, match=rf"corpus\.labels: {name.lower()} is a column of Granary's own"):
        plan(corpus, llama, text="body", labels=(name,))


def test_keys_of_folders_and_paths(tmp_path: Path, llama: Path) -> None:
    """The key of a folder is refused too; a path has another name than its last part."""
    (tmp_path / "corpus" / "role=user").mkdir(parents=True)
    pq.write_table(pa.table({"text": [TEXT]}), tmp_path / "corpus" / "role=user" / "0.parquet")
    with pytest.raises(InputError, match=r"corpus\.labels: role is a column of Granary's own rows; rename the label"):
        plan(tmp_path / "corpus", llama, labels=("role",))
    nested = write(tmp_path / "a.jsonl", [{"text": TEXT, "meta": {"role": "x"}}])
    assert plan(nested, llama, labels=("meta.role",)).sizes.documents == 1


def test_a_store_that_has_such_a_label_goes_on(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those made before the names were refused: read, queried, found again and grown."""
    corpus = write(tmp_path / "a.jsonl", RECORDS)
    model = ModelSettings(id=str(llama), dtype="float32")

    def ensure(rows: int, grow: bool = False) -> tuple[Store, bool]:
        settings = CorpusSettings(path=(str(corpus),), labels=("position",), context=64, rows=rows)
        return ensure_rows(tmp_path / "store", settings, model, grow=grow)

    with monkeypatch.context() as before:
        before.setattr(workers.plan.stage, "check_new_names", lambda columns: None)
        ensure(10)
    with pytest.raises(InputError, match="position is a column of Granary's own rows"):
        ensure_rows(tmp_path / "other", CorpusSettings(path=(str(corpus),), labels=("position",), context=64), model)
    assert not (tmp_path / "other").exists()
    store, made = ensure(10)
    assert not made
    store, made = ensure(30, grow=True)
    assert made
    assert open_store(tmp_path / "store").num_rows == 30
    counts = store.sql("select position, count(*) from documents group by 1 order by 1").fetchall()
    assert {value for value, _ in counts} <= {*range(70, 78)}
    (rows,) = Conditions(store, ["documents.position >= 70 and rows.position > 1"]).rows(0, store.num_rows)
    assert 0 < len(rows) < store.num_rows
