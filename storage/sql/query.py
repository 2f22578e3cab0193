"""SQL over a store, through DuckDB.

Tables: `documents`, `rows` (row, token, position, document, context, role where the corpus is chat, and a column for
each label of spans or tokens), `tokens` (token, piece), `units` (one line a unit and harvest) and `sites`. A table is
loaded when the query names it: `rows` takes 24 bytes a row of memory. A query reads these tables and nothing else, and
changes nothing (storage.sql.sandbox); it ends within bounds of time and memory (storage.sql.bounded).
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.backends.local import write_file
from storage.errors import StorageError
from storage.format.arrays import Array
from storage.harvest.harvest import read_harvests
from storage.harvest.log import log_of
from storage.read.reader import StoreReader, as_float32
from storage.sql.answer import Answer, Session
from storage.sql.bounded import Bounds
from storage.sql.sandbox import check_statement, open_sandbox
from storage.table.root import label_columns
from storage.table.token_pieces import token_pieces

OUTPUT_FORMATS = (".npy", ".safetensors", ".parquet")


def sql(
    store: StoreReader,
    query: str,
    *,
    timeout_s: float = Bounds.timeout_s,
    memory_bytes: int = Bounds.memory_bytes,
    allow_files: bool = False,
) -> Answer:
    """Prepare one query, which runs when its result is asked for. Raises StorageError when it is not valid.

    It reads the store's tables and nothing else, and ends within `timeout_s` and `memory_bytes`. `allow_files`: it may
    read local files, too (`'labels.parquet'`, `read_csv('x.csv')`); it never writes one.
    """
    session = Session(
        open_sandbox(memory_bytes=memory_bytes, allow_files=allow_files), Bounds(timeout_s, memory_bytes), in_words
    )
    for name, load in _TABLES.items():
        if re.search(rf"\b{name}\b", query, re.IGNORECASE):
            session.connection.register(name, load(store))
    return session.prepare(query, lambda: check_statement(session.connection, query, allow_files=allow_files))


def in_words(said: str) -> str:
    """DuckDB's message as ours, with what to do where it speaks of its own settings."""
    if "Table with name" in said:  # DuckDB guesses among its own catalogue; ours is in the next line
        said = re.sub(r"\nDid you mean .*", "", said)
    if "disabled by configuration" in said or "disabled through configuration" in said:
        return (
            f"a query reads the store alone: {said.splitlines()[0]}. Local files may be read with --allow-files "
            "(in Python allow_files=True); write files from the result, as from `to_arrow_table()`"
        )
    said = said.partition(", due to the following Python exception")[0]
    return f"the query failed: {said}\nTables: {', '.join(_TABLES)}"


def fetch(store: StoreReader, table: pa.Table, site: str, out: Path) -> tuple[int, ...]:
    """Write the activations of the rows in `table` (it has an integer column `row`) to `out`; return their shape.

    .npy holds float32 [n, d_model]; .safetensors holds "activations" in the stored dtype (int8 as float32) and "row";
    .parquet holds the table with a column `activation` of float32 lists. Rows keep the query's order. Raises
    StorageError.
    """
    check_output(out)
    if table.column_names.count("row") != 1:
        raise StorageError(
            f"to fetch activations the query needs one column `row`; it has {', '.join(table.column_names)}"
        )
    if out.suffix == ".parquet" and "activation" in table.column_names:
        raise StorageError("the query's column `activation` has the name that the activations get: give it another")
    column = table.column("row")
    if not pa.types.is_integer(column.type) or column.null_count:
        found = f"{column.null_count} of {len(column)} values missing" if column.null_count else str(column.type)
        raise StorageError(f"the query's column `row` must hold row numbers (integers); found {found}")
    rows = column.to_numpy()
    try:
        activations = store.read(site, rows)
    except IndexError as error:
        raise StorageError(str(error)) from error
    content = _encoded(table, rows.astype(np.int64), activations, out.suffix)
    try:
        write_file(out, [content])
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from error
    return activations.shape


def check_output(out: Path) -> None:
    """Raise StorageError if activations cannot go to `out`: asked before a query that may take long."""
    if out.suffix not in OUTPUT_FORMATS:
        raise StorageError(f"--out ends in one of {', '.join(OUTPUT_FORMATS)}, not {out.name!r}")
    if not out.parent.is_dir():
        raise StorageError(f"the folder {out.parent} does not exist: make it, or give --out another place")


def _encoded(table: pa.Table, rows: Array, activations: Array, suffix: str) -> Any:
    if suffix == ".safetensors":
        from safetensors.numpy import save

        return save({"activations": activations, "row": rows})
    if suffix == ".npy":
        sink = pa.BufferOutputStream()
        np.save(sink, as_float32(activations))
        return sink.getvalue()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(as_float32(activations).reshape(-1)), activations.shape[1])
    sink = pa.BufferOutputStream()
    pq.write_table(table.append_column("activation", lists), sink, compression="zstd")
    return sink.getvalue()


def rows_table(store: StoreReader, start: int, stop: int, names: Collection[str] | None = None) -> pa.Table:
    """The table `rows`, of the rows [start, stop). `names`: its columns besides `row`; all, if not given."""
    values = store.info.values_of_rows
    labels = label_columns(values)
    read = [name for name in store.info.row_columns if names is None or labels.get(name, name) in names]
    columns: dict[str, Any] = dict(store.columns(start, stop, read))
    if "role" in columns:
        columns["role"] = pa.DictionaryArray.from_arrays(columns["role"], store.info.roles)
    for name, label in labels.items():
        if name not in columns:
            continue
        codes = columns.pop(name)
        numbers = pa.array(codes, mask=codes < 0)  # no value is NULL
        columns[label] = pa.DictionaryArray.from_arrays(numbers, pa.array(values[label], pa.string()))
    return pa.table({"row": np.arange(start, stop), **columns})


def _tokens(store: StoreReader) -> pa.Table:
    pieces = token_pieces(store)
    return pa.table({"token": pa.array(pieces.values(), pa.int32()), "piece": pa.array(pieces.keys(), pa.string())})


def _units(store: StoreReader) -> pa.Table:
    lines = []
    for harvest in read_harvests(store.root):  # as of now
        log = log_of(store, harvest)
        committed = log.committed()
        for unit in range(store.info.num_units):
            start, stop = store.info.unit_rows(unit)
            commit = log.read(unit) if unit in committed else None
            figures = None if commit is None else commit.figures
            lines.append(
                {
                    "harvest": harvest.digest,
                    "unit": unit,
                    "row_start": start,
                    "row_stop": stop,
                    "committed": unit in committed,
                    "writer": None if commit is None else commit.writer,
                    "device": None if figures is None else figures.device,
                    "seconds": None if figures is None else figures.seconds,
                }
            )
    types = [("harvest", pa.string()), ("unit", pa.int64()), ("row_start", pa.int64()), ("row_stop", pa.int64())]
    types += [("committed", pa.bool_()), ("writer", pa.string()), ("device", pa.string()), ("seconds", pa.float64())]
    return pa.Table.from_pylist(lines, schema=pa.schema(types))


def _sites(store: StoreReader) -> pa.Table:
    lines = []
    for harvest in read_harvests(store.root):  # as of now
        done = len(log_of(store, harvest).committed())
        for site, layout in harvest.sites.items():
            about = {"site": site, "model": harvest.model, "harvest": harvest.digest, "dtype": layout.dtype}
            numbers = {"d_model": layout.d, "units_committed": done, "units": store.info.num_units}
            lines.append({**about, **numbers})
    names = [("site", pa.string()), ("model", pa.string()), ("harvest", pa.string()), ("d_model", pa.int64())]
    names += [("dtype", pa.string()), ("units_committed", pa.int64()), ("units", pa.int64())]
    return pa.Table.from_pylist(lines, schema=pa.schema(names))


_TABLES: dict[str, Callable[[StoreReader], pa.Table]] = {
    "documents": lambda store: store.documents,
    "rows": lambda store: rows_table(store, 0, store.num_rows),
    "tokens": _tokens,
    "units": _units,
    "sites": _sites,
}
