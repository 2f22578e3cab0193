"""Moments of a site over many units: those of each unit, added up."""

from collections.abc import Iterable
from functools import reduce

from storage.harvest.moments import MomentKey, Moments, read_unit_moments
from storage.read.reader import StoreReader
from storage.table.table import StoredTable


def merged_moments(store: StoreReader, site: str, units: Iterable[int]) -> dict[MomentKey, Moments]:
    """Add up the moments of `site` over `units`, in ascending order of units, so that the sum has one value.

    Raises UncommittedRows when a unit is not committed.
    """
    units = sorted(units)
    store.require_committed(site, units)
    harvest, name = store.find(site)
    merged: dict[MomentKey, list[Moments]] = {}
    for unit in units:
        for key, moments in read_unit_moments(store, harvest.digest, unit).items():
            if key.site == name:
                merged.setdefault(key, []).append(moments)
    return {key: reduce(Moments.__add__, parts) for key, parts in merged.items()}


def training_units(store: StoredTable) -> range:
    """The units that are not held out."""
    return range(-(-store.info.held_out_start // store.info.rows_per_unit))
