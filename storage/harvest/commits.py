"""Commits: what the record that makes a unit readable says.

A unit's commit is created, never replaced and never removed, after everything else of the unit is durable. What happens
between any two steps is in docs/decisions/0007-commits-and-supervision.md.
"""

from dataclasses import asdict, dataclass
from typing import Any

from storage.errors import StorageError, UnitConflict
from storage.format.records import Record

DETERMINED = ("row_start", "row_stop", "sites", "moments_sha256")
"""The fields of a commit that are the same whoever computes the unit."""
_REQUIRED = ("harvest", "unit", *DETERMINED, "writer")


@dataclass(frozen=True)
class RoundingCost:
    """What storing a site's rows of one unit cost, summed over the rows."""

    square_error: float
    """||x - stored(x)||^2, with x as the model computed it."""
    square_norm: float
    """||stored(x)||^2."""


@dataclass(frozen=True)
class UnitFigures:
    """How a unit was computed: for people, and for estimates. Nothing else depends on it."""

    positions_run: int
    """Positions of all batches."""
    padding: int
    """Those of them that belong to no context."""
    rounding: dict[str, RoundingCost]
    """By site."""
    device: str
    started_at: float
    """Seconds since 1970 by the writer's clock."""
    seconds: float
    idle_share: float | None
    """Share of the time that its GPU spent outside forward passes; None on CPU."""

    @classmethod
    def from_record(cls, record: Record) -> "UnitFigures | None":
        """The figures in a commit's record; None where it has none, as one that repair wrote."""
        if "device" not in record:
            return None
        return cls(
            record.get("positions_run", 0),
            record.get("padding", 0),
            {
                site: RoundingCost(cost["square_error"], cost["square_norm"])
                for site, cost in record.get("rounding", {}).items()
            },
            record["device"],
            record.get("started_at", 0.0),
            record.get("seconds", 0.0),
            record.get("idle_share"),
        )


@dataclass(frozen=True)
class Commit:
    """What vouches for a unit: its rows, and the checksums of everything that was written of them."""

    harvest: str
    """Its digest."""
    unit: int
    row_start: int
    row_stop: int
    writer: str
    """Who wrote it: host, pid and a random part."""
    sites: dict[str, dict[str, list[int]]]
    """Site -> key of a kind of array (`storage.harvest.harvest.CHECKSUMS`) -> the crc32c of each chunk of the unit."""
    moments_sha256: str
    figures: UnitFigures | None = None
    committed_at: float | None = None
    """Seconds since 1970 by the writer's clock."""

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start

    def to_record(self) -> Record:
        record: dict[str, Any] = {name: getattr(self, name) for name in ("harvest", "unit", "row_start", "row_stop")}
        record |= {"writer": self.writer, "sites": self.sites, "moments_sha256": self.moments_sha256}
        record |= {} if self.figures is None else asdict(self.figures)
        return record | ({} if self.committed_at is None else {"committed_at": self.committed_at})

    @classmethod
    def from_record(cls, record: Record) -> "Commit":
        """Raises StorageError that says what it lacks."""
        if lacking := [name for name in _REQUIRED if name not in record]:
            raise StorageError(f"it lacks {', '.join(lacking)}")
        required = {name: record[name] for name in _REQUIRED}
        return cls(**required, figures=UnitFigures.from_record(record), committed_at=record.get("committed_at"))

    def require_same(self, mine: "Commit") -> None:
        """Raise UnitConflict unless another commit of the unit, which was to be written beside this one, says the same
        bytes."""
        differing = [name for name in DETERMINED if getattr(self, name) != getattr(mine, name)]
        if differing:
            raise UnitConflict(
                f"unit {mine.unit} of harvest {mine.harvest} came out differently ({', '.join(differing)}) from "
                f"writer {mine.writer} than from writer {self.writer}, whose commit stands: one of the two "
                "machines or its libraries are at fault; find the damage with `granary verify STORE --repair`"
            )
