"""What went wrong, or did not, in a trained dictionary, named after the theory (arXiv 2512.05534, 2606.02385).

With the truth known (the Linear Representation Bench): which features each latent serves, whether parents are absorbed
into their children; what the near-optimal configuration of Theorem 3.2 loses. Where features interfere that is much
more than a trained minimum, so whether one is spurious is asked of a run that begins there (`lrb_recipes.TRUTH`).
Without it, on any rows: how far the dictionary is from what an optimum must satisfy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig

SERVED = 0.1
"""A latent serves a feature if it is at least this strong, against the strongest, when the feature is alone."""
ROUNDING = 1e-5
"""A residual that is so small a part of its row is a matter of float32."""


@torch.no_grad()
def polysemanticity(dictionary: Dictionary, features: Tensor, base: Tensor, strength: float) -> Tensor:
    """Which latents serve which features: bool [features, latents].

    Each feature is given alone, `base` + `strength` times its row of [features, d_in], as at extreme sparsity. A
    latent with several features is polysemantic, one with none is dead to them.
    """
    values = dictionary.encode(base + strength * features)
    return values > (SERVED * values.amax(1, keepdim=True)).clamp(min=1e-12)


@torch.no_grad()
def at_truth(
    config: DictionaryConfig, features: tuple[Tensor, Tensor], x_norm: Normalisation, y_norm: Normalisation
) -> Dictionary:
    """The near-optimal configuration of Theorem 3.2: a dictionary whose first latents are the true features.

    `features` [n, d_in] as read and [n, d_out] as written; encoder rows are the first in the normalised space, with
    norm 1 and no bias, decoder rows the second, so that a feature alone is reconstructed; other latents are never
    active. On raw activations. A BatchTopK one is still to be calibrated.
    """
    read, written = features[0] * x_norm.scale, features[1] * y_norm.scale
    lengths = torch.linalg.vector_norm(read, dim=1, keepdim=True)
    dictionary = Dictionary(config)
    dictionary.W_enc[: len(read)] = read / lengths
    dictionary.W_dec[: len(read)] = written / lengths
    return dictionary.folded(x_norm, y_norm)


@dataclass(frozen=True)
class Absorption:
    """How often a parent's own latent is silent though the parent is active."""

    alone: float
    """Where no child is active."""
    with_child: float
    """Where a child is."""
    leaning: float
    """Mean cosine of the children's latents' decoders with the parent, above that of the children themselves."""

    @property
    def rate(self) -> float:
        """Silence that children bring about; nan where no sample has a parent alone, or none has one with a child."""
        found = self.with_child - self.alone
        return found if isnan(found) else max(0.0, found)


@torch.no_grad()
def absorption(
    dictionary: Dictionary,
    x: Tensor,
    coefficients: Tensor,
    features: Tensor,
    families: Sequence[tuple[int, Sequence[int]]],
) -> Absorption:
    """Absorption of parents into their children (Chanin et al. 2024, arXiv 2409.14507), the truth in place of probes.

    `x` [rows, d_in], `coefficients` [rows, n], `features` [n, d_out], `families`: parents, each with its
    children. A feature's own latent is the one whose decoder is nearest to it.
    """
    decoders, features = functional.normalize(dictionary.W_dec, dim=1), functional.normalize(features, dim=1)
    own = (decoders @ features.T).argmax(0)
    values, active = dictionary.encode(x), coefficients > 0
    alone, with_child, leaning = [], [], []
    for parent, children in families:
        silent = values[:, own[parent]] <= 0
        any_child = active[:, list(children)].any(1)
        alone.append(silent[active[:, parent] & ~any_child].float())
        with_child.append(silent[active[:, parent] & any_child].float())
        leaning += [
            (decoders[own[child]] @ features[parent] - features[child] @ features[parent]).item() for child in children
        ]
    return Absorption(
        alone=torch.cat(alone).mean().item(),
        with_child=torch.cat(with_child).mean().item(),
        leaning=sum(leaning) / len(leaning),
    )


@dataclass(frozen=True)
class Optimality:
    """How far a dictionary is from what local optima satisfy; each [latents], nan where a latent never fires."""

    tilt: Tensor
    """||E[z_i r] across d_i|| / E[z_i ||r||]: at an optimum, the residuals of the rows that a latent serves, weighted
    by its activity, leave nothing across its own direction. 0 is optimal, 1 the worst."""
    pull: Tensor
    """E[z_i <d_i, r>] / E[z_i^2]: how much too low its activity is (as an L1 term makes it); negative: too high."""
    density: Tensor
    """Share of rows on which it fires."""


@torch.no_grad()
def optimality(dictionary: Dictionary, x: Tensor, y: Tensor) -> Optimality:
    """Stationarity of the decoder rows and of the code on rows x [rows, d_in], y [rows, d_out] (one block of latents).

    For 1/2 ||y - D z||^2 + lambda sum z with z >= 0 and unit atoms: E[z_i r] is parallel to d_i (the atom cannot be
    turned), and <d_i, r> = lambda where z_i > 0 (the code cannot be scaled).
    """
    z = dictionary.encode(x)
    residual = y.to(z) - dictionary.decode(z, x)
    atoms = functional.normalize(dictionary.W_dec, dim=1)
    weighted = z.T @ residual / len(x)
    along = (weighted * atoms).sum(1)
    across = torch.linalg.vector_norm(weighted - along[:, None] * atoms, dim=1)
    size = z.T @ torch.linalg.vector_norm(residual, dim=1) / len(x)
    # Where nothing is left but rounding errors their direction says nothing: then the tilt is 0, or nearly.
    rounding = ROUNDING * (z.T @ torch.linalg.vector_norm(y.to(z), dim=1)) / len(x)
    norms = torch.linalg.vector_norm(dictionary.W_dec, dim=1)
    energy = z.square().mean(0) * norms
    fires = (z > 0).float().mean(0)
    undefined = torch.full_like(size, torch.nan)
    return Optimality(
        tilt=torch.where(fires > 0, across / size.maximum(rounding), undefined),
        pull=torch.where(fires > 0, along / energy, undefined),
        density=fires,
    )


@torch.no_grad()
def antipodal_pairs(
    dictionary: Dictionary, density: Tensor, least_density: float = 0.1, cosine: float = -0.9
) -> Tensor:
    """Dense latents that write opposite directions: int64 [pairs, 2], the first index the smaller."""
    dense = (density >= least_density).nonzero().squeeze(1)
    atoms = functional.normalize(dictionary.W_dec[dense], dim=1)
    opposite = (atoms @ atoms.T).triu(1) <= cosine
    return dense[opposite.nonzero()]
