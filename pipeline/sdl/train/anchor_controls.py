"""Controls of anchoring: directions that are like the anchors but for what they mean."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import InputError

CONTROLS = ("none", "random", "shuffled")


def controlled(vectors: Mapping[str, Tensor], control: str, seed: int) -> dict[str, Tensor]:
    """The vectors [k, d] of each site, or what stands for them.

    `random`: Gaussian directions of the same norms. `shuffled`: the coordinates of all anchors of a site in another,
    common order, which keeps their norms and the angles between them. Both depend on the seed, and nothing is
    shared between sites. Raises InputError for another control.
    """
    if control not in CONTROLS:
        raise InputError(f"control is one of {', '.join(CONTROLS)}, not {control!r}")
    if control == "none":
        return dict(vectors)
    generator = torch.Generator().manual_seed(_stream(seed))
    found = {}
    for site in sorted(vectors):
        anchors = vectors[site].float()
        if control == "random":
            directions = torch.randn(anchors.shape, generator=generator)
            found[site] = functional.normalize(directions, dim=1) * torch.linalg.vector_norm(anchors, dim=1)[:, None]
        else:
            found[site] = anchors[:, torch.randperm(anchors.shape[1], generator=generator)]
    return found


def _stream(seed: int) -> int:
    """Numbers of their own: with the seed itself, random anchors would be the rows that the same seed initialises."""
    return int.from_bytes(sha256(f"controls of anchors {seed}".encode()).digest()[:8], "big", signed=True)
