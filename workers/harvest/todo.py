"""The units that nobody has yet: one byte each, whatever their number, and no pass over all of them for one unit."""

import random
from collections.abc import Iterable

import numpy as np

from storage.format.layout import UNITS_PER_BLOCK
from storage.format.units import UnitSet

STRETCHES = 32
"""Beside another driver, a stretch is this part of what is left, and at most a block of commits."""
DRAWS = 8


class ToDo:
    """Gives out units in ascending order; beside other drivers, in random stretches in which those have none in
    flight."""

    def __init__(self, units: UnitSet, seed: str = ""):
        self._waiting = units.mask.copy()
        self._count = len(units)
        self._next, self._stop = 0, len(self._waiting)
        self._elsewhere: frozenset[int] = frozenset()
        self._shared = False
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, unit: int) -> bool:
        return bool(self._waiting[unit])

    def take(self) -> int | None:
        """The next unit, or None: there is none, or other drivers have all that are left in flight."""
        if self._count == 0:
            return None
        if self._shared and (self._next >= self._stop or self._find(self._next, self._stop) is None):
            self._choose_stretch()
        unit = self._find(self._next, self._stop)
        if unit is None:
            unit = self._find(0, len(self._waiting))
        if unit is not None:
            self.claim(unit)
            self._next = unit + 1
        return unit

    def claim(self, unit: int) -> bool:
        """Take this very unit; False if it is not there any more."""
        if not self._waiting[unit]:
            return False
        self._waiting[unit] = False
        self._count -= 1
        return True

    def put_back(self, unit: int) -> None:
        if not self._waiting[unit]:
            self._waiting[unit] = True
            self._count += 1

    def drop(self, committed: UnitSet) -> UnitSet:
        """Forget units that are committed; return those of them that were still here."""
        dropped = UnitSet(committed.total, self._waiting & committed.mask)
        self._waiting &= ~committed.mask
        self._count -= len(dropped)
        return dropped

    def share(self, elsewhere: Iterable[int] | None) -> None:
        """Other drivers are at work and have these units in flight; None: there is nobody else (any more)."""
        begins = elsewhere is not None and not self._shared
        self._shared = elsewhere is not None
        self._elsewhere = frozenset(elsewhere or ())
        if begins:
            self._stop = self._next  # a stretch of our own, from the next unit on
        elif not self._shared:
            self._stop = len(self._waiting)

    def _find(self, start: int, stop: int) -> int | None:
        """The first waiting unit in [start, stop) that no other driver has in flight."""
        while start < stop:
            offset = int(np.argmax(self._waiting[start:stop]))
            if not self._waiting[start + offset]:
                return None
            if start + offset not in self._elsewhere:
                return start + offset
            start += offset + 1
        return None

    def _choose_stretch(self) -> None:
        waiting = np.flatnonzero(self._waiting)
        length = int(np.clip(len(waiting) // STRETCHES, 1, UNITS_PER_BLOCK))
        for _ in range(DRAWS):
            start = int(waiting[self._random.randrange(len(waiting))]) // length * length
            self._next, self._stop = start, min(start + length, len(self._waiting))
            if not any(self._next <= unit < self._stop for unit in self._elsewhere):
                return
