"""Making a store: the table of rows, written once.

Invariant: the root record is the last thing written, create-only. A folder without it is not a store; what an
interrupted attempt left there is overwritten by the next one, and removed when the attempt fails with an error.
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
from storage.records import Record
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
    extra: Record | None = None,
) -> Store:
    """Write a table as a new store at `path` and open it. `info` is given the table's digest.

    Raises StorageError, with nothing written, when the place holds something else, and StorageError with everything
    removed again when the disk is full.
    """
    if (path / "zarr.json").exists():
        raise StorageError(f"there is a store at {path} already")
    foreign = [p.name for p in path.iterdir() if p.name != "corpus"] if path.is_dir() else []
    if foreign or (path.exists() and not path.is_dir()):
        raise StorageError(f"{path} is not an empty folder (it holds {', '.join(foreign[:3]) or 'a file'})")
    existed = path.exists()
    try:
        _write_corpus(path / "corpus", table, save_tokenizer)
        root = {"granary": {**info(table.digest()).to_record(), **(extra or {})}}
        write_group(path, root)
    except BaseException as error:
        shutil.rmtree(path / "corpus", ignore_errors=True)
        if not existed:
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise StorageError(f"the store at {path} cannot be written: {error.strerror or error}") from error
        raise
    return open_store(path)


def _write_corpus(folder: Path, table: Table, save_tokenizer: Callable[[Path], None]) -> None:
    for name, dtype in ROW_COLUMNS.items():
        column = RowArray(folder / name, (table.num_rows,), dtype, COLUMN_CHUNK_ROWS, ("row",), {})
        column.create()
        column.write(0, table.columns[name])
    prefix = RowArray(folder / "prefix", table.prefix.shape, "int32", COLUMN_CHUNK_ROWS, ("context", "position"), {})
    prefix.create()
    if prefix.row_bytes:
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
