"""Writing one unit: activations, norms, moments, and last of all the commit that makes them readable."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.arrays import Array
from storage.errors import StorageError
from storage.files import create_file, sync_folder
from storage.harvests import Harvest, commit_path, moments_path
from storage.moments import MomentKey, Moments, write_moments
from storage.records import Record, encode
from storage.store import Store


@dataclass(frozen=True)
class UnitBlock:
    """What a worker computed for one unit. Site -> array over the unit's rows."""

    activations: Mapping[str, Array]
    norms: Mapping[str, Array]
    moments: Mapping[MomentKey, Moments]


def write_unit(
    store: Store, harvest: Harvest, unit: int, block: UnitBlock, *, writer: str, about: Mapping[str, Any]
) -> bool:
    """Write a unit's arrays and moments durably, then its commit. Return whether this call made the commit.

    Whoever computes a unit computes the same bytes, so losing the race for the commit loses nothing. `about` goes into
    the commit as it is (device, seconds). Raises StorageError, without a commit, when a byte cannot be written.
    """
    start, stop = store.info.unit_rows(unit)
    sites: dict[str, Record] = {}
    try:
        for site in harvest.sites:
            values, norms = block.activations[site], block.norms[site]
            assert len(values) == len(norms) == stop - start
            activation_array, norm_array = harvest.arrays(store.path, store.num_rows, site)
            sites[site] = {
                "crc32c": activation_array.write(start, values),
                "norms_crc32c": norm_array.write(start, norms),
            }
        moments_file = moments_path(store.path, harvest.digest, unit)
        moments_digest = write_moments(moments_file, block.moments)
        sync_folder(moments_file.parent)
        commit: Record = {
            "harvest": harvest.digest,
            "unit": unit,
            "row_start": start,
            "row_stop": stop,
            "writer": writer,
            "sites": sites,
            "moments_sha256": moments_digest,
            **about,
            "committed_at": time.time(),
        }
        return create_file(commit_path(store.path, harvest.digest, unit), encode(commit))
    except OSError as error:
        raise StorageError(
            f"unit {unit} cannot be written to {store.path}: {error.strerror or error}; committed units are safe, "
            "start again when there is room"
        ) from error
