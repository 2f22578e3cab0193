"""Rows that a dictionary can learn: sparse combinations of random directions, and noise. For benchmarks of speed."""

import torch
from torch import Tensor
from torch.nn import functional

DIRECTIONS_PER_DIMENSION = 8
ACTIVE = 16
NOISE = 0.05
SEED = 2_512_05534
"""The seed of the directions: far from those of first weights, which would otherwise be the directions themselves."""


def sparse_rows(rows: int, d: int, seed: int) -> Tensor:
    """float32 [rows, d] with E||x||^2 = d, mean zero: each row has 16 of 8 d unit directions, with exponential
    coefficients of both signs, and Gaussian noise of 5 % of the variance. The directions depend on d alone."""
    directions = torch.randn(DIRECTIONS_PER_DIMENSION * d, d, generator=torch.Generator().manual_seed(SEED))
    directions = functional.normalize(directions, dim=1)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.empty(rows, d)
    for first in range(0, rows, 8192):
        part = x[first : first + 8192]
        chosen = torch.randint(len(directions), (len(part), ACTIVE), generator=generator)
        size = torch.empty(len(part), ACTIVE).exponential_(generator=generator)
        sign = torch.randint(2, size.shape, generator=generator) * 2 - 1
        # A coefficient's second moment is 2, so the signal's square norm is 2 ACTIVE on average.
        signal = functional.embedding_bag(chosen, directions, per_sample_weights=size * sign, mode="sum")
        noise = torch.randn(part.shape, generator=generator)
        part.copy_(signal * ((1 - NOISE) * d / (2 * ACTIVE)) ** 0.5 + noise * NOISE**0.5)
    return x
