"""A batch's code, dense or sparse: what the terms of a loss and the decoder need of it, whichever it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sdl.sparse import Places


@dataclass(frozen=True)
class DenseCode:
    """A code of which every entry is held."""

    values: Tensor
    """[rows, latents], not negative."""
    preactivations: Tensor
    """[rows, latents]: what decided which are active; of a gated dictionary its gate's."""
    gates: Tensor
    """[rows, latents]: what sparsity is asked of: the values, of a gated dictionary relu(preactivations)."""

    @property
    def rows(self) -> int:
        return len(self.values)

    def of_entries(self, per_latent: Tensor) -> Tensor:
        """A figure for each latent [latents] -> for each of `gates`."""
        return per_latent

    def decode(self, W_dec: Tensor) -> Tensor:
        """values @ W_dec -> [rows, d]."""
        return self.values @ W_dec

    def between(self, first: int, last: int) -> "DenseCode":
        """The code of the latents [first, last)."""
        kept = slice(first, last)
        return DenseCode(self.values[:, kept], self.preactivations[:, kept], self.gates[:, kept])

    def firings(self) -> Tensor:
        """int64 [latents]: rows on which each is active."""
        return (self.values.detach() > 0).sum(0)


@dataclass(frozen=True)
class SparseCode:
    """A code of which the entries at `places` are held; the others are zero."""

    places: Places
    values: Tensor
    """[entries], not negative."""

    @property
    def gates(self) -> Tensor:
        return self.values

    @property
    def rows(self) -> int:
        return self.places.rows

    def of_entries(self, per_latent: Tensor) -> Tensor:
        return per_latent[self.places.latent]

    def decode(self, W_dec: Tensor) -> Tensor:
        return self.places.decode(self.values, W_dec)

    def between(self, first: int, last: int) -> "SparseCode":
        places, kept = self.places.between(first, last)
        return SparseCode(places, self.values[kept])

    def firings(self) -> Tensor:
        active = self.places.latent[self.values.detach() > 0]
        return torch.bincount(active, minlength=self.places.latents)


Code = DenseCode | SparseCode
