"""The table of rows of a store: its documents, columns and contexts, as they are read."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.backends.place import Place
from storage.errors import CorruptChunk, NotAStore, StorageError, StoreGrown
from storage.format.arrays import Array, RowArray
from storage.format.layout import TOKENIZER, documents_file
from storage.table.root import CorpusInfo, read_root

COLUMN_CHUNK_ROWS = 2**18
"""Entries of a chunk of every array under corpus/; part of the format, as the digest is made of digests of chunks."""
DOCUMENTS_PER_FILE = 1_000_000
DOCUMENTS_PER_GROUP = 10_000
"""Document n is in file n // 1,000,000, in its row group (n % 1,000,000) // 10,000."""


class StoredTable:
    """What is known of every row, whatever was harvested. Holds no file open; safe to use from several threads."""

    def __init__(self, root: Place, info: CorpusInfo):
        self.root = root
        self.info = info
        self._arrays: dict[Place, RowArray] = {}
        self._compared_files: set[str] = set()

    @property
    def url(self) -> str:
        """Where the store is, as another process opens it."""
        return str(self.root)

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        return self.root.path

    @property
    def num_rows(self) -> int:
        return self.info.num_rows

    @cached_property
    def documents(self) -> pa.Table:
        """All documents: document, row_start, row_stop (int64), source (string), and every column kept beside them."""
        return self.documents_between(0, self.info.num_documents - 1)

    def documents_between(self, first: int, last: int, names: Sequence[str] | None = None) -> pa.Table:
        """The documents numbered first ... last, both included: `document` and the columns `names`, or all of them.

        A file of documents is read whole the first time, and compared with the root record; after that no more than
        the row groups that are asked for, whose pages have checksums. Raises StorageError.
        """
        tables = []
        for part in range(first // DOCUMENTS_PER_FILE, last // DOCUMENTS_PER_FILE + 1):
            low, high = (
                max(first - part * DOCUMENTS_PER_FILE, 0),
                min(last - part * DOCUMENTS_PER_FILE, DOCUMENTS_PER_FILE),
            )
            path = self.table / documents_file(part)
            try:
                with self.as_opened((OSError,)), closing(self._open_documents(part)) as opened:
                    file = pq.ParquetFile(opened, page_checksum_verification=True)
                    after = min(high // DOCUMENTS_PER_GROUP + 1, file.num_row_groups)
                    groups = list(range(low // DOCUMENTS_PER_GROUP, after))
                    tables.append(file.read_row_groups(groups, None if names is None else ["document", *names]))
            except (pa.ArrowException, OSError) as error:
                raise StorageError(f"the documents in {path} cannot be read: {error}") from None
        table = pa.concat_tables(tables)
        return table.slice(first - table.column("document")[0].as_py(), last - first + 1)

    def _open_documents(self, part: int) -> Any:
        name = documents_file(part)
        if name in self._compared_files:
            return (self.table / name).open()
        content = self.corpus_file(name)
        self._compared_files.add(name)
        return pa.BufferReader(content)

    @property
    def table(self) -> Place:
        """The folder of the table of rows."""
        return self.root / self.info.folder

    @property
    def tokenizer_path(self) -> Place:
        return self.table / TOKENIZER

    def corpus_file(self, name: str) -> bytes:
        """Read a whole file of the table and compare it with the root record. Raises StorageError."""
        path = self.table / name
        with self.as_opened((FileNotFoundError,)):
            content = path.read()
        if hashlib.sha256(content).hexdigest() != self.info.files.get(name):
            raise StorageError(
                f"{path} is not the file that the store was made with: its sha256 is another. Restore it from a copy; "
                "`granary verify STORE` finds all that is damaged"
            )
        return content

    def columns(self, start: int, stop: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Read row columns (all of `info.row_columns`, if not named) of rows [start, stop), each [stop - start]."""
        names = tuple(self.info.row_columns) if names is None else names
        with self.as_opened():
            return {name: self._open_array(self.table / name).read(start, stop) for name in names}

    def context_tokens(self, first: int, last: int) -> list[Array]:
        """Read the tokens of contexts first ... last, both included: an int32 array each, from position 0 to the
        context's last row, positions that are no rows included."""
        with self.as_opened():
            starts = self._open_array(self.table / "context_start").read(first, last + 2)
            tokens = self._open_array(self.table / "context_token").read(int(starts[0]), int(starts[-1]))
        return np.split(tokens, starts[1:-1] - starts[0])

    # ---- what it is read with

    @contextmanager
    def as_opened(self, errors: tuple[type[Exception], ...] = (CorruptChunk, NotAStore)) -> Iterator[None]:
        """Within the block `errors`, which look like damage, are told from a store that has grown since it was opened:
        then raises StoreGrown."""
        try:
            yield
        except errors as error:
            try:
                self.require_newest()
            except StoreGrown as grown:
                raise grown from error
            except (StorageError, OSError):
                pass  # then what was found first is what to say
            raise

    def require_newest(self) -> None:
        """Raise StoreGrown if the store has grown since it was opened."""
        now = read_root(self.root)
        if now.generation > self.info.generation:
            raise StoreGrown(
                f"the store at {self.url} has grown since it was opened, from {self.num_rows:,} to {now.num_rows:,} "
                "rows: open it again, or run the command again"
            )

    def _open_array(self, place: Place) -> RowArray:
        if place not in self._arrays:
            self._arrays[place] = RowArray.open(place)
        return self._arrays[place]
