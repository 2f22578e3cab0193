"""Opening a store and reading its rows.

Invariant: a row is given out only when its unit is committed, and only from chunks whose checksum was compared. What
is missing or damaged is an error that names it, never a row of zeros.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.arrays import Array, RowArray
from storage.errors import NotAStore, StorageError, UncommittedRows
from storage.harvests import Harvest, committed_units, read_harvests
from storage.records import Record, read_record

if TYPE_CHECKING:
    import duckdb

FORMAT = 1
ROW_COLUMNS = {"token": "int32", "position": "int32", "document": "int64", "context": "int64"}
"""The row columns under corpus/ and their data types."""

DOCUMENTS_PER_FILE = 1_000_000
DOCUMENTS_PER_GROUP = 10_000
"""Document n is in file n // 1,000,000, in its row group (n % 1,000,000) // 10,000."""

RowIndex = slice | Sequence[int] | Array


@dataclass(frozen=True)
class CorpusInfo:
    """What the root group says of the table of rows: its size and everything that determined it."""

    num_rows: int
    num_contexts: int
    num_documents: int
    rows_per_unit: int
    context: int
    """Tokens a context has at most, BOS included."""
    skip_first: int
    """Positions dropped at the start of every context; their tokens are in corpus/prefix."""
    held_out_start: int
    """Rows from here on (whole units) are never trained on; equals num_rows when nothing is held out."""
    labels: list[str]
    corpus_digest: str
    tokenizer_digest: str
    plan: Record
    """What determines the table: columns, context policy, seed, source fingerprints."""
    skipped: Record
    """Source records that gave no rows, counted by reason, with the keys of the first few."""
    made_with: Record

    @property
    def num_units(self) -> int:
        return -(-self.num_rows // self.rows_per_unit)

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """The half-open row range of a unit."""
        return unit * self.rows_per_unit, min((unit + 1) * self.rows_per_unit, self.num_rows)

    def to_record(self) -> Record:
        return {"format": FORMAT, **asdict(self)}


def local_path(url: str | Path) -> Path:
    """Resolve a store's place. Raises StorageError for a URL that is not a local path: format 1 is local so far."""
    scheme = urlsplit(str(url)).scheme
    if scheme == "file":
        return Path(urlsplit(str(url)).path)
    if scheme and len(scheme) > 1:
        raise StorageError(f"stores on {scheme}:// are not supported yet; use a path on a disk that all workers share")
    return Path(url).expanduser().absolute()


def open_store(url: str | Path) -> "Store":
    """Open the store at a local path. Raises NotAStore when there is none, or it is of another format version."""
    path = local_path(url)
    if not (path / "zarr.json").is_file():
        raise NotAStore(f"no store at {path}: `granary harvest SPEC` makes one")
    attributes = read_record(path / "zarr.json").get("attributes", {}).get("granary")
    if not isinstance(attributes, dict) or "format" not in attributes:
        raise NotAStore(f"{path} is a Zarr group but not a Granary store")
    if attributes["format"] != FORMAT:
        raise NotAStore(
            f"the store at {path} has format {attributes['format']!r}; this version of Granary reads format {FORMAT}"
        )
    fields = {name: value for name, value in attributes.items() if name != "format"}
    try:
        return Store(path, CorpusInfo(**fields))
    except TypeError as error:
        raise NotAStore(f"the root record of {path} is damaged: {error}") from None


class Store:
    """A store that is open for reading. Cheap to make; holds no file open; safe to use from several threads."""

    def __init__(self, path: Path, info: CorpusInfo, model: str | None = None):
        """`model`: the model whose sites bare names mean, for a store that holds several (see `for_model`)."""
        self.path = path
        self.info = info
        self.model = model

    def for_model(self, model: str) -> "Store":
        """The same store, with bare site names meaning those of `model` (its name under activations/)."""
        return Store(self.path, self.info, model)

    @property
    def num_rows(self) -> int:
        return self.info.num_rows

    @cached_property
    def documents(self) -> pa.Table:
        """All documents: document, row_start, row_stop (int64), source (string), and every label column."""
        return self.documents_between(0, self.info.num_documents - 1)

    def documents_between(self, first: int, last: int) -> pa.Table:
        """The documents numbered first ... last, both included, reading no more than the row groups they are in."""
        tables = []
        for part in range(first // DOCUMENTS_PER_FILE, last // DOCUMENTS_PER_FILE + 1):
            low, high = (
                max(first - part * DOCUMENTS_PER_FILE, 0),
                min(last - part * DOCUMENTS_PER_FILE, DOCUMENTS_PER_FILE),
            )
            path = self.path / "corpus" / "documents" / f"part-{part:05d}.parquet"
            try:
                file = pq.ParquetFile(path)
                groups = range(low // DOCUMENTS_PER_GROUP, min(high // DOCUMENTS_PER_GROUP + 1, file.num_row_groups))
                tables.append(file.read_row_groups(list(groups)))
            except (pa.ArrowException, OSError) as error:
                raise StorageError(f"the documents in {path} cannot be read: {error}") from None
        table = pa.concat_tables(tables)
        return table.slice(first - table.column("document")[0].as_py(), last - first + 1)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "corpus" / "tokenizer"

    def columns(self, start: int, stop: int, names: Sequence[str] = tuple(ROW_COLUMNS)) -> dict[str, Array]:
        """Read row columns (token, position, document, context) of rows [start, stop), each a [stop - start] array."""
        return {name: RowArray.open(self.path / "corpus" / name).read(start, stop) for name in names}

    def prefix(self, start: int, stop: int) -> Array:
        """Read the dropped leading tokens of contexts [start, stop): int32 [stop - start, skip_first]."""
        if self.info.skip_first == 0:
            return np.zeros((stop - start, 0), dtype=np.int32)
        return RowArray.open(self.path / "corpus" / "prefix").read(start, stop)

    # ---- activations

    @property
    def harvests(self) -> list[Harvest]:
        """Every harvest that was begun on this store, oldest first."""
        return read_harvests(self.path)

    @property
    def sites(self) -> list[str]:
        """The sites that are stored or being stored; `<model>/<site>` where the store holds several models."""
        harvests = [h for h in self.harvests if self.model in (None, h.model)]
        several = len({h.model for h in harvests}) > 1
        return [f"{h.model}/{site}" if several else site for h in harvests for site in h.sites]

    def find(self, site: str) -> tuple[Harvest, str]:
        """Return the harvest that holds `site` ("resid_post.8" or "<model>/resid_post.8") and the bare site name."""
        model, _, name = site.rpartition("/")
        model = model or self.model or ""
        found = [h for h in self.harvests if name in h.sites and model in ("", h.model)]
        if not found:
            raise StorageError(f"{site} is not in the store; it has {', '.join(self.sites) or 'no activations yet'}")
        if len({h.model for h in found}) > 1:
            choices = ", ".join(f"{h.model}/{name}" for h in found)
            raise StorageError(f"{site} is stored for several models; name one of {choices}")
        return found[0], name

    def committed(self, site: str) -> frozenset[int]:
        """The units of `site` that may be read."""
        harvest, _ = self.find(site)
        return committed_units(self.path, harvest.digest)

    def array(self, site: str) -> RowArray:
        """The Zarr array of a site, without any check of commits."""
        harvest, name = self.find(site)
        return RowArray.open(self.path / "activations" / harvest.model / name)

    def norm_array(self, site: str) -> RowArray:
        """The array of a site's row norms (float32), without any check of commits."""
        harvest, name = self.find(site)
        return RowArray.open(self.path / "norms" / harvest.model / name)

    def read(self, site: str, rows: RowIndex | None = None) -> Array:
        """Read activations [rows, d_model] in the stored dtype (bfloat16 as ml_dtypes.bfloat16).

        `rows`: a slice, a boolean mask over all rows, or integers in any order; repeated rows are given twice.
        Raises UncommittedRows, IndexError, or CorruptChunk.
        """
        return self._gather(site, self.array(site), rows)

    def norms(self, site: str, rows: RowIndex | None = None) -> Array:
        """Read the L2 norms (float32 [rows]) of a site's stored rows; same `rows` and errors as `read`."""
        return self._gather(site, self.norm_array(site), rows)

    def require_committed(self, site: str, units: Sequence[int]) -> None:
        """Raise UncommittedRows, naming the units, unless every one of `units` is committed for `site`."""
        committed = self.committed(site)
        missing = [u for u in units if u not in committed]
        if missing:
            raise UncommittedRows(
                f"{len(missing)} of the {len(units)} units asked for are not harvested for {site}: "
                f"{_ranges(missing)} (units are {self.info.rows_per_unit} rows); run `granary harvest` first"
            )

    def _gather(self, site: str, array: RowArray, rows: RowIndex | None) -> Array:
        index = self._row_numbers(rows)
        if isinstance(index, range):
            if len(index) == 0:
                return array.read(0, 0)
            self.require_committed(site, range(index[0] // self.info.rows_per_unit, self._unit_after(index[-1])))
            return array.read(index[0], index[-1] + 1)
        self.require_committed(site, np.unique(index // self.info.rows_per_unit).tolist())
        out = np.empty((len(index), *array.shape[1:]), dtype=array.numpy_dtype)
        chunk_of = index // array.chunk_rows
        order = np.argsort(chunk_of, kind="stable")
        bounds = np.flatnonzero(np.diff(chunk_of[order])) + 1
        for members in np.split(order, bounds) if len(order) else []:
            first = int(chunk_of[members[0]]) * array.chunk_rows
            chunk = array.read(first, min(first + array.chunk_rows, array.shape[0]))
            out[members] = chunk[index[members] - first]
        return out

    def _row_numbers(self, rows: RowIndex | None) -> range | Array:
        if rows is None:
            return range(self.num_rows)
        if isinstance(rows, slice):
            asked = range(*rows.indices(self.num_rows))
            return asked if asked.step == 1 else np.asarray(asked, dtype=np.int64)
        index = np.asarray(rows)
        if index.dtype == np.bool_:
            if index.shape != (self.num_rows,):
                raise IndexError(f"a row mask has one entry for each of {self.num_rows} rows, not shape {index.shape}")
            return np.flatnonzero(index)
        if index.size == 0:
            return np.zeros(0, dtype=np.int64)
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"rows are a slice, a mask or a 1-d list of integers, not {index.dtype} {index.shape}")
        if index.min() < 0 or index.max() >= self.num_rows:
            raise IndexError(f"rows run from 0 to {self.num_rows - 1}; asked for {index.min()} to {index.max()}")
        return index.astype(np.int64)

    def _unit_after(self, row: int) -> int:
        return row // self.info.rows_per_unit + 1

    # ---- ways through the rows that live in their own modules

    def stream(
        self, sites: Sequence[str], *, batch_rows: int, seed: int = 0, start_step: int = 0, steps: int | None = None
    ) -> Iterator[dict[str, Array]]:
        """Yield shuffled batches {site: [batch_rows, d_model]} of rows that are not held out; see storage.stream."""
        from storage.stream import stream

        return stream(self, sites, batch_rows=batch_rows, seed=seed, start_step=start_step, steps=steps)

    def sql(self, query: str) -> "duckdb.DuckDBPyRelation":
        """Run SQL over the tables documents, rows, units and sites; see storage.query."""
        from storage.query import sql

        return sql(self, query)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, rows={self.num_rows}, sites={self.sites})"


def _ranges(units: Sequence[int]) -> str:
    """'0-3, 7' for [0, 1, 2, 3, 7], cut after eight ranges."""
    ranges: list[list[int]] = []
    for unit in sorted(units):
        if ranges and ranges[-1][1] == unit - 1:
            ranges[-1][1] = unit
        else:
            ranges.append([unit, unit])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges[:8])
    return text + (" ..." if len(ranges) > 8 else "")


def as_float32(values: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Widen stored activations to float32, exactly."""
    return values.astype(np.float32)
