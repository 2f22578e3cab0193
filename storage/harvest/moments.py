"""Counts, sums and sums of squares per site and subpopulation, one Parquet file a unit. Mergeable by adding.

The moments are of the stored values (after rounding to the stored dtype), in float64, so that they can be recomputed
from the activations at any time.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StorageError
from storage.harvest.log import log_of
from storage.table.table import StoredTable

Float64 = npt.NDArray[np.float64]


class MomentKey(NamedTuple):
    """Whose moments: of a site, over the rows whose document, or which themselves, have `value` in `label`; both are
    None for all rows."""

    site: str
    label: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class Moments:
    """`count` rows with their per-coordinate `sum` and `sum_squares`, float64 [d_model]. Addition merges two sets."""

    count: int
    sum: Float64
    sum_squares: Float64

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.sum + other.sum, self.sum_squares + other.sum_squares)

    @property
    def mean(self) -> Float64:
        return self.sum / self.count

    @property
    def total_variance(self) -> float:
        """The sum over coordinates of the (biased) variance: E||x - E x||^2."""
        return float((self.sum_squares / self.count - self.mean**2).sum())

    @property
    def mean_square_norm(self) -> float:
        """E||x||^2."""
        return float(self.sum_squares.sum()) / self.count


_SCHEMA = pa.schema(
    [
        ("site", pa.string()),
        ("label", pa.string()),
        ("value", pa.string()),
        ("count", pa.int64()),
        ("sum", pa.list_(pa.float64())),
        ("sum_squares", pa.list_(pa.float64())),
    ]
)


def encode_moments(moments: Mapping[MomentKey, Moments]) -> bytes:
    """One unit's moments as a Parquet file."""
    rows: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for key in sorted(moments, key=lambda k: (k.site, k.label or "", k.value or "")):
        m = moments[key]
        for name, value in zip(_SCHEMA.names, (*key, m.count, m.sum, m.sum_squares), strict=True):
            rows[name].append(value)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows, schema=_SCHEMA), sink, compression="none")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_unit_moments(store: StoredTable, harvest: str, unit: int) -> dict[MomentKey, Moments]:
    """Read a committed unit's moments. Raises StorageError when the file is not the one that was committed."""
    log = log_of(store, harvest)
    path, committed = log.moments_place(unit), log.read(unit).moments_sha256
    try:
        content = path.read()
        if hashlib.sha256(content).hexdigest() != committed:
            raise StorageError(
                f"the moments of unit {unit}, {path}, cannot be read: they do not match their commit; "
                "`granary verify STORE --repair` makes them again"
            )
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"the moments of unit {unit}, {path}, cannot be read: {error}") from None
    return {
        MomentKey(r["site"], r["label"], r["value"]): Moments(
            r["count"], np.asarray(r["sum"], dtype=np.float64), np.asarray(r["sum_squares"], dtype=np.float64)
        )
        for r in table.to_pylist()
    }


def same_moments(some: Mapping[MomentKey, Moments], others: Mapping[MomentKey, Moments]) -> bool:
    """Return whether two sets of moments are equal to the last bit."""
    return some.keys() == others.keys() and all(
        m.count == others[key].count
        and np.array_equal(m.sum, others[key].sum)
        and np.array_equal(m.sum_squares, others[key].sum_squares)
        for key, m in some.items()
    )
