"""A site's rows as a reader gets them, whatever they are stored as.

bfloat16, float16 and float32 are given as they are stored. int8 rows are given as float32: each stored number times its
row's scale, one float32 multiplication, so that every reader gets the same values to the last bit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.format.arrays import DTYPES, Array, RowArray


@dataclass(frozen=True)
class SiteRows:
    """The array of a site and, where it is int8, that of its scales. Reads as a RowArray does."""

    values: RowArray
    scales: RowArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def chunk_rows(self) -> int:
        return self.values.chunk_rows

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type of what is read."""
        return self.values.numpy_dtype if self.scales is None else DTYPES["float32"]

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) as a new array [stop - start, d_model]. Raises CorruptChunk."""
        values = self.values.read(start, stop)
        return values if self.scales is None else unscaled(values, self.scales.read(start, stop))


def unscaled(values: Array, scales: Array) -> Array:
    """What int8 rows [rows, d_model] with float32 scales [rows] stand for, in float32."""
    wide = values.astype(np.float32)
    wide *= scales[:, None]
    return wide
