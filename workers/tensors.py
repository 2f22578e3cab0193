"""Between numpy, which `storage` speaks, and torch, which `pipeline` speaks. No copies."""

import torch

from storage.format.arrays import DTYPES, Array


def to_numpy(acts: torch.Tensor) -> Array:
    """View a tensor as a numpy array of the same dtype, bfloat16 as ml_dtypes.bfloat16; no copy."""
    if acts.dtype == torch.bfloat16:
        return acts.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
    return acts.numpy()


def to_torch(values: Array) -> torch.Tensor:
    """The other way round; no copy."""
    if values.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(values.view("<u2")).view(torch.bfloat16)
    return torch.from_numpy(values)
