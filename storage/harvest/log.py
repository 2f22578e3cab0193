"""The log of a harvest: which units are committed, which failed, and which drivers are at work on the rest.

Beside the commits lies a bitmap of some of them, so that a store of a million units is opened with a few requests. The
bitmap is a lower bound: whoever reads it lists the blocks that it does not show full. What happens between any two
steps is in docs/decisions/0007-commits-and-supervision.md.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from storage.backends.place import Place
from storage.backends.threads import in_threads
from storage.errors import StorageError, Unreachable
from storage.format.layout import BLOCK_DIGITS, UNITS_PER_BLOCK, StoreLayout
from storage.format.records import encode, read_record
from storage.format.units import UnitRanges, UnitSet
from storage.harvest.commits import Commit
from storage.harvest.driver_records import Driver, DriverRecords
from storage.harvest.failures import Failure
from storage.harvest.harvest import Harvest
from storage.table.table import StoredTable


@dataclass(frozen=True)
class HarvestLog:
    """What the store says of a harvest's units. Holds nothing: every method asks the store."""

    root: Place
    harvest: str
    """The harvest's digest."""
    units: UnitRanges
    """The units of the table as its reader knows it. Commits of a short unit of another table have other names."""

    @property
    def layout(self) -> StoreLayout:
        return StoreLayout(self.root)

    # ---- commits

    def commit_place(self, unit: int) -> Place:
        return self.layout.commit(self.harvest, self.units.name(unit))

    def moments_place(self, unit: int) -> Place:
        return self.layout.moments(self.harvest, self.units.name(unit))

    def is_committed(self, unit: int) -> bool:
        return self.commit_place(unit).exists()

    def read(self, unit: int) -> Commit:
        """Read a unit's commit. Raises StorageError when there is none or it is damaged."""
        place = self.commit_place(unit)
        try:
            record = read_record(place)
        except FileNotFoundError:
            raise StorageError(f"unit {unit} of harvest {self.harvest} has no commit") from None
        if record.get("unit") != unit or record.get("harvest") != self.harvest:
            raise StorageError(f"the commit {place} is of another unit or harvest")
        try:
            return Commit.from_record(record)
        except StorageError as error:
            raise StorageError(f"the commit {place} is damaged: {error}") from None

    def read_some(self, units: Sequence[int]) -> list[Commit]:
        """Read the commits of several units, many at once. Raises StorageError as `read`."""
        return in_threads(self.read, units, self.root.backend.threads)

    def commit(self, commit: Commit) -> bool:
        """Create a unit's commit; return whether this call made it. Raises UnitConflict, if another's says other
        bytes."""
        if self.commit_place(commit.unit).create(encode(commit.to_record())):
            return True
        self.read(commit.unit).require_same(commit)
        return False

    def replace(self, commit: Commit) -> None:
        """Write a commit in the place of one that is damaged or false."""
        self.commit_place(commit.unit).write(encode(commit.to_record()))

    def committed(self) -> UnitSet:
        """The units whose commit is there: one request if the bitmap is full, else one more, and one for each block
        that is begun and not full in it."""
        total = self.units.total
        try:
            units = self.bitmap()
        except StorageError:
            units = UnitSet(total)  # a cache, no more: the listing says the same, and `verify` names the damage
        if units.is_full:
            return units
        names = self.layout.commits(self.harvest).names()
        begun = [int(name) for name in names if len(name) == BLOCK_DIGITS and name.isdecimal()]

        def is_open(block: int) -> bool:
            start = block * UNITS_PER_BLOCK
            return start < total and not units.mask[start : start + UNITS_PER_BLOCK].all()

        listings = in_threads(
            lambda block: self.layout.block(self.harvest, block).names(),
            [block for block in begun if is_open(block)],
            self.root.backend.threads,
        )
        for listed in listings:
            for name in listed:
                unit, _, suffix = name.partition(".")
                number = self.units.unit(unit)
                if suffix == "json" and number is not None:
                    units.add(number)
        return units

    def bitmap(self) -> UnitSet:
        """The bitmap's units; none if it was never written. Raises StorageError when it is damaged.

        It may be of the table as it was before, or is now for others: then a unit that is short in one of the two is
        another unit in the other.
        """
        total = self.units.total
        place = self.layout.bitmap(self.harvest)
        try:
            record = read_record(place)
        except FileNotFoundError:
            return UnitSet(total)
        if record.get("harvest") != self.harvest:
            raise StorageError(f"the bitmap {place} is of another harvest")
        bits = np.frombuffer(base64.b64decode(record["bits"]), dtype=np.uint8)
        mask = np.zeros(total, dtype=np.bool_)
        written = UnitRanges(record["num_rows"], self.units.rows_per_unit)
        known = min(total, written.total)
        mask[:known] = np.unpackbits(bits, count=written.total, bitorder="little")[:known].astype(np.bool_)
        if written != self.units:
            mask[[unit for unit in (written.short, self.units.short) if unit is not None and unit < known]] = False
        return UnitSet(total, mask)

    def compact(self, committed: UnitSet) -> bool:
        """Add units whose commit was seen to the bitmap; return whether there was anything to add."""
        try:
            units = self.bitmap()
        except StorageError:
            units = UnitSet(self.units.total)  # damaged: written anew
        before = len(units)
        units.update(committed)
        if len(units) == before:
            return False
        bits = base64.b64encode(np.packbits(units.mask, bitorder="little").tobytes()).decode()
        record = {"harvest": self.harvest, "num_rows": self.units.num_rows, "bits": bits}
        self.layout.bitmap(self.harvest).write(encode(record))
        return True

    # ---- units that failed

    def failed(self) -> list[int]:
        """The units with a record of their failure, ascending; those committed since included. One request."""
        names = self.layout.failures(self.harvest).names()
        units = (self.units.unit(name.removesuffix(".json")) for name in names if name.endswith(".json"))
        return [unit for unit in units if unit is not None]

    def failure_place(self, unit: int) -> Place:
        return self.layout.failure(self.harvest, self.units.name(unit))

    def failure(self, unit: int) -> Failure:
        """Raises FileNotFoundError if there is no record, StorageError if it is damaged."""
        return Failure.from_record(read_record(self.failure_place(unit)))

    def record_failure(self, failure: Failure) -> None:
        """Write, or replace, a unit's record."""
        self.failure_place(failure.unit).write(encode({"harvest": self.harvest, **asdict(failure)}))

    def clear_failure(self, unit: int) -> None:
        """Forget the record, if there is one: the unit is committed."""
        self.failure_place(unit).remove()

    # ---- drivers

    def drivers(self) -> DriverRecords:
        """Every driver's record. One that is damaged, or of another version, is left out: nothing rests on it."""
        found = DriverRecords([], [])
        folder = self.layout.drivers(self.harvest)
        for name in folder.names():
            place = folder / name
            try:
                found.drivers.append(Driver.from_record(read_record(place)))
            except FileNotFoundError:
                continue  # it ended since
            except Unreachable:
                raise
            except StorageError as error:
                found.unreadable.append(f"{error}; `granary verify {self.root} --repair` removes it")
            except KeyError as error:
                found.unreadable.append(
                    f"the driver's record {place} lacks {error}: another version of Granary wrote it"
                )
        return found

    def write_driver(self, driver: Driver) -> None:
        self.layout.driver(self.harvest, driver.id).write(encode({"harvest": self.harvest, **asdict(driver)}))

    def remove_driver(self, driver: str) -> None:
        self.layout.driver(self.harvest, driver).remove()


def log_of(store: StoredTable, harvest: Harvest | str) -> HarvestLog:
    """The log of one of a store's harvests, or of the harvest with a digest."""
    return HarvestLog(store.root, harvest if isinstance(harvest, str) else harvest.digest, store.info.units)
