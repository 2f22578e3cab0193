"""A unit that was set aside: what it failed with, so that people see it and the next run tries it again.

A record says nothing about a unit that is committed since; the next driver removes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.format.records import Record


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

    @classmethod
    def from_record(cls, record: Record) -> "Failure":
        return cls(record["unit"], record["errors"], record["writers"], record["made_with"])
