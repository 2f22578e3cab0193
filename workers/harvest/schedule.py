"""Which worker gets which unit next, and which units have failed by their own fault. Pure: no Ray, no clock, no store.

A unit is to do, in flight in one worker, finished, or set aside. When a worker dies or hangs its units go to others
first of all. If it had only one, that unit may be the cause; if it had several they become suspects, and a suspect is
given alone to a worker that has nothing else, so that the next death falls on the right one.

A unit that raised is not given to the same worker again, and counts against the unit only where the worker has shown
that it works, by finishing another: a broken worker (a GPU that fails, a disk that is missing) raises at every unit.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from storage.format.units import UnitSet
from storage.harvest.failures import Failure
from workers.harvest.todo import ToDo

UNITS_IN_FLIGHT = 2
"""Units that a worker has at once: one is computed while the one before is written."""
ATTEMPTS = 3
"""Times a unit may fail by its own fault before it is set aside."""


FAILURES_IN_A_ROW = 2
"""Units that may raise in a worker one after the other before it is replaced."""


@dataclass
class _Attempts:
    errors: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)
    """Those in which it raised."""


class Schedule:
    def __init__(self, todo: ToDo):
        self.todo = todo
        self.in_flight: dict[int, list[int]] = {}
        self.set_aside: dict[int, Failure] = {}
        self._returned: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._alone: set[int] = set()
        self._attempts: dict[int, _Attempts] = {}
        self._raised: dict[int, None] = {}  # units that are to be tried in other workers, the oldest first
        self._works: set[int] = set()  # workers that have finished a unit
        self._in_a_row: dict[int, int] = {}

    @property
    def is_done(self) -> bool:
        return not self.in_flight and not len(self.todo) and not self._raised

    @property
    def most_useful_workers(self) -> int:
        """More workers than this would find nothing to do."""
        return len(self.todo) + len(self._raised) + len(self.in_flight)

    @property
    def waits_for_another_worker(self) -> bool:
        """Nothing is left but units that have raised, and those who may try them are not there."""
        return bool(self._raised) and not self.in_flight and not len(self.todo)

    def give(self, worker: int) -> int | None:
        """A unit for a worker, or None if there is none for it now."""
        has = self.in_flight.get(worker, [])
        if len(has) >= UNITS_IN_FLIGHT or worker in self._alone:
            return None
        self._drop_claimed(self._suspects)
        if self._suspects:
            if has:
                return None  # until every suspect has a worker of its own, nobody gets a second unit
            self._alone.add(worker)
            unit: int | None = self._suspects.popleft()
        else:
            self._drop_claimed(self._returned)
            unit = self._returned.popleft() if self._returned else None
        if unit is not None:
            self.todo.claim(unit)
        elif worker in self._works:
            unit = self._again(worker) if self._raised else None
            unit = self.todo.take() if unit is None else unit
        else:
            unit = self.todo.take()
            unit = self._again(worker) if unit is None else unit
        if unit is not None:
            self.in_flight.setdefault(worker, []).append(unit)
        return unit

    def finished(self, worker: int, unit: int) -> None:
        self._take_from(worker, unit)
        self._attempts.pop(unit, None)
        self._works.add(worker)
        self._in_a_row.pop(worker, None)

    def failed(self, worker: int, unit: int, error: str, writer: str) -> Failure | None:
        """Computing the unit raised. Return its failure if it is set aside now."""
        self._take_from(worker, unit)
        self._in_a_row[worker] = self._in_a_row.get(worker, 0) + 1
        attempts = self._attempts.setdefault(unit, _Attempts())
        attempts.workers.add(worker)
        # Where nothing else is left, a worker cannot show that it works; but one that has may still try this unit.
        counts = worker in self._works or not (len(self.todo) or self._works - attempts.workers)
        failure = self._blame(unit, error, writer) if counts else None
        if failure is None:
            self._raised[unit] = None
        return failure

    def is_useless(self, worker: int) -> bool:
        """Return whether enough units have raised in it, one after the other, that it should be replaced."""
        return self._in_a_row.get(worker, 0) >= FAILURES_IN_A_ROW

    def has_worked(self, worker: int) -> bool:
        return worker in self._works

    def lost(self, worker: int, error: str, writer: str, *, by_itself: bool) -> list[Failure]:
        """A worker died or hangs; `by_itself`: nothing outside (its node, a signal that asks it to end) explains that.
        Return the units that are set aside now."""
        units = self.in_flight.pop(worker, [])
        self._alone.discard(worker)
        self._works.discard(worker)
        self._in_a_row.pop(worker, None)
        if by_itself and len(units) == 1:
            failure = self._blame(units[0], error, writer)
            if failure is not None:
                return [failure]
        for unit in units:
            self.todo.put_back(unit)
        (self._suspects if by_itself else self._returned).extend(units)
        return []

    def committed_elsewhere(self, committed: UnitSet) -> UnitSet:
        """Forget what others have committed; return what was forgotten."""
        dropped = self.todo.drop(committed)
        for unit in [unit for unit in self._raised if unit in committed]:
            del self._raised[unit]
            dropped.add(unit)
        return dropped

    def share(self, elsewhere: Iterable[int] | None) -> None:
        self.todo.share(elsewhere)

    def _again(self, worker: int) -> int | None:
        """A unit that raised in others, if there is one."""
        unit = next((u for u in self._raised if worker not in self._attempts[u].workers), None)
        if unit is not None:
            del self._raised[unit]
        return unit

    def _take_from(self, worker: int, unit: int) -> None:
        units = self.in_flight[worker]
        units.remove(unit)
        if not units:
            del self.in_flight[worker]
        self._alone.discard(worker)

    def _blame(self, unit: int, error: str, writer: str) -> Failure | None:
        attempts = self._attempts.setdefault(unit, _Attempts())
        attempts.errors.append(error)
        attempts.writers.append(writer)
        if len(attempts.errors) < ATTEMPTS:
            return None
        del self._attempts[unit]
        self.set_aside[unit] = Failure(unit, attempts.errors, attempts.writers)
        return self.set_aside[unit]

    def _drop_claimed(self, queue: deque[int]) -> None:
        while queue and queue[0] not in self.todo:  # committed by another driver since
            queue.popleft()
