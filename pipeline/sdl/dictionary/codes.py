"""A batch's code, dense or sparse: what the terms of a loss and the decoder need of it, whichever it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sdl.dictionary.sparse import Places


@dataclass(frozen=True)
class Code:
    """Entries of a code [rows, latents]: all of them, or those at `places`, where the others are zero.

    Each tensor is [rows, latents], or [entries] of `places`.
    """

    values: Tensor
    """Not negative."""
    preactivations: Tensor
    """What decided which are active; of a gated dictionary its gate's."""
    gates: Tensor
    """What sparsity is asked of: the values, of a gated dictionary relu(preactivations)."""
    places: Places | None = None

    @property
    def rows(self) -> int:
        return len(self.values) if self.places is None else self.places.rows

    def of_entries(self, per_latent: Tensor) -> Tensor:
        """A figure for each latent [latents] -> for each entry, or what broadcasts to that."""
        return per_latent if self.places is None else self.places.of_entries(per_latent)

    def decode(self, W_dec: Tensor) -> Tensor:
        """values @ W_dec -> [rows, d]."""
        return self._product(self.values, W_dec)

    def decode_gates(self, W_dec: Tensor) -> Tensor:
        """gates @ W_dec -> [rows, d]."""
        return self._product(self.gates, W_dec)

    def _product(self, entries: Tensor, W_dec: Tensor) -> Tensor:
        return entries @ W_dec if self.places is None else self.places.decode(entries, W_dec)

    def between(self, first: int, last: int) -> "Code":
        """The code of the latents [first, last)."""
        if self.places is None:
            kept = (slice(None), slice(first, last))
            return Code(self.values[kept], self.preactivations[kept], self.gates[kept])
        places, index = self.places.between(first, last)
        return Code(self.values[index], self.preactivations[index], self.gates[index], places)

    def firings(self) -> Tensor:
        """int64 [latents]: rows on which each is active."""
        active = self.values.detach() > 0
        if self.places is None:
            return active.sum(0)
        return torch.bincount(self.places.latent[active], minlength=self.places.latents)
