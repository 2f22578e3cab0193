"""Moments of chosen rows at any number of sites: reductions over blocks of units, here or as Ray tasks.

Invariant: the bytes of a result depend on the store and the choice alone. Sums are added within a block of units in the
order of rows, and the blocks in the order of units; which call has which blocks does not matter. A call holds one slab
of rows at a time, and the sums of one block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.errors import InputError
from storage.format.arrays import Array
from storage.harvest.moments import Moments
from storage.sql.conditions import Conditions
from storage.store import Store, open_store
from workers.cluster.tasks import Tasks

BLOCK_UNITS = 16
"""Units whose sums are added before they are sent. Another number would give other last bits."""
MOST_CALLS = 256
SLAB_BYTES = 2**28
"""Bytes of the float64 rows that are worked on at once. Another number would give other last bits."""
Sums = dict[tuple[str, int], Moments]
"""The sums of each site and number of a subpopulation; those without rows are left out."""


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a store that anchors are made of, as another process finds them."""

    store: str
    model: str | None
    """The model whose sites are meant, in a store of several."""
    num_rows: int
    """Training rows: the first of the store."""
    rows_per_unit: int

    @classmethod
    def of(cls, store: Store) -> "TrainingRows":
        return cls(store.url, store.model, store.info.held_out_start, store.info.rows_per_unit)

    def open(self) -> Store:
        store = open_store(self.store)
        return store if self.model is None else store.for_model(self.model)

    def units(self, block: int) -> Iterator[tuple[int, int]]:
        """The row ranges of the units of a block."""
        size = self.rows_per_unit
        first, last = block * BLOCK_UNITS * size, min((block + 1) * BLOCK_UNITS * size, self.num_rows)
        for start in range(first, last, size):
            yield start, min(start + size, last)

    def calls(self, most: int) -> list[range]:
        """Return all blocks, in at most `most` ranges of about the same length."""
        blocks = -(-self.num_rows // (self.rows_per_unit * BLOCK_UNITS))
        cuts = [blocks * i // most for i in range(most + 1)]
        return [range(a, b) for a, b in pairwise(cuts) if a < b]


@dataclass(frozen=True)
class ByCondition:
    """Subpopulations as SQL conditions."""

    conditions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.conditions)


@dataclass(frozen=True)
class ByNumber:
    """Subpopulations as lists of rows, or of whole contexts."""

    column: str
    """row or context: what is numbered."""
    numbers: tuple[Array, ...]
    """The rows of each subpopulation: int64, ascending."""

    def __len__(self) -> int:
        return len(self.numbers)


Choice = ByCondition | ByNumber


def sums_of(rows: TrainingRows, sites: Sequence[str], choice: Choice, tasks: Tasks, most_calls: int) -> Sums:
    """The moments of every subpopulation at every site, over the training rows. Raises InputError for nan."""
    streams = [
        tasks.stream(block_sums, rows, tuple(sites), _within(choice, rows, blocks), blocks)
        for blocks in rows.calls(most_calls)
    ]
    total: Sums = {}
    for stream in streams:
        for handle in stream:
            (sums,) = tasks.get([handle])
            _add(total, sums)
    return total


def _within(choice: Choice, rows: TrainingRows, blocks: range) -> Choice:
    """What a call needs to know of a choice: of lists of rows those in its blocks."""
    if isinstance(choice, ByCondition) or choice.column != "row":
        return choice
    size = rows.rows_per_unit * BLOCK_UNITS
    return ByNumber("row", tuple(_between(n, blocks.start * size, blocks.stop * size) for n in choice.numbers))


def _between(numbers: Array, start: int, stop: int) -> Array:
    first, last = np.searchsorted(numbers, (start, stop))
    return numbers[first:last]


def _add(total: Sums, more: Mapping[tuple[str, int], Moments]) -> None:
    for key, moments in more.items():
        total[key] = total[key] + moments if key in total else moments


# ---- the calls


def block_sums(rows: TrainingRows, sites: Sequence[str], choice: Choice, blocks: range) -> Iterator[Sums]:
    """The sums of each block."""
    store = rows.open()
    conditions = Conditions(store, choice.conditions) if isinstance(choice, ByCondition) else None
    for block in blocks:
        sums: Sums = {}
        for start, stop in rows.units(block):
            members = conditions.rows(start, stop) if conditions else _numbered(store, choice, start, stop)
            for site in sites if any(map(len, members)) else ():
                _add(sums, unit_sums(store, site, members, start, stop))
        yield sums


def _numbered(store: Store, choice: Choice, start: int, stop: int) -> list[Array]:
    assert isinstance(choice, ByNumber)
    if choice.column == "row":
        return [_between(numbers, start, stop) for numbers in choice.numbers]
    found = store.columns(start, stop, [choice.column])[choice.column]
    return [start + np.flatnonzero(np.isin(found, numbers)) for numbers in choice.numbers]


def unit_sums(store: Store, site: str, members: Sequence[Array], start: int, stop: int) -> Sums:
    """The sums of subpopulations over the rows [start, stop). `members`: the rows of each, ascending."""
    sums: Sums = {}
    for first, last in slabs(store, site, start, stop):
        inside = [_between(numbers, first, last) for numbers in members]
        wanted = np.unique(np.concatenate(inside))
        if not len(wanted):
            continue
        values = read_slab(store, site, slice(first, last) if len(wanted) == last - first else wanted)
        for number, rows in enumerate(inside):
            if len(rows):
                chosen = values[np.searchsorted(wanted, rows)]
                _add(sums, {(site, number): Moments(len(rows), chosen.sum(axis=0), (chosen**2).sum(axis=0))})
    return sums


def slabs(store: Store, site: str, start: int, stop: int, width: int = 0) -> Iterator[tuple[int, int]]:
    """Cut the rows of a unit so that float64 [rows, d_model], and [rows, width], are of a bounded size."""
    size = 1 << max(0, (SLAB_BYTES // (8 * max(store.array(site).shape[1], width))).bit_length() - 1)
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def read_slab(store: Store, site: str, rows: slice | Array) -> Array:
    """Rows of a site as float64. Raises InputError for nan or infinity."""
    values = store.read(site, rows).astype(np.float64)
    if not np.isfinite(values).all():
        wrong = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        row = rows.start + wrong if isinstance(rows, slice) else int(rows[wrong])
        raise InputError(
            f"{site} holds nan or infinity, first in row {row}: no mean can be taken of it. Where the model "
            "overflowed, harvest in bfloat16 or float32 into another store"
        )
    return values
