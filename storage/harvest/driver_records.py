"""Drivers at work on a harvest: each keeps one small record in the store, with a counter that it moves.

A driver lives if its counter moves while somebody watches, by the watcher's own monotonic clock: times of two machines
are never compared. A record whose counter stands still is what a killed driver left.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from storage.format.records import Record

INTERVAL_S = 5.0
"""Seconds between two records of a driver: 0.3 requests a second and driver, listing included."""
ALIVE_S = 30.0
"""Seconds within which the counter of a driver that is alive has moved: six intervals, for stores that answer
slowly."""
GONE_S = 600.0
"""A record that stood still for so long is removed by whoever watched it."""


@dataclass(frozen=True)
class Driver:
    """What a driver says of its run."""

    id: str
    """Host, pid and a random part: no other process has had it."""
    counter: int = 0
    """Goes up with every record."""
    interval_s: float = INTERVAL_S
    workers: int = 0
    """Actors that hold the model or are loading it."""
    units_done: int = 0
    """Since the driver began, as are the next two."""
    rows_done: int = 0
    rows_per_second: float = 0.0
    """Over the last minutes, by the driver's own clock."""
    in_flight: list[int] = field(default_factory=list)
    """Units that actors have now."""
    set_aside: list[int] = field(default_factory=list)
    """Units that failed by their own fault in this run."""

    @classmethod
    def from_record(cls, record: Record) -> "Driver":
        """Raises KeyError for a field that a record of another version lacks."""
        return cls(**{f.name: record[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class DriverRecords:
    """What lies among the records of drivers."""

    drivers: list[Driver]
    """Those at work, and those that were killed."""
    unreadable: list[str]
    """A sentence for each record that is left out."""


class DriverWatch:
    """Tells which drivers live, from what their records said at several times of the watcher's monotonic clock."""

    def __init__(self, own: str = ""):
        """`own`: the watcher's own id, if it is a driver."""
        self._own = own
        self._seen: dict[str, tuple[Driver, float, bool]] = {}  # id -> record, when it changed, ever moved?

    def observe(self, drivers: Iterable[Driver], now: float) -> None:
        seen = {}
        for driver in drivers:
            before = self._seen.get(driver.id)
            if driver.id == self._own:
                continue
            if before is None:
                seen[driver.id] = (driver, now, False)
            elif before[0].counter != driver.counter:
                seen[driver.id] = (driver, now, True)
            else:
                seen[driver.id] = (driver, before[1], before[2])
        self._seen = seen

    def alive(self, now: float) -> list[Driver]:
        """Those whose counter has moved while they were watched, last within ALIVE_S."""
        return [driver for driver, since, moved in self._seen.values() if moved and now - since < ALIVE_S]

    def gone(self, now: float) -> list[str]:
        """The ids of those that stood still for GONE_S."""
        return [name for name, (_, since, _) in self._seen.items() if now - since > GONE_S]
