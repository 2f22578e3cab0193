"""Writing one unit: activations, norms, moments, and last of all the commit that makes them readable.

Whoever computes a unit computes the same bytes, so it may be written any number of times by anybody; who finds that it
is committed compares. docs/decisions/0007-commits-and-supervision.md goes through every step.
"""

import errno
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from storage.backends.backend import Staged
from storage.errors import CannotWrite, StorageError, UnitConflict
from storage.format.arrays import Array
from storage.harvest.commits import Commit, UnitFigures
from storage.harvest.harvest import CHECKSUMS, Harvest
from storage.harvest.log import log_of
from storage.harvest.moments import MomentKey, Moments, encode_moments
from storage.table.table import StoredTable


@dataclass(frozen=True)
class UnitBlock:
    """What a worker computed for one unit. Site -> array over the unit's rows."""

    activations: Mapping[str, Array]
    norms: Mapping[str, Array]
    moments: Mapping[MomentKey, Moments]
    scales: Mapping[str, Array] = field(default_factory=dict)
    """The scales of the sites that are stored as int8."""

    def of(self, kind: str) -> Mapping[str, Array]:
        """The arrays of a kind (`SiteLayout.kinds`)."""
        return {"activations": self.activations, "norms": self.norms, "scales": self.scales}[kind]


Checksums = dict[str, dict[str, list[int]]]
"""Site -> key of a kind of array in a commit -> the crc32c of each chunk."""


def _no_step() -> None:
    return None


def write_unit(
    store: StoredTable,
    harvest: Harvest,
    unit: int,
    block: UnitBlock,
    *,
    writer: str,
    figures: UnitFigures | None,
    on_step: Callable[[], None] = _no_step,
) -> bool:
    """Write a unit's arrays and moments durably, then its commit. Return whether this call made the commit.

    `figures` go into the commit; `on_step` is called after every few writes. Raises CannotWrite, without a commit, when
    a byte cannot be written, UnitConflict when the unit is committed with other bytes, and StoreGrown when it is short
    and has become longer since the store was opened.
    """
    if unit == store.info.units.short:  # the longer unit has chunks of the same names
        store.require_newest()
    log = log_of(store, harvest)
    moments = encode_moments(block.moments)

    def is_committed() -> bool:
        """Return whether another was faster, with the same bytes."""
        if not log.is_committed(unit):
            return False
        mine = _commit(store, harvest, unit, _checksums(store, harvest, block), moments, writer)
        log.read(unit).require_same(mine)
        return True

    if is_committed():
        return False
    try:
        sites = _write(store, harvest, unit, block, moments, on_step)
        commit = _commit(store, harvest, unit, sites, moments, writer)
        return log.commit(replace(commit, figures=figures, committed_at=time.time()))
    except FileNotFoundError:
        # A run that found all units committed swept our temporary files away: ours was one of those units.
        if is_committed():
            return False
        raise
    except OSError as error:
        raise _cannot_write(store, unit, error) from error


def rewrite_unit(
    store: StoredTable,
    harvest: Harvest,
    unit: int,
    block: UnitBlock,
    *,
    writer: str,
    figures: UnitFigures | None,
    instead: bool = False,
) -> None:
    """Repair a committed unit: write the bytes again that its commit names. The commit is never removed; it is replaced
    only if it is damaged itself, or if `block` is known to be right `instead` of it.

    Raises UnitConflict, before anything is written, when `block` is not what the commit names; CannotWrite.
    """
    log, moments = log_of(store, harvest), encode_moments(block.moments)
    mine = _commit(store, harvest, unit, _checksums(store, harvest, block), moments, writer)
    try:
        log.read(unit).require_same(mine)
        is_sound = True
    except UnitConflict:
        if not instead:
            raise
        is_sound = False
    except StorageError:  # damaged, or not there
        is_sound = False
    try:
        _write(store, harvest, unit, block, moments, _no_step)
        if not is_sound:
            log.replace(replace(mine, figures=figures, committed_at=time.time()))
    except OSError as error:
        raise _cannot_write(store, unit, error) from error


def _checksums(store: StoredTable, harvest: Harvest, block: UnitBlock) -> Checksums:
    """What `_write` would give."""
    sites = {}
    for site in harvest.sites:
        arrays = harvest.arrays(store.root, store.num_rows, site)
        sites[site] = {CHECKSUMS[kind]: arrays[kind].checksums_of(block.of(kind)[site]) for kind in arrays}
    return sites


def _commit(store: StoredTable, harvest: Harvest, unit: int, sites: Checksums, moments: bytes, writer: str) -> Commit:
    start, stop = store.info.unit_rows(unit)
    return Commit(harvest.digest, unit, start, stop, writer, sites, hashlib.sha256(moments).hexdigest())


def _write(
    store: StoredTable, harvest: Harvest, unit: int, block: UnitBlock, moments: bytes, on_step: Callable[[], None]
) -> Checksums:
    """Stage all objects of a unit, then publish them: durable when this returns; nothing is left staged. Return the
    checksums of each site's chunks."""
    start, stop = store.info.unit_rows(unit)
    backend = store.root.backend
    staged: list[Staged] = []
    sites: Checksums = {}
    try:
        for site in harvest.sites:
            sites[site] = {}
            for kind, array in harvest.arrays(store.root, store.num_rows, site).items():
                values = block.of(kind)[site]
                assert len(values) == stop - start
                rows = array.stage(start, values)
                staged += rows.files
                sites[site][CHECKSUMS[kind]] = rows.checksums
                on_step()
        staged.append(backend.stage(log_of(store, harvest).moments_place(unit).key, [moments]))
        backend.publish(staged)
        on_step()
    finally:
        backend.discard(staged)  # nothing is left of them after `publish`
    return sites


def _cannot_write(store: StoredTable, unit: int, error: OSError) -> CannotWrite:
    when = "there is room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it can be written"
    return CannotWrite(
        f"unit {unit} cannot be written to {store.url}: {error.strerror or error}; committed units are safe, "
        f"start again when {when}"
    )
