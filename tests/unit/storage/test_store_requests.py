"""How often an open store asks its place, and that its documents are compared with what it was made with."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_store

from storage.errors import StorageError
from storage.sql.conditions import Conditions
from storage.store import Store, open_store

READING = ("read", "read_into", "open", "exists", "names", "walk")


def counted(store: Store) -> Counter[str]:
    """The requests that the store sends from now on, by what they ask."""
    counts: Counter[str] = Counter()
    backend: Any = store.root.backend

    def counting(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return operation(*arguments)

        return call

    for name in READING:
        backend.__dict__[name] = counting(name, getattr(backend, name))
    return counts


def test_what_a_store_says_of_itself_sends_no_request(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "store").path)
    counts = counted(store)
    assert repr(store) == f"Store({str(tmp_path / 'store')!r}, rows=203)"
    assert (store.num_rows, store.url, str(store)) == (203, str(tmp_path / "store"), repr(store))
    assert not counts


def test_sites_and_harvests_are_read_once(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "store").path)
    counts = counted(store)
    assert store.sites == ["resid_post.0", "mlp_out.0"]
    once = counts.copy()
    assert once.total() >= 1
    for _ in range(3):
        assert store.sites == [site for harvest in store.harvests for site in harvest.sites]
        assert store.find("mlp_out.0")[0] == store.harvests[0]
    store.harvests.clear()  # the caller's own list
    assert len(store.harvests) == 1
    assert counts == once
    assert store.refresh().sites == store.sites
    assert counts == once + once


def test_a_harvest_begun_since_is_found(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", units=[])
    record = next(store.path.glob("commits/*/harvest.json"))
    aside = record.rename(tmp_path / "aside.json")
    store = open_store(store.path)
    assert store.sites == []
    with pytest.raises(StorageError, match="it has no activations yet"):
        store.find("mlp_out.0")
    aside.rename(record)
    assert store.sites == []
    assert store.sql("select count(*) from sites").fetchall() == [(2,)]
    assert store.find("mlp_out.0")[1] == "mlp_out.0"
    assert store.sites == ["resid_post.0", "mlp_out.0"]


READERS: dict[str, Callable[[Store], object]] = {
    "documents": lambda store: store.documents,
    "documents_between": lambda store: store.documents_between(1, 1),
    "sql": lambda store: store.sql("select * from documents").fetchall(),
    "conditions": lambda store: Conditions(store, ["true"]),
}


@pytest.mark.parametrize("reader", READERS)
def test_documents_of_another_store_are_refused(tmp_path: Path, reader: str) -> None:
    store = write_store(tmp_path / "store")
    (path,) = store.path.glob("corpus/documents/*.parquet")
    table = pq.read_table(path)
    labels = pa.array(["changed"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("source"), "source", labels), path)  # sound in itself
    with pytest.raises(StorageError, match=r"part-00000\.parquet is not the file that the store was made with"):
        READERS[reader](open_store(store.path))


def test_documents_are_compared_once(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "store").path)
    counts = counted(store)
    for _ in range(3):
        store.documents_between(0, 1)
    assert counts == {"read": 1, "open": 2}
