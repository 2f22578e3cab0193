"""Which worker gets which unit next, and which units have failed by their own fault. Pure: no Ray, no clock, no store.

A unit is to do, in flight in one worker, finished, or set aside. When a worker dies or hangs its units go to others
first of all. If it had only one, that unit may be the cause; if it had several they become suspects, and a suspect is
given alone to a worker that has nothing else, so that the next death falls on the right one.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from storage.failures import Failure
from storage.unitsets import UnitSet
from workers.todo import ToDo

UNITS_IN_FLIGHT = 2
"""Units that a worker has at once: one is computed while the one before is written."""
ATTEMPTS = 3
"""Times a unit may fail by its own fault before it is set aside."""


@dataclass
class _Attempts:
    errors: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)


class Schedule:
    def __init__(self, todo: ToDo):
        self.todo = todo
        self.in_flight: dict[int, list[int]] = {}
        self.set_aside: dict[int, Failure] = {}
        self._returned: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._alone: set[int] = set()
        self._attempts: dict[int, _Attempts] = {}

    @property
    def is_done(self) -> bool:
        return not self.in_flight and not len(self.todo)

    @property
    def most_useful_workers(self) -> int:
        """More workers than this would find nothing to do."""
        return len(self.todo) + len(self.in_flight)

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
        if unit is None:
            unit = self.todo.take()
        else:
            self.todo.claim(unit)
        if unit is not None:
            self.in_flight.setdefault(worker, []).append(unit)
        return unit

    def finished(self, worker: int, unit: int) -> None:
        self._take_from(worker, unit)
        self._attempts.pop(unit, None)

    def failed(self, worker: int, unit: int, error: str, writer: str) -> Failure | None:
        """Computing the unit raised. Return its failure if it is set aside now."""
        self._take_from(worker, unit)
        failure = self._blame(unit, error, writer)
        if failure is None:
            self.todo.put_back(unit)
            self._returned.append(unit)
        return failure

    def lost(self, worker: int, error: str, writer: str, *, by_itself: bool) -> list[Failure]:
        """A worker died or hangs; `by_itself`: nothing outside (its node, a signal that asks it to end) explains that.
        Return the units that are set aside now."""
        units = self.in_flight.pop(worker, [])
        self._alone.discard(worker)
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
        return self.todo.drop(committed)

    def share(self, elsewhere: Iterable[int] | None) -> None:
        self.todo.share(elsewhere)

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
