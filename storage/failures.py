"""Units that were set aside: what they failed with, so that people see it and the next run tries them again.

A record says nothing about a unit that is committed since; the next driver removes it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from storage.places import Place
from storage.records import Record, encode, read_record
from storage.unitsets import UnitRanges


@dataclass(frozen=True)
class Failure:
    """A unit that failed by its own fault as often as it is tried in one run."""

    unit: int
    errors: Sequence[str]
    """One for each attempt, oldest first."""
    writers: Sequence[str]
    """Who tried, attempt by attempt."""
    made_with: Record = field(default_factory=dict)
    """Library versions, for people."""


def failure_path(store: Place, harvest: str, name: str) -> Place:
    """`name`: the unit's, which `UnitRanges.name` gives."""
    return store / "failures" / harvest / f"{name}.json"


def record_failure(store: Place, harvest: str, name: str, failure: Failure) -> None:
    """Write, or replace, a unit's record."""
    failure_path(store, harvest, name).write(encode({"harvest": harvest, **asdict(failure)}))


def failed_units(store: Place, harvest: str, ranges: UnitRanges) -> list[int]:
    """The units with a record, ascending; those committed since included. One request."""
    names = (store / "failures" / harvest).names()
    units = (ranges.unit(name.removesuffix(".json")) for name in names if name.endswith(".json"))
    return [unit for unit in units if unit is not None]


def read_failure(store: Place, harvest: str, name: str) -> Failure:
    """Raises FileNotFoundError if there is no record, StorageError if it is damaged."""
    record = read_record(failure_path(store, harvest, name))
    return Failure(record["unit"], record["errors"], record["writers"], record["made_with"])


def clear_failure(store: Place, harvest: str, name: str) -> None:
    """Forget the record, if there is one: the unit is committed."""
    failure_path(store, harvest, name).remove()
