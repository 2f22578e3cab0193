"""Growing a store: another table of rows in place of the one it has, which begins with all of its rows.

Invariant: the tables of a store are one chain, each a prefix of the next, whoever grows it and whenever a process dies:
what becomes the next table is decided by one name that is created once (docs/decisions/0012-growing.md).
"""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from storage.backends.place import Place
from storage.errors import StorageError, StoreMismatch
from storage.format.arrays import Array, group_metadata
from storage.format.layout import StoreLayout
from storage.format.records import Record, encode, read_record
from storage.harvest.harvest import writer_id
from storage.make.create import TableFiles, TableSizes, file_digests
from storage.store import Store, open_store
from storage.table.root import CorpusInfo, read_root
from storage.table.table import DOCUMENTS_PER_FILE

TABLE_NAME = re.compile(r"corpus(?:\.(\d+)-[0-9a-f]{8})?")
"""Names of tables' folders: the first, and one that was written to be the n-th."""


@dataclass(frozen=True)
class GrownFiles(TableFiles):
    """The files of a table that is to follow the one of a store. What is written is compared with what that has: raises
    StoreMismatch at the first difference. Entries beyond its end may be anything."""

    root: Place
    before: CorpusInfo

    def write_chunks(self, name: str, start: int, values: Array) -> list[str]:
        old = TableFiles(self.root / self.before.folder, sizes_of(self.before))
        length, _ = old.sizes.arrays()[name]
        length -= name == "context_start"  # whose last entry is where the last context ends: it may go on
        stop = min(start + len(values), length)
        if start < stop:
            stored, new = old.array(name).read(start, stop), values[: stop - start]
            if (differing := np.flatnonzero(stored != new)).size:
                first = int(differing[0])
                raise self._other(f"{name} {start + first} is {stored[first]} in the store and {new[first]} now")
        return super().write_chunks(name, start, values)

    def write_documents(self, part: int, documents: pa.Table) -> str:
        first = part * DOCUMENTS_PER_FILE
        last = min(first + documents.num_rows, self.before.num_documents) - 1
        if first <= last:
            stored = Store(self.root, self.before).documents_between(first, last)
            self._compare_documents(stored, documents.slice(0, stored.num_rows), first)
        return super().write_documents(part, documents)

    def _compare_documents(self, stored: pa.Table, new: pa.Table, first: int) -> None:
        for name in stored.column_names:
            if name == "source":  # a place, which may have another name now
                continue
            # As text, as the moments of subpopulations have them: with more files a label's type may be a wider one.
            values, now = ([str(v) for v in column.to_pylist()] for column in _of_one_type(stored, new, name))
            if name == "row_stop" and first + len(values) == self.before.num_documents:
                values, now = values[:-1], now[:-1]  # the last document may go on
            if values != now:
                at = next(i for i, (a, b) in enumerate(zip(values, now, strict=True)) if a != b)
                raise self._other(f"{name} of document {first + at} is {values[at]} in the store and {now[at]} now")

    def _other(self, what: str) -> StoreMismatch:
        return StoreMismatch(
            f"the rows of the store at {self.root} are not the first of those that the spec gives: {what}. The corpus "
            "has changed, or the tokenizer's library, or this version of Granary reads a record otherwise; nothing was "
            "appended. Harvest into another store"
        )


@dataclass(frozen=True)
class GrowthDraft:
    """A table that is being written to follow that of a store. `finish` makes it the store's."""

    store: Store
    folder: Place

    def begin_table(self, sizes: TableSizes) -> GrownFiles:
        files = GrownFiles(self.folder, sizes, self.store.root, self.store.info)
        files.declare()
        return files

    def finish(self, info: CorpusInfo) -> Store:
        """Make the table, which must be whole, that of the store. Raises StorageError if the store has grown
        meanwhile."""
        before, root = self.store.info, self.store.root
        ended = {name: getattr(before, name) for name in ("corpus_digest", "num_rows", "folder")}
        grown = replace(
            info,
            files=file_digests(self.folder),
            folder=self.folder.name,
            grown_from=[*before.grown_from, ended],
        )
        record = {"generation": grown.generation, "writer": writer_id(), "root": grown.to_record()}
        if not StoreLayout(root).growth(grown.generation).create(encode(record)):
            raise StorageError(
                f"the store at {root} was grown by another process meanwhile: run the command again to see whether "
                "anything is left to append"
            )
        info = settle(root)
        with suppress(OSError, StorageError):  # nothing depends on it, and the next growth does it too
            _remove_old(root, info)
        return open_store(root)


@contextmanager
def grown_table(store: Store) -> Iterator[GrowthDraft]:
    """Write the next table of a store within the block. After it the store has that table, or there is an error and it
    has the one it had."""
    generation = store.info.generation + 1
    folder = store.root / f"corpus.{generation}-{secrets.token_hex(4)}"
    try:
        yield GrowthDraft(store, folder)
    except BaseException as error:
        with suppress(OSError, StorageError):
            if _winner(store.root, generation) != folder.name:
                folder.remove()
        if isinstance(error, OSError):
            raise StorageError(f"the store at {store.root} cannot grow: {error.strerror or error}") from error
        raise


def settle(root: Place) -> CorpusInfo:
    """Finish growths that were decided by a process that died before the root record said so. Return what it says."""
    info = read_root(root)
    generation = info.generation
    while StoreLayout(root).growth(generation + 1).exists():
        generation += 1
    if generation > info.generation:
        info = CorpusInfo.of(read_record(StoreLayout(root).growth(generation))["root"])
        StoreLayout(root).root_record.write(group_metadata({"granary": info.to_record()}))
    return info


def sizes_of(info: CorpusInfo) -> TableSizes:
    """The sizes of a store's table."""
    return TableSizes(
        info.num_rows,
        info.num_contexts,
        info.num_context_tokens,
        info.num_documents,
        has_roles=bool(info.roles),
        row_labels=tuple(info.values_of_rows),
    )


def growth_record(info: CorpusInfo, generation: int) -> Record:
    """What stands for the record of a growth that is lost: that there was one is all that matters of the older ones."""
    root = info.to_record() if generation == info.generation else info.grown_from[generation - 1]
    return {"generation": generation, "writer": None, "root": root}


def tables_kept(info: CorpusInfo) -> list[str]:
    """The folders of tables that readers may have open: the present one, and the one before."""
    return [info.folder, *(table["folder"] for table in info.grown_from[-1:])]


def _winner(root: Place, generation: int) -> str | None:
    """The folder that was decided to be a generation's table."""
    with suppress(FileNotFoundError):
        folder: str = read_record(StoreLayout(root).growth(generation))["root"]["folder"]
        return folder
    return None


def _remove_old(root: Place, info: CorpusInfo) -> None:
    """Remove tables older than the one before the present, and those that were written to be one and lost. Nobody can
    win any more that was to be of this generation or an earlier one; of later ones somebody may be at work."""
    for name in root.names():
        table = TABLE_NAME.fullmatch(name)
        if table and int(table[1] or 1) <= info.generation and name not in tables_kept(info):
            (root / name).remove()


def _of_one_type(stored: pa.Table, new: pa.Table, name: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """A column of both tables. A struct that has more fields in later files has them in all documents then."""
    had, has = stored.column(name), new.column(name)
    if had.type != has.type and pa.types.is_nested(had.type):
        with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            had = had.cast(has.type)
    return had, has
