"""Making a store: the table of rows, written once.

Invariant: a store appears whole, under its name, in one step (docs/decisions/0002-units-and-commits.md).
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.arrays import Array, RowArray, write_group
from storage.errors import StorageError
from storage.files import create_file, write_file
from storage.harvests import writer_id
from storage.store import DOCUMENTS_PER_FILE, DOCUMENTS_PER_GROUP, ROW_COLUMNS, CorpusInfo, Store, open_store

COLUMN_CHUNK_ROWS = 65536


@dataclass(frozen=True)
class Table:
    """The rows of a corpus, before they are written."""

    columns: Mapping[str, Array]
    """token, position (int32), document, context (int64), each [num_rows]."""
    prefix: Array
    """int32 [num_contexts, skip_first]: the tokens of each context that are run but are not rows."""
    documents: pa.Table
    """document, row_start, row_stop, source, and the label columns."""

    @property
    def num_rows(self) -> int:
        return len(self.columns["token"])

    def digest(self) -> str:
        """sha256 over the columns, the prefixes and the documents' ranges and labels; the sources' names stay out."""
        sha = hashlib.sha256()
        for name in ROW_COLUMNS:
            sha.update(np.ascontiguousarray(self.columns[name]).data)
        sha.update(np.ascontiguousarray(self.prefix).data)
        for name in self.documents.column_names:
            if name != "source":
                sha.update(json.dumps([name, self.documents.column(name).to_pylist()], default=str).encode())
        return sha.hexdigest()


def create_store(
    path: Path,
    table: Table,
    info: Callable[[str], CorpusInfo],
    save_tokenizer: Callable[[Path], None],
) -> Store:
    """Write a table as a new store at `path` and open it. `info` is given the table's digest.

    Everything is written into a private folder beside `path`, which then takes the name in one step: there is a whole
    store or none, and of two that are made at once one wins. Raises StorageError, with nothing left behind, when the
    place holds something else or the disk is full.
    """
    refuse_if_taken(path)
    private = path.with_name(f".{path.name}.creating-{writer_id()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        _write_corpus(private / "corpus", table, save_tokenizer)
        write_group(private, {"granary": info(table.digest()).to_record()})
        private.rename(path)  # fails if anything but an empty folder is there
    except OSError as error:
        refuse_if_taken(path)
        raise StorageError(f"the store at {path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return open_store(path)


def refuse_if_taken(path: Path) -> None:
    """Raise StorageError unless a store can be made at `path`."""
    if (path / "zarr.json").exists():
        raise StorageError(f"there is a store at {path} already")
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file; a store is a folder")
    if path.is_dir() and (names := sorted(p.name for p in path.iterdir())):
        raise StorageError(f"{path} is not an empty folder (it holds {', '.join(names[:3])}); name another place")


def _remove_leftovers(path: Path) -> None:
    """Remove the private folders of processes of this machine that were killed while they made this store."""
    host, _, _ = writer_id().rpartition("-")[0].rpartition("-")
    for folder in path.parent.glob(f".{path.name}.creating-{host}-*"):
        pid = folder.name.rsplit("-", 2)[1]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _write_corpus(folder: Path, table: Table, save_tokenizer: Callable[[Path], None]) -> None:
    for name, dtype in ROW_COLUMNS.items():
        column = RowArray(folder / name, (table.num_rows,), dtype, COLUMN_CHUNK_ROWS, ("row",), {})
        column.create()
        column.write(0, table.columns[name])
    if table.prefix.shape[1]:  # with skip_first 0 there is no prefix, and no array
        shape = table.prefix.shape
        prefix = RowArray(folder / "prefix", shape, "int32", COLUMN_CHUNK_ROWS, ("context", "position"), {})
        prefix.create()
        prefix.write(0, table.prefix)
    create_file(folder / "zarr.json", json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode())
    for part, start in enumerate(range(0, table.documents.num_rows, DOCUMENTS_PER_FILE)):
        sink = pa.BufferOutputStream()
        documents = table.documents.slice(start, DOCUMENTS_PER_FILE)
        pq.write_table(documents, sink, compression="zstd", row_group_size=DOCUMENTS_PER_GROUP)
        write_file(folder / "documents" / f"part-{part:05d}.parquet", [sink.getvalue()])
    with tempfile.TemporaryDirectory() as saved:
        save_tokenizer(Path(saved))
        for file in sorted(Path(saved).iterdir()):
            write_file(folder / "tokenizer" / file.name, [file.read_bytes()])
