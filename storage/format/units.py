"""Units as numbers and names, and sets of them: one byte a unit, so that a million cost a megabyte and no loop."""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

UNIT_DIGITS = 8
"""Digits of a unit in names, so that names sort as numbers."""
UNIT_NAME = rf"\d{{{UNIT_DIGITS}}}(?:-\d+)?"
"""A pattern of the names that units can have."""


@dataclass(frozen=True)
class UnitRanges:
    """How a table of rows is cut into units, and what names each has.

    Invariant: a name determines the rows of its unit in every table that a store ever had, also when the store grows
    (docs/decisions/0012-growing.md): the name of a short unit, the last of a table, says how many rows it has.
    """

    num_rows: int
    rows_per_unit: int

    @property
    def total(self) -> int:
        return -(-self.num_rows // self.rows_per_unit)

    @property
    def short(self) -> int | None:
        """The last unit, if it has fewer rows than the others."""
        return self.total - 1 if self.num_rows % self.rows_per_unit else None

    def rows(self, unit: int) -> tuple[int, int]:
        """The half-open row range of a unit."""
        return unit * self.rows_per_unit, min((unit + 1) * self.rows_per_unit, self.num_rows)

    def name(self, unit: int) -> str:
        """00000012, or for a short unit 00000012-3217: what is written of it is named so."""
        rows = f"-{self.num_rows % self.rows_per_unit}" if unit == self.short else ""
        return f"{unit:0{UNIT_DIGITS}d}{rows}"

    def unit(self, name: str) -> int | None:
        """The unit with this name; None if it is of another table, or no unit's name."""
        number = name[:UNIT_DIGITS]
        if not (number.isascii() and number.isdecimal() and int(number) < self.total):
            return None
        return int(number) if self.name(int(number)) == name else None


def number_of(name: str) -> int:
    """The number in a unit's name."""
    return int(name[:UNIT_DIGITS])


class UnitSet(Set[int]):
    """Some of the units 0 ... total - 1 of a harvest. Equal to any set with the same units."""

    def __init__(self, total: int, units: Iterable[int] | npt.NDArray[np.bool_] = ()):
        """`units`: which, or a mask over all of them (kept, not copied)."""
        if isinstance(units, np.ndarray):
            assert units.shape == (total,)
            assert units.dtype == np.bool_
            self.mask: npt.NDArray[np.bool_] = units
        else:
            self.mask = np.zeros(total, dtype=np.bool_)
            for unit in units:
                self.mask[unit] = True

    @classmethod
    def _from_iterable(cls, units: Iterable[Any]) -> Any:
        return frozenset(units)  # what `&` and `|` of Set give

    @property
    def total(self) -> int:
        return len(self.mask)

    @property
    def is_full(self) -> bool:
        return bool(self.mask.all())

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, int | np.integer) and 0 <= int(unit) < len(self.mask) and bool(self.mask[unit])

    def __iter__(self) -> Iterator[int]:
        """The units in ascending order."""
        return iter(np.flatnonzero(self.mask).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self.mask))

    def add(self, unit: int) -> None:
        self.mask[unit] = True

    def update(self, other: "UnitSet") -> None:
        assert other.total == self.total
        self.mask |= other.mask

    def complement(self) -> "UnitSet":
        return UnitSet(self.total, ~self.mask)

    def copy(self) -> "UnitSet":
        return UnitSet(self.total, self.mask.copy())

    def ranges(self) -> list[tuple[int, int]]:
        """The units as ranges (first, last), both included, ascending."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.mask, [False]]).astype(np.int8)))
        return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]

    def __repr__(self) -> str:
        return f"UnitSet({shown(self)} of {self.total})"


def shown(units: Iterable[int], most: int = 8) -> str:
    """'0-3, 7' for 0, 1, 2, 3, 7; cut after `most` ranges."""
    if isinstance(units, UnitSet):
        ranges = units.ranges()
    else:
        ranges = []
        for unit in sorted(units):
            if ranges and ranges[-1][1] == unit - 1:
                ranges[-1] = (ranges[-1][0], unit)
            else:
                ranges.append((unit, unit))
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges[:most])
    return (text or "none") + (" ..." if len(ranges) > most else "")
