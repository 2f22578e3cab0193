"""Commits: which units of a harvest may be read.

A unit's commit is created, never replaced and never removed, after everything else of the unit is durable. Beside the
commits lies a bitmap of some of them, so that a store of a million units is opened with a few requests. The bitmap is
a lower bound: whoever reads it lists the blocks that it does not show full. What happens between any two steps is in
docs/decisions/0007-commits-and-supervision.md.
"""

import base64

import numpy as np

from storage.errors import StorageError, UnitConflict
from storage.places import Place
from storage.records import Record, encode, read_record
from storage.threads import in_threads
from storage.unitsets import UnitRanges, UnitSet, number_of

UNITS_PER_BLOCK = 1024
BLOCK_DIGITS = 6
"""Digits of a block in names, so that names sort as numbers."""
BITMAP = "committed.json"
DETERMINED = ("row_start", "row_stop", "sites", "moments_sha256")
"""The fields of a commit that are the same whoever computes the unit."""


def commit_path(store: Place, harvest: str, name: str) -> Place:
    """`name`: the unit's, which `UnitRanges.name` gives."""
    block = number_of(name) // UNITS_PER_BLOCK
    return store / "commits" / harvest / f"{block:0{BLOCK_DIGITS}d}" / f"{name}.json"


def read_commit(store: Place, harvest: str, name: str) -> Record:
    """Read a unit's commit. Raises StorageError when there is none or it is damaged."""
    place, unit = commit_path(store, harvest, name), number_of(name)
    try:
        record = read_record(place)
    except FileNotFoundError:
        raise StorageError(f"unit {unit} of harvest {harvest} has no commit") from None
    if record.get("unit") != unit or record.get("harvest") != harvest:
        raise StorageError(f"the commit {place} is of another unit or harvest")
    return record


def commit_unit(store: Place, name: str, commit: Record) -> bool:
    """Create a unit's commit; return whether this call made it. Raises UnitConflict, if another's says other bytes."""
    if commit_path(store, commit["harvest"], name).create(encode(commit)):
        return True
    require_same(read_commit(store, commit["harvest"], name), commit)
    return False


def require_same(stored: Record, mine: Record) -> None:
    """Raise UnitConflict unless two commits of a unit say the same bytes."""
    differing = [name for name in DETERMINED if stored.get(name) != mine[name]]
    if differing:
        raise UnitConflict(
            f"unit {mine['unit']} of harvest {mine['harvest']} came out differently ({', '.join(differing)}) from "
            f"writer {mine['writer']} than from writer {stored['writer']}, whose commit stands: one of the two "
            "machines or its libraries are at fault; find the damage with `granary verify STORE --repair`"
        )


def committed_units(store: Place, harvest: str, ranges: UnitRanges) -> UnitSet:
    """The units of `ranges` whose commit is there: one request if the bitmap is full, else one more, and one for each
    block that is begun and not full in it. Commits of a short unit of another table have other names."""
    total = ranges.total
    try:
        units = read_bitmap(store, harvest, ranges)
    except StorageError:
        units = UnitSet(total)  # a cache, no more: the listing says the same, and `verify` names the damage
    if units.is_full:
        return units
    folder = store / "commits" / harvest
    begun = [int(name) for name in folder.names() if len(name) == BLOCK_DIGITS and name.isdecimal()]

    def is_open(block: int) -> bool:
        start = block * UNITS_PER_BLOCK
        return start < total and not units.mask[start : start + UNITS_PER_BLOCK].all()

    listings = in_threads(
        lambda block: (folder / f"{block:0{BLOCK_DIGITS}d}").names(),
        [block for block in begun if is_open(block)],
        store.backend.threads,
    )
    for names in listings:
        for name in names:
            unit, _, suffix = name.partition(".")
            number = ranges.unit(unit)
            if suffix == "json" and number is not None:
                units.add(number)
    return units


def read_bitmap(store: Place, harvest: str, ranges: UnitRanges) -> UnitSet:
    """The bitmap's units; none if it was never written. Raises StorageError when it is damaged.

    It may be of the table as it was before, or is now for others: then a unit that is short in one of the two is
    another unit in the other.
    """
    total = ranges.total
    place = store / "commits" / harvest / BITMAP
    try:
        record = read_record(place)
    except FileNotFoundError:
        return UnitSet(total)
    if record.get("harvest") != harvest:
        raise StorageError(f"the bitmap {place} is of another harvest")
    bits = np.frombuffer(base64.b64decode(record["bits"]), dtype=np.uint8)
    mask = np.zeros(total, dtype=np.bool_)
    written = UnitRanges(record["num_rows"], ranges.rows_per_unit)
    known = min(total, written.total)
    mask[:known] = np.unpackbits(bits, count=written.total, bitorder="little")[:known].astype(np.bool_)
    if written != ranges:
        mask[[unit for unit in (written.short, ranges.short) if unit is not None and unit < known]] = False
    return UnitSet(total, mask)


def compact(store: Place, harvest: str, ranges: UnitRanges, committed: UnitSet) -> bool:
    """Add units whose commit was seen to the bitmap; return whether there was anything to add."""
    try:
        units = read_bitmap(store, harvest, ranges)
    except StorageError:
        units = UnitSet(ranges.total)  # damaged: written anew
    before = len(units)
    units.update(committed)
    if len(units) == before:
        return False
    bits = base64.b64encode(np.packbits(units.mask, bitorder="little").tobytes()).decode()
    record = {"harvest": harvest, "num_rows": ranges.num_rows, "bits": bits}
    (store / "commits" / harvest / BITMAP).write(encode(record))
    return True
