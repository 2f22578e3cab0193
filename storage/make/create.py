"""Making a store: the table of rows, written once.

Invariant: a store appears whole, under its name, in one step (docs/decisions/0002-making-a-store.md). Until then it
is a private folder beside its place: its files may be written in any order, by any process, in chunks; `finish` gives
it its name.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.backends.backend import PROBE
from storage.backends.place import Place, open_place
from storage.errors import StorageError
from storage.format.arrays import Array, RowArray, write_group
from storage.format.layout import CLAIM, DOCUMENTS, TABLE, TOKENIZER, StoreLayout, documents_file
from storage.format.records import Record, digest, encode, read_record
from storage.harvest.harvest import writer_id
from storage.store import Store, open_store
from storage.table.root import CONTEXT_COLUMNS, CorpusInfo, row_columns
from storage.table.table import COLUMN_CHUNK_ROWS, DOCUMENTS_PER_FILE, DOCUMENTS_PER_GROUP


@dataclass(frozen=True)
class TableSizes:
    """How large the table of rows is, which must be known before any of it is written."""

    num_rows: int
    num_contexts: int
    num_context_tokens: int
    num_documents: int
    has_roles: bool
    row_labels: tuple[str, ...] = ()
    """The names of the labels of rows."""

    @property
    def row_columns(self) -> dict[str, str]:
        return row_columns(self.has_roles, self.row_labels)

    def arrays(self) -> dict[str, tuple[int, str]]:
        """The arrays under corpus/: name -> length and data type."""
        rows = {name: (self.num_rows, dtype) for name, dtype in self.row_columns.items()}
        lengths = {"context_token": self.num_context_tokens, "context_start": self.num_contexts + 1}
        return rows | {name: (lengths[name], dtype) for name, dtype in CONTEXT_COLUMNS.items()}


@dataclass(frozen=True)
class TableFiles:
    """The files of a table that is being written. A small value, which may be sent to other processes."""

    folder: Place
    """corpus/, in the private folder where there is one."""
    sizes: TableSizes

    def declare(self) -> None:
        """Write the metadata of the arrays, before any of their chunks."""
        write_group(self.folder, {})
        for name in self.sizes.arrays():
            self.array(name).create()

    def write_chunks(self, name: str, start: int, values: Array) -> list[str]:
        """Write entries [start, start + len(values)) of an array: whole chunks, or up to its end. Return the sha256 of
        each chunk's values."""
        self.array(name).write(start, values)
        cuts = range(0, len(values), COLUMN_CHUNK_ROWS)
        return [hashlib.sha256(np.ascontiguousarray(values[i : i + COLUMN_CHUNK_ROWS]).data).hexdigest() for i in cuts]

    def write_documents(self, part: int, documents: pa.Table) -> str:
        """Write documents [part * 1,000,000, ...), all that are in that file. Return the sha256 of their content."""
        sink = pa.BufferOutputStream()
        pq.write_table(
            documents, sink, compression="zstd", row_group_size=DOCUMENTS_PER_GROUP, write_page_checksum=True
        )
        (self.folder / documents_file(part)).write(sink.getvalue())
        return documents_digest(documents)

    def write_tokenizer(self, save_tokenizer: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as saved:
            save_tokenizer(Path(saved))
            for file in sorted(path for path in Path(saved).rglob("*") if path.is_file()):  # templates are in a folder
                (self.folder / TOKENIZER / file.relative_to(saved).as_posix()).write(file.read_bytes())

    def array(self, name: str) -> RowArray:
        length, dtype = self.sizes.arrays()[name]
        dimension = {"context_token": "context_token", "context_start": "context"}.get(name, "row")
        return RowArray(self.folder / name, (length,), dtype, COLUMN_CHUNK_ROWS, (dimension,), {})


@dataclass(frozen=True)
class Draft:
    """A store that is being made. `finish` makes it one; what is not finished is not a store."""

    place: Place
    private: Place
    """Where everything is written: a folder beside the store's place on a local disk, the place itself elsewhere."""

    def begin_table(self, sizes: TableSizes) -> TableFiles:
        files = TableFiles(self.private / TABLE, sizes)
        files.declare()
        return files

    def finish(self, info: CorpusInfo) -> Store:
        """Make it a store. Everything else must have been written."""
        files = file_digests(self.private / TABLE)
        layout = StoreLayout(self.place)
        if self.private == self.place and not (layout.claim.exists() or layout.root_record.exists()):
            raise StorageError(
                f"another process that was making the same store at {self.place} failed and removed what was written; "
                "run the command again"
            )
        write_group(self.private, {"granary": replace(info, files=files).to_record()})
        if self.private != self.place:
            self.private.path.rename(self.place.path)  # fails if anything but an empty folder is there
        return open_store(self.place)


@contextmanager
def new_store(url: str | Path | Place, plan: Record) -> Iterator[Draft]:
    """Make a store at `url` within the block. There is a whole store after it, or an error and none: of two that are
    made at once one wins. `plan` determines the table. Raises StorageError when the place holds something else, or the
    disk is full.

    On a local disk everything is written into a private folder, which then takes the name in one step. An object store
    cannot rename: there a claim is written first, which names the plan, and the root record last. A process that finds
    a claim of its own plan goes on with it, as it writes the same objects.
    """
    place = open_place(url)
    refuse_if_taken(place)
    making = _private_folder(place) if place.backend.is_local else _claimed(place, plan)
    with making as draft:
        yield draft


@contextmanager
def _private_folder(place: Place) -> Iterator[Draft]:
    path = place.path
    private = path.with_name(f".{path.name}.creating-{writer_id()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield Draft(place, open_place(private))
    except OSError as error:
        refuse_if_taken(place)
        raise StorageError(f"the store at {path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _claimed(place: Place, plan: Record) -> Iterator[Draft]:
    """The steps, and what is there when the process dies between any two, are in docs/decisions/0009."""
    claim = StoreLayout(place).claim
    mine = encode({"writer": writer_id(), "plan": digest(plan)})
    if not claim.create(mine):
        held = read_record(claim)
        if held.get("plan") != digest(plan):
            raise StorageError(
                f"a store of another table is being made at {place}, by {held.get('writer')}; if that process is dead "
                f"remove {claim} and {place / 'corpus'}"
            )
        claim.write(mine)  # who held it is dead, or a twin: the last to claim is the one that would clean up
    try:
        yield Draft(place, place)
    except (
        StorageError
    ):  # the store itself failed: nothing could be removed either, and the same spec goes on from here
        raise
    except BaseException:
        _give_up(place, mine)
        raise
    claim.remove()


def _give_up(place: Place, claim: bytes) -> None:
    """Remove what was written for a store that will not be made, unless another process has claimed it since."""
    layout = StoreLayout(place)
    if not layout.claim.exists() or layout.claim.read() != claim:
        return
    layout.claim.remove()  # first: a twin that comes to its end finds the claim gone and makes no store
    if not layout.root_record.exists():
        (place / TABLE).remove()


@dataclass(frozen=True)
class Table:
    """The whole table of rows in memory, for small stores."""

    columns: Mapping[str, Array]
    """The row columns (token, position, document, context, and role where the corpus is chat), each [num_rows]."""
    context_token: Array
    """int32 [num_context_tokens]: the tokens of each context up to its last row, context after context."""
    context_start: Array
    """int64 [num_contexts + 1]: context c is context_token[context_start[c] : context_start[c + 1]]."""
    documents: pa.Table
    """document, row_start, row_stop, source, and the label columns."""
    row_labels: tuple[str, ...] = ()
    """The names of the labels of rows, whose numbers are the columns label.0, label.1, ..."""

    @property
    def sizes(self) -> TableSizes:
        return TableSizes(
            num_rows=len(self.columns["token"]),
            num_contexts=len(self.context_start) - 1,
            num_context_tokens=len(self.context_token),
            num_documents=self.documents.num_rows,
            has_roles="role" in self.columns,
            row_labels=self.row_labels,
        )

    @property
    def arrays(self) -> dict[str, Array]:
        return {**self.columns, "context_token": self.context_token, "context_start": self.context_start}


def create_store(
    url: str | Path | Place,
    table: Table,
    info: Callable[[str], CorpusInfo],
    save_tokenizer: Callable[[Path], None],
) -> Store:
    """Write a table as a new store at `url` and open it; see `new_store`. `info` is given the table's digest."""
    with new_store(url, info("").plan) as draft:
        files = draft.begin_table(table.sizes)
        digests = {name: files.write_chunks(name, 0, values) for name, values in table.arrays.items()}
        digests["documents"] = [
            files.write_documents(part, table.documents.slice(start, DOCUMENTS_PER_FILE))
            for part, start in enumerate(range(0, table.documents.num_rows, DOCUMENTS_PER_FILE))
        ]
        files.write_tokenizer(save_tokenizer)
        return draft.finish(info(corpus_digest(digests)))


def corpus_digest(digests: Mapping[str, Sequence[str]]) -> str:
    """The digest of a table from those of its chunks (array name -> chunk after chunk) and documents parts."""
    return digest({name: list(of_chunks) for name, of_chunks in digests.items()})


def documents_digest(documents: pa.Table) -> str:
    """sha256 over a part's columns but `source`, group by group; places and file names stay out of a table's digest."""
    sha = hashlib.sha256()
    for start in range(0, documents.num_rows, DOCUMENTS_PER_GROUP):
        group = documents.slice(start, DOCUMENTS_PER_GROUP)
        for name in group.column_names:
            if name != "source":
                sha.update(json.dumps([name, group.column(name).to_pylist()], default=str).encode())
    return sha.hexdigest()


def sha256_of(place: Place) -> str:
    """The sha256 (hex) of a file of any size."""
    sha = hashlib.sha256()
    with closing(place.open()) as opened:
        while part := opened.read(2**20):
            sha.update(part)
    return sha.hexdigest()


def file_digests(corpus: Place) -> dict[str, str]:
    """The sha256 of each file of a table whose format is not ours, as it was written."""
    keys = sorted(key for kind in (DOCUMENTS, TOKENIZER) for key in corpus.backend.walk((corpus / kind).key))
    return {(place := Place(corpus.backend, key)).below(corpus): sha256_of(place) for key in keys}


def refuse_if_taken(place: Place) -> None:
    """Raise StorageError unless a store can be made at `place`."""
    if StoreLayout(place).root_record.exists():
        raise StorageError(f"there is a store at {place} already")
    if place.backend.is_local:
        path = place.path
        if path.exists() and not path.is_dir():
            raise StorageError(f"{path} is a file; a store is a folder")
        open_place(path.parent).backend.check_writable()  # where it is made, under another name
        names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    else:
        place.backend.check_writable()
        names = [name for name in place.names() if not name.startswith(PROBE)]
        if CLAIM in names:
            return  # whose it is shows when it is claimed
    if names:
        raise StorageError(f"{place} is not an empty folder (it holds {', '.join(names[:3])}); name another place")


def _remove_leftovers(path: Path) -> None:
    """Remove the private folders of processes of this machine that were killed while they made this store."""
    host, _, _ = writer_id().rpartition("-")[0].rpartition("-")
    for folder in path.parent.glob(f".{path.name}.creating-{host}-*"):
        pid = folder.name.rsplit("-", 2)[1]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
