"""How activations are centred and scaled before a dictionary is trained on them; folded into its weights afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import InputError


@dataclass(frozen=True)
class Normalisation:
    """x -> (x - mean) * scale, with scale chosen so that E||x||^2 = d at each site after centring."""

    mean: Tensor
    """float32 [d]."""
    scale: Tensor
    """float32 [d], one value a site."""

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) * self.scale

    def to(self, device: torch.device | str) -> "Normalisation":
        return Normalisation(self.mean.to(device), self.scale.to(device))

    @classmethod
    def of(cls, mean: Tensor, total_variance: float) -> "Normalisation":
        """Return the normalisation of one site: `mean` [d], `total_variance` = E||x - mean||^2. Raises InputError if
        there is none."""
        if len(wrong := (~torch.isfinite(mean)).nonzero().flatten()):
            raise InputError(
                f"these activations cannot be normalised: the mean of column {int(wrong[0])} is not finite "
                f"({len(wrong)} such columns): there is nan or infinity in the harvest; see `granary verify`"
            )
        if not 0 < total_variance < float("inf"):
            raise InputError(
                "these activations cannot be normalised: their variance is "
                f"{total_variance:.3g}, which must be finite and above 0 (constant columns, or nan in the harvest)"
            )
        d = len(mean)
        return cls(mean.float(), torch.full((d,), (d / total_variance) ** 0.5))

    @classmethod
    def side_by_side(cls, parts: Sequence["Normalisation"]) -> "Normalisation":
        """That of several sites, in order."""
        return cls(torch.cat([p.mean for p in parts]), torch.cat([p.scale for p in parts]))


def not_finite_columns(x: Tensor) -> str:
    """Which columns of x [rows, d] hold nan or infinity, in words; empty if none does."""
    bad = (~torch.isfinite(x.float())).any(0).nonzero().flatten()
    return f"column {int(bad[0])} ({len(bad)} such)" if len(bad) else ""
