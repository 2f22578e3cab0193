"""Reading the rows of a store's sites.

Invariant: a row is given out only when its unit is committed, and only from chunks whose checksum was compared. What
is missing or damaged is an error that names it, never a row of zeros.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from storage.backends.place import Place
from storage.errors import StorageError, UncommittedRows
from storage.format.arrays import Array, RowArray
from storage.format.layout import StoreLayout
from storage.format.site_refs import SiteRef
from storage.format.site_rows import SiteRows
from storage.format.units import UnitSet, shown
from storage.harvest.harvest import CHECKSUMS, Harvest, read_harvests
from storage.harvest.log import log_of
from storage.table.root import CorpusInfo
from storage.table.table import StoredTable

RowIndex = slice | Sequence[int] | Array


class StoreReader(StoredTable):
    """The rows of a store's sites. Cheap to make; holds no file open; safe to use from several threads."""

    def __init__(self, root: Place, info: CorpusInfo, model: str | None = None):
        """`model`: the model whose sites bare names mean, for a store that holds several (see `for_model`)."""
        super().__init__(root, info)
        self.model = model
        self._harvests: list[Harvest] | None = None
        self._found: dict[str, tuple[Harvest, str]] = {}
        self._committed: dict[str, UnitSet] = {}  # by harvest, as of when it was last asked for
        self._expected: dict[Place, dict[int, int]] = {}  # of an array's chunks, the crc32c that a commit says
        self._compared: set[tuple[str, str, int]] = set()  # harvest, site and unit whose chunks are in there

    def for_model(self, model: str) -> Self:
        """The same store, with bare site names meaning those of `model` (its name under activations/)."""
        return type(self)(self.root, self.info, model)

    # ---- activations

    @property
    def harvests(self) -> list[Harvest]:
        """Every harvest that was begun on this store, oldest first: read once, and again by `refresh`."""
        if self._harvests is None:
            self._harvests = read_harvests(self.root)
        return list(self._harvests)

    def refresh(self) -> Self:
        """Forget which harvests there are, so that those begun since show in `harvests` and `sites`; return self."""
        self._harvests = None
        return self

    @property
    def sites(self) -> list[str]:
        """The sites that are stored or being stored; `<model>/<site>` where the store holds several models."""
        harvests = [h for h in self.harvests if self.model in (None, h.model)]
        several = len({h.model for h in harvests}) > 1
        return [str(SiteRef(site, h.model if several else None)) for h in harvests for site in h.sites]

    def find(self, site: str) -> tuple[Harvest, str]:
        """Return the harvest that holds `site` ("resid_post.8" or "<model>/resid_post.8") and the bare site name."""
        if site in self._found:  # a harvest's record never changes
            return self._found[site]
        ref = SiteRef.parse(site)
        ref = SiteRef(ref.site, ref.model or self.model)
        found = self._holding(ref) or self.refresh()._holding(ref)
        if not found:
            raise StorageError(f"{site} is not in the store; it has {', '.join(self.sites) or 'no activations yet'}")
        if len({h.model for h in found}) > 1:
            choices = ", ".join(str(SiteRef(ref.site, h.model)) for h in found)
            raise StorageError(f"{site} is stored for several models; name one of {choices}")
        self._found[site] = found[0], ref.site
        return self._found[site]

    def _holding(self, ref: SiteRef) -> list[Harvest]:
        return [h for h in self.harvests if ref.site in h.sites and ref.model in (None, h.model)]

    def committed(self, site: str) -> UnitSet:
        """The units of `site` that may be read, as of now."""
        harvest, _ = self.find(site)
        self._committed[harvest.digest] = log_of(self, harvest).committed()
        return self._committed[harvest.digest]

    def array(self, site: str, kind: str = "activations") -> RowArray:
        """The Zarr array of a site as it is stored, without any check of commits. `kind`: activations, norms (float32),
        or for int8 the scales (float32) of its rows."""
        harvest, name = self.find(site)
        layout = harvest.sites[name]
        if kind not in layout.kinds:
            raise StorageError(f"{site} has no {kind}: it is stored as {layout.dtype}")
        place = StoreLayout(self.root).array(kind, harvest.model, name)
        if place not in self._arrays:
            array = RowArray.open(place)
            shape = (self.num_rows, *array.shape[1:])  # the metadata may be of fewer rows until a driver looks at it
            self._arrays[place] = replace(array, shape=shape, expected=self._expected.setdefault(place, {}))
        return self._arrays[place]

    def site_rows(self, site: str) -> SiteRows:
        """The rows of a site as `read` gives them, without any check of commits."""
        values = self.array(site)
        return SiteRows(values, self.array(site, "scales") if values.dtype == "int8" else None)

    def read(self, site: str, rows: RowIndex | None = None) -> Array:
        """Read activations [rows, d_model] in the stored dtype (bfloat16 as ml_dtypes.bfloat16), int8 as float32.

        `rows`: a slice, a boolean mask over all rows, or integers in any order; repeated rows are given twice.
        Raises UncommittedRows, IndexError, or CorruptChunk.
        """
        return self._gather(site, self.site_rows(site), rows)

    def read_stored(self, site: str, rows: RowIndex | None = None) -> tuple[Array, Array | None]:
        """Read activations as they are stored, with the float32 scales [rows] of int8 rows; else as `read`."""
        values = self._gather(site, self.array(site), rows)
        return values, self._gather(site, self.array(site, "scales"), rows) if values.dtype == np.int8 else None

    def norms(self, site: str, rows: RowIndex | None = None) -> Array:
        """Read the L2 norms (float32 [rows]) of a site's stored rows; same `rows` and errors as `read`."""
        return self._gather(site, self.array(site, "norms"), rows)

    def require_committed(self, site: str, units: Sequence[int]) -> None:
        """Raise UncommittedRows, naming the units, unless every one of `units` is committed for `site`."""
        harvest, name = self.find(site)
        committed = self._committed.get(harvest.digest, ())
        if not all(u in committed for u in units):  # a commit is never removed: only what is missing is asked for again
            committed = self.committed(site)
        missing = [u for u in units if u not in committed]
        if missing:
            raise UncommittedRows(
                f"{len(missing)} of the {len(units)} units asked for are not harvested for {site}: "
                f"{shown(missing)} (units are {self.info.rows_per_unit} rows); run `granary harvest` first"
            )
        for seam in self.info.seams.intersection(units):
            self._expect_committed(harvest, name, seam)

    def _expect_committed(self, harvest: Harvest, site: str, seam: int) -> None:
        """From now on compare the chunks of a unit with its commit, not only with their own checksums: a writer from
        before the store grew may have put its own in their place, which are sound and have zeros at their end."""
        if (harvest.digest, site, seam) in self._compared:
            return
        commit = log_of(self, harvest).read(seam)
        for kind in harvest.sites[site].kinds:
            array = self.array(str(SiteRef(site, harvest.model)), kind)
            first = self.info.unit_rows(seam)[0] // array.chunk_rows
            self._expected[array.path].update(enumerate(commit.sites[site][CHECKSUMS[kind]], first))
        self._compared.add((harvest.digest, site, seam))

    def _gather(self, site: str, array: RowArray | SiteRows, rows: RowIndex | None) -> Array:
        with self.as_opened():
            return self._gathered(site, array, self._row_numbers(rows))

    def _gathered(self, site: str, array: RowArray | SiteRows, index: range | Array) -> Array:
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, rows={self.num_rows})"  # what is known without asking the place


def as_float32(values: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Widen stored activations to float32, exactly."""
    return values.astype(np.float32)
