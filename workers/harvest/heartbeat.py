"""A driver's life in the store, in a thread of its own: its record, the other drivers, and the bitmap of commits.

Nothing here is needed for the run to be right; it is what lets two drivers share the work, `status` see them, and
readers open a large store quickly. So a failure here is said once and the run goes on.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from storage.errors import StorageError
from storage.format.units import UnitSet
from storage.harvest.driver_records import INTERVAL_S, Driver, DriverWatch
from storage.harvest.log import HarvestLog
from workers.cluster.stopping import say

LOOK_S = 1.0
"""Least time between two looks at the store, where there is a reason not to wait for the next interval."""
COMPACT_S = 60.0
RATE_S = 120.0
"""Seconds over which the rate is taken."""
GOODBYE_S = 10.0
"""How long an end that is not a success waits for a store that does not answer."""


@dataclass(frozen=True)
class News:
    """What was last seen in the store."""

    others: list[Driver]
    """Other drivers that are alive."""
    committed: UnitSet | None
    """Every commit there was; only looked up while there are others, or when `look` was called."""


class Heartbeat:
    """Use as a context manager. `driver` may be replaced at any time with what is to be said next; `news` is what was
    last heard, a new object each time."""

    def __init__(self, log: HarvestLog, driver: Driver, committed: UnitSet):
        """`committed`: units whose commit was seen; the owner adds to it."""
        self.driver = driver
        self.news: News | None = None
        self._log, self._committed = log, committed
        self._watch = DriverWatch(own=driver.id)
        self._rates: deque[tuple[float, int]] = deque()
        self._counter = 0
        self._compacted: float | None = None
        self._silenced = False
        self._ends, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._ends.set()
        self._wake.set()
        self._thread.join(None if error is None else GOODBYE_S)

    def refresh_now(self) -> None:
        """Do not wait for the next interval: a commit of another driver came before ours, so we know too little."""
        self._wake.set()

    def _live(self) -> None:
        while True:
            woken = self._wake.wait(INTERVAL_S - LOOK_S if self._counter else 0)
            self._wake.clear()
            ends = self._ends.is_set()
            try:
                self._once(ends, look=woken)
                self._silenced = False
            except (StorageError, OSError) as failure:
                if not self._silenced:
                    say(f"this driver's record cannot be kept up to date: {failure}")
                self._silenced = True
            if ends:
                return
            self._ends.wait(LOOK_S)

    def _once(self, ends: bool, look: bool) -> None:
        now = time.monotonic()
        self._counter += 1
        if ends:
            self._log.compact(self._committed)
            self._log.remove_driver(self.driver.id)
            return
        said = replace(self.driver, counter=self._counter, rows_per_second=self._rate(now, self.driver.rows_done))
        self._log.write_driver(said)
        self._watch.observe(self._log.drivers().drivers, now)
        others = self._watch.alive(now)
        committed = self._log.committed() if others or look else None
        self.news = News(others, committed)
        for name in self._watch.gone(now):
            self._log.remove_driver(name)
        if self._compacted is None or now - self._compacted > COMPACT_S:
            self._log.compact(self._committed)
            self._compacted = now

    def _rate(self, now: float, rows: int) -> float:
        """Rows per second since the first unit was seen finished: before it workers load, which says nothing."""
        if rows == 0:
            return 0.0
        self._rates.append((now, rows))
        while now - self._rates[0][0] > RATE_S:
            self._rates.popleft()
        seconds = now - self._rates[0][0]
        return (rows - self._rates[0][1]) / seconds if seconds > 0 else 0.0
