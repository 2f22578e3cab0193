"""SQL over a store, and the activations of the rows that it finds, in three file formats."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_store
from safetensors.torch import load_file

from storage.errors import StorageError
from storage.sql.query import check_output, fetch
from storage.store import Store, open_store

SITE = "resid_post.1"
SHUFFLED = [3000, 5, 5, 1023, 1024, 0, 3732, 5, 2047]


def ask(store: Store, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = store.sql(query).to_arrow_table().to_pylist()
    return rows


def columns(store: Store, table: str) -> dict[str, str]:
    found = store.sql(f"select * from {table}")
    return dict(zip(found.columns, map(str, found.types), strict=True))


# ---- tables


def test_documents(harvested: Store) -> None:
    assert columns(harvested, "documents") == {
        "document": "BIGINT",
        "row_start": "BIGINT",
        "row_stop": "BIGINT",
        "source": "VARCHAR",
        "language": "VARCHAR",
        "year": "BIGINT",
    }
    assert harvested.sql("select * from documents").to_arrow_table().to_pylist() == harvested.documents.to_pylist()
    assert ask(harvested, "select sum(row_stop - row_start)::bigint as n from documents") == [{"n": harvested.num_rows}]


def test_rows(harvested: Store) -> None:
    assert columns(harvested, "rows") == {
        "row": "BIGINT",
        "token": "INTEGER",
        "position": "INTEGER",
        "document": "BIGINT",
        "context": "BIGINT",
    }
    found = harvested.sql("select * from rows order by row").to_arrow_table()
    np.testing.assert_array_equal(found.column("row"), np.arange(harvested.num_rows))
    for name, values in harvested.columns(0, harvested.num_rows).items():
        np.testing.assert_array_equal(found.column(name), values)


def test_rows_join_their_documents(harvested: Store) -> None:
    outside = "select count(*) as n from rows join documents using (document) where row < row_start or row >= row_stop"
    assert ask(harvested, outside) == [{"n": 0}]
    joined = "select language, count(*) as n from rows join documents using (document) group by 1 order by 1"
    by_hand = "select language, sum(row_stop - row_start)::bigint as n from documents group by 1 order by 1"
    assert ask(harvested, joined) == ask(harvested, by_hand)


def test_tokens(harvested: Store, tokenizer: Any) -> None:
    assert columns(harvested, "tokens") == {"token": "INTEGER", "piece": "VARCHAR"}
    found = {line["token"]: line["piece"] for line in ask(harvested, "select * from tokens")}
    assert found == {number: piece for piece, number in tokenizer.get_vocab().items()}
    first = ask(harvested, "select piece from rows join tokens using (token) order by row limit 20")
    ids = harvested.columns(0, 20, ["token"])["token"].tolist()
    assert [line["piece"] for line in first] == tokenizer.convert_ids_to_tokens(ids)


def test_tokens_of_a_store_without_a_vocabulary(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    store.tokenizer_path.joinpath("tokenizer.json").remove()
    with pytest.raises(StorageError, match=r"the strings of tokens need .*tokenizer\.json"):
        store.sql("select * from tokens")


def test_units(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", num_rows=203, rows_per_unit=32, units=[0, 2, 6])
    assert columns(store, "units") == {
        "harvest": "VARCHAR",
        "unit": "BIGINT",
        "row_start": "BIGINT",
        "row_stop": "BIGINT",
        "committed": "BOOLEAN",
        "writer": "VARCHAR",
        "device": "VARCHAR",
        "seconds": "DOUBLE",
    }
    found = ask(store, "select * from units order by unit")
    assert [(u["unit"], u["row_start"], u["row_stop"]) for u in found] == [
        (unit, *store.info.unit_rows(unit)) for unit in range(7)
    ]
    assert [u["unit"] for u in found if u["committed"]] == [0, 2, 6]
    assert [u["writer"] for u in found] == ["test" if u["committed"] else None for u in found]
    assert {u["harvest"] for u in found} == {store.harvests[0].digest}


def test_units_say_how_long_they_took(harvested: Store) -> None:
    for unit in ask(harvested, "select * from units"):
        assert unit["committed"]
        assert unit["device"] == "cpu, 1 threads"
        assert 0 < unit["seconds"] < 60


def test_sites(tmp_path: Path, harvested: Store) -> None:
    assert columns(harvested, "sites") == {
        "site": "VARCHAR",
        "model": "VARCHAR",
        "harvest": "VARCHAR",
        "d_model": "BIGINT",
        "dtype": "VARCHAR",
        "units_committed": "BIGINT",
        "units": "BIGINT",
    }
    found = ask(harvested, "select site, d_model, dtype, units_committed, units from sites")
    assert [line["site"] for line in found] == harvested.sites
    assert all({**line, "site": ""} == {**found[0], "site": ""} for line in found)
    assert found[0] == {"site": SITE, "d_model": 32, "dtype": "bfloat16", "units_committed": 4, "units": 4}
    store = write_store(tmp_path / "store", units=[1], sites=["mlp_in.3"])
    assert ask(store, "select site, units_committed, units from sites") == [
        {"site": "mlp_in.3", "units_committed": 1, "units": 7}
    ]


def test_a_store_without_a_harvest_has_empty_tables(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", units=[])
    for record in store.path.glob("commits/*/harvest.json"):
        record.unlink()
    assert ask(store, "select * from units") == ask(store, "select * from sites") == []
    assert columns(store, "units").keys() == columns(write_store(tmp_path / "other"), "units").keys()


def test_names_of_tables_in_any_case_and_place(harvested: Store) -> None:
    query = 'WITH a AS (SELECT document FROM "rows") SELECT count(*) AS n FROM a JOIN Documents d USING (document)'
    assert ask(harvested, query) == [{"n": harvested.num_rows}]


# ---- activations


def rows_table(rows: list[int], kind: pa.DataType = pa.int64()) -> pa.Table:  # noqa: B008 (an immutable value)
    return pa.table({"row": pa.array(rows, kind), "why": [f"row {row}" for row in rows]})


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint16()])
def test_npy_holds_what_read_gives(harvested: Store, tmp_path: Path, kind: pa.DataType) -> None:
    out = tmp_path / "x.npy"
    assert fetch(harvested, rows_table(SHUFFLED, kind), SITE, out) == (len(SHUFFLED), 32)
    stored = np.load(out)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, harvested.read(SITE, SHUFFLED).astype(np.float32))


def test_safetensors_keep_the_stored_dtype(harvested: Store, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    fetch(harvested, rows_table(SHUFFLED), SITE, out)
    tensors = load_file(out)
    assert tensors.keys() == {"activations", "row"}
    assert tensors["activations"].dtype == torch.bfloat16
    bits = tensors["activations"].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits, harvested.read(SITE, SHUFFLED))
    assert tensors["row"].tolist() == SHUFFLED


def test_parquet_keeps_the_query_s_columns_and_order(harvested: Store, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    query = (
        "select piece, row, language from rows join documents using (document) join tokens using (token) "
        "where language = 'fr' order by hash(row) limit 200"
    )
    found = harvested.sql(query).to_arrow_table()
    fetch(harvested, found, SITE, out)
    stored = pq.read_table(out)
    assert stored.column_names == ["piece", "row", "language", "activation"]
    assert stored.drop_columns(["activation"]).to_pylist() == found.to_pylist()
    rows = found.column("row").to_numpy()
    assert (np.diff(rows) < 0).any()
    activations = np.stack(stored.column("activation").to_numpy())
    np.testing.assert_array_equal(activations, harvested.read(SITE, rows).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_stored_dtypes(tmp_path: Path, dtype: str) -> None:
    store = write_store(tmp_path / "store", dtype=dtype, sites=["resid_post.0"])
    for suffix in (".npy", ".safetensors", ".parquet"):
        fetch(store, rows_table([200, 3]), "resid_post.0", tmp_path / f"x{suffix}")
    assert str(load_file(tmp_path / "x.safetensors")["activations"].dtype) == f"torch.{dtype}"
    expected = store.read("resid_post.0", [200, 3]).astype(np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
    stored = pq.read_table(tmp_path / "x.parquet").column("activation").to_numpy()
    np.testing.assert_array_equal(np.stack(stored), expected)


def test_an_empty_result_is_an_empty_file(harvested: Store, tmp_path: Path) -> None:
    empty = harvested.sql("select row from rows where position > 1000").to_arrow_table()
    for suffix in (".npy", ".safetensors", ".parquet"):
        assert fetch(harvested, empty, SITE, tmp_path / f"x{suffix}") == (0, 32)
    assert np.load(tmp_path / "x.npy").shape == (0, 32)
    tensors = load_file(tmp_path / "x.safetensors")
    assert (tensors["activations"].shape, tensors["row"].shape) == ((0, 32), (0,))
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0


def test_a_file_is_replaced_whole_or_not_at_all(harvested: Store, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    fetch(harvested, rows_table([1, 2, 3]), SITE, out)
    fetch(harvested, rows_table([4]), SITE, out)
    before = out.read_bytes()
    assert np.load(out).shape == (1, 32)
    with pytest.raises(StorageError, match="rows run from 0 to 3732"):
        fetch(harvested, rows_table([5, 10**6]), SITE, out)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (pa.array(["1"]), "found string"),
        (pa.array([1.0]), "found double"),
        (pa.array([True]), "found bool"),
        (pa.array([1, None]), "found 1 of 2 values missing"),
    ],
)
def test_rows_that_are_no_row_numbers(harvested: Store, tmp_path: Path, rows: pa.Array, told: str) -> None:
    with pytest.raises(StorageError, match=rf"`row` must hold row numbers \(integers\); {told}"):
        fetch(harvested, pa.table({"row": rows}), SITE, tmp_path / "x.npy")


def test_the_output_is_checked_before_the_query_runs(tmp_path: Path) -> None:
    check_output(tmp_path / "x.npy")
    with pytest.raises(StorageError, match=r"--out ends in one of \.npy, \.safetensors, \.parquet, not 'x\.NPY'"):
        check_output(tmp_path / "x.NPY")
    with pytest.raises(StorageError, match=r"the folder .*no does not exist"):
        check_output(tmp_path / "no" / "x.npy")


def test_reading_needs_the_path_alone(harvested: Store, tmp_path: Path) -> None:
    assert ask(open_store(str(harvested.path)), "select count(*) as n from rows") == [{"n": harvested.num_rows}]
