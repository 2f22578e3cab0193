"""Rounding activations to the type they are stored in, and what that costs.

bfloat16, float16 and float32 are rounded to the nearest value, ties to even. int8 has a scale for each row,
symmetric: with scale = max|x| / 127, x is stored as the nearest whole number to x / scale, and read as that number
times the scale. All steps are in float32, so that any reader gets the same values to the last bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sites import STORED_TYPES

TORCH_TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORED_TYPES}

LARGEST = 127
"""The largest int8 of a row; -128 is not used."""


@dataclass(frozen=True)
class Rounded:
    """Rows as they are stored: `values` [rows, d_model], and for int8 their `scales`, float32 [rows]."""

    values: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> "Rounded":
        return Rounded(self.values[rows], None if self.scales is None else self.scales[rows])

    @property
    def type(self) -> str:
        """The name of the stored type."""
        return str(self.values.dtype).removeprefix("torch.")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values and, for int8, the scales: what is copied and written."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def float(self) -> Tensor:
        """The values that a reader gets, float32 [rows, d_model]."""
        values = self.values.float()
        return values if self.scales is None else values.mul_(self.scales[:, None])


def round_rows(rows: Tensor, stored: str) -> Rounded:
    """Round rows [rows, d_model] of any floating type to the stored type, on the device where they are.

    A row whose scale would be 0 (all zeros, or all below 127 times the smallest float32) is stored as zeros.
    """
    if stored != "int8":
        return Rounded(rows.to(TORCH_TYPES[stored]))
    wide = rows.float()
    scales = wide.abs().amax(1) / LARGEST
    divisors = scales.where(scales > 0, 1.0)
    # The scale of a tiny row has few bits, and may be too small for its largest value by more than rounding.
    values = (wide / divisors[:, None]).round_().clamp_(-LARGEST, LARGEST)
    # What is not finite has no int8; its scale is not finite either, and so is what a reader would get.
    return Rounded(values.nan_to_num_().to(torch.int8), scales)


def is_exact(computed: torch.dtype, stored: str) -> bool:
    """Return whether every value of the type that is computed in has itself as its stored value."""
    return TORCH_TYPES[stored] in (computed, torch.float32)


def square_error(rows: Tensor, rounded: Rounded) -> Tensor:
    """The sum over all rows of ||x - stored(x)||^2, a float64 scalar on the rows' device."""
    return (rows.float() - rounded.float()).square_().sum(1).double().sum()
