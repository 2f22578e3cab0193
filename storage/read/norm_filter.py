"""Leaving out rows of extreme norm while reading: attention sinks and the like have 100 times the norm of other rows.

The limit is a multiple of the median norm. Which rows that leaves, and how many in each block, follows from the norms
in the store alone, so a stream that leaves rows out has an order that is a pure function too.
"""

from dataclasses import dataclass

import numpy as np

from storage.errors import StorageError
from storage.format.arrays import Array, RowArray
from storage.read.reader import StoreReader

MEDIAN_ROWS = 1_000_000
"""Evenly spaced training rows, at most, over which the median is exact."""


@dataclass(frozen=True)
class NormFilter:
    """Rows whose norm is at most `limit`."""

    norms: RowArray
    limit: float
    counts: Array
    """int64 [blocks]: rows kept of each block of training rows."""

    def kept(self, start: int, stop: int) -> Array:
        """Which of the rows [start, stop) are kept: bool."""
        within: Array = self.norms.read(start, stop) <= self.limit
        return within


def norm_filter(store: StoreReader, site: str, max_norm: float, block_rows: int) -> NormFilter:
    """The filter that leaves out the training rows whose norm at `site` is above `max_norm` times the median.

    Reads the norms of all training rows (4 bytes each) once or twice, block by block. Raises UncommittedRows, or
    StorageError for a `max_norm` below 1.
    """
    if max_norm < 1:
        raise StorageError(
            f"max_norm is a multiple of the median norm, at least 1; {max_norm} would leave hardly a row"
        )
    num_rows = store.info.held_out_start
    store.require_committed(site, range(-(-num_rows // store.info.rows_per_unit)))
    sample = min(num_rows, MEDIAN_ROWS)
    median = float(np.median(store.norms(site, np.arange(sample) * num_rows // sample)))
    norms = store.array(site, "norms")
    limit = np.float32(max_norm * median)
    counts = [
        int((norms.read(start, min(start + block_rows, num_rows)) <= limit).sum())
        for start in range(0, num_rows, block_rows)
    ]
    return NormFilter(norms, float(limit), np.array(counts, dtype=np.int64))
