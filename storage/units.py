"""Writing one unit: activations, norms, moments, and last of all the commit that makes them readable."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.arrays import Array
from storage.errors import StorageError
from storage.files import Staged, create_file, discard, publish, stage
from storage.harvests import Harvest, commit_path, moments_path
from storage.moments import MomentKey, Moments, encode_moments
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
    if commit_path(store.path, harvest.digest, unit).exists():
        return False  # another worker was faster: its bytes are not touched
    sites: dict[str, Record] = {}
    staged: list[Staged] = []
    try:
        for site in harvest.sites:
            checksums = []
            arrays = harvest.arrays(store.path, store.num_rows, site)
            for array, values in zip(arrays, (block.activations[site], block.norms[site]), strict=True):
                assert len(values) == stop - start
                rows = array.stage(start, values)
                staged += rows.files
                checksums.append(rows.checksums)
            sites[site] = {"crc32c": checksums[0], "norms_crc32c": checksums[1]}
        moments = encode_moments(block.moments)
        staged.append(stage(moments_path(store.path, harvest.digest, unit), [moments]))
        publish(staged)
        commit: Record = {
            "harvest": harvest.digest,
            "unit": unit,
            "row_start": start,
            "row_stop": stop,
            "writer": writer,
            "sites": sites,
            "moments_sha256": hashlib.sha256(moments).hexdigest(),
            **about,
            "committed_at": time.time(),
        }
        return create_file(commit_path(store.path, harvest.digest, unit), encode(commit))
    except FileNotFoundError:
        # A run that found all units committed swept our temporary files away: ours was one of those units.
        if commit_path(store.path, harvest.digest, unit).exists():
            return False
        raise
    except OSError as error:
        raise StorageError(
            f"unit {unit} cannot be written to {store.path}: {error.strerror or error}; committed units are safe, "
            "start again when there is room"
        ) from error
    finally:
        discard(staged)  # nothing is left of them after `publish`
