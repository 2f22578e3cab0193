"""How far a harvest is, from the store alone: for `granary status`, and for whoever looks in from another machine."""

import time
from dataclasses import dataclass

from storage.format.units import UnitSet
from storage.harvest.driver_records import Driver, DriverWatch
from storage.harvest.failures import Failure
from storage.harvest.log import HarvestLog


@dataclass(frozen=True)
class HarvestProgress:
    """Units done, at work and failed."""

    committed: UnitSet
    failed: list[Failure]
    """Set aside, and not committed since."""
    drivers: list[Driver]
    """At work now: their counters moved while we watched."""
    silent: list[str]
    """Ids of drivers whose record did not move: killed, or stopped."""
    unreadable: list[str]
    """A sentence for each driver's record that cannot be read."""

    @property
    def in_flight(self) -> frozenset[int]:
        """Units that actors of live drivers have, and that are not committed."""
        return frozenset(u for driver in self.drivers for u in driver.in_flight if u not in self.committed)

    @property
    def rows_per_second(self) -> float:
        return sum(driver.rows_per_second for driver in self.drivers)


def harvest_progress(log: HarvestLog) -> HarvestProgress:
    """Look at a harvest. Where drivers' records are, this takes a little longer than their interval, to see which
    counters move; else it only reads."""
    watch, records = DriverWatch(), log.drivers()
    first = records.drivers
    watch.observe(first, time.monotonic())
    deadline = time.monotonic() + 1.5 * max((driver.interval_s for driver in first), default=0.0)
    drivers: list[Driver] = []
    while first and len(drivers) < len(first) and time.monotonic() < deadline:
        time.sleep(0.5)
        watch.observe(log.drivers().drivers, time.monotonic())
        drivers = watch.alive(time.monotonic())
    committed = log.committed()
    failed = [unit for unit in log.failed() if unit not in committed]
    living = {driver.id for driver in drivers}
    return HarvestProgress(
        committed,
        [log.failure(unit) for unit in failed],
        drivers,
        [driver.id for driver in first if driver.id not in living],
        records.unreadable,
    )
