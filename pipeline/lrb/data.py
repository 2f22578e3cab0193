"""The Linear Representation Bench (arXiv 2512.05534, synthetic experiments): data whose true features are known.

n unit features w_i in n_p dimensions, none closer to another than M; sparse coefficients x_d, each Bernoulli(1 - S)
times (c_min + Exp(beta)); activations x_p = W_p x_d. A dictionary is scored by how well its rows recover the
features it was not anchored to. The paper leaves constants open; every one of ours is a field of `Bench`.

Transcoders read W_p x_d and write W_r x_d, with other features W_r of the same coefficients; crosscoders read and write
both side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.checks import below_one, not_negative, positive, refuse, seeds, whole
from pipeline.errors import InputError

RECOVERED = 0.95
"""A feature counts as recovered when a latent's cosine with it is above this (the paper's)."""


@dataclass(frozen=True)
class Hierarchy:
    """Parents and sub-concepts: a child is active only where its parent is."""

    parents: int = 20
    """How many of the first features are parents; their children follow, parent by parent."""
    children: int = 4
    """How many children each parent has."""
    child_share: float = 0.2
    """Probability of each child where its parent is active."""

    def problems(self, features: int) -> list[str]:
        """Return why there cannot be such families among `features` features."""
        found = [
            f"hierarchy.{problem}"
            for problem in (
                *whole(parents=self.parents, children=self.children),
                *positive(child_share=self.child_share),
                *below_one(child_share=self.child_share),
            )
        ]
        if not found and self.parents * (1 + self.children) > features:
            found = [f"{self.parents} parents with {self.children} children each do not fit into {features} features"]
        return found

    def families(self) -> list[tuple[int, range]]:
        """Each parent with its children."""
        first = self.parents
        return [(p, range(first + p * self.children, first + (p + 1) * self.children)) for p in range(self.parents)]


@dataclass(frozen=True)
class Bench:
    """What determines the data."""

    features: int = 1000
    """n."""
    width: int = 768
    """n_p."""
    samples: int = 100_000
    """N."""
    sparsity: float = 0.99
    """S: each feature is silent on this share of samples."""
    interference: float = 0.1
    """M: the largest inner product of two features."""
    variant: str = "bounded"
    """bounded: inner products are at most M. negative: all of them are also pushed below zero."""
    seed: int = 0
    margin: float = 0.005
    """eps: features are pushed until their inner products are at most M - eps."""
    negative_weight: float = 0.05
    """lambda of the negative variant."""
    feature_rate: float = 0.5
    """Step size of the projected gradient descent on the features."""
    feature_steps: int = 5000
    """Most of its steps. It ends when M is reached, in the negative variant after a tenth of them at least."""
    least: float = 0.5
    """c_min."""
    beta: float = 0.5
    """Mean of the exponential part of a coefficient."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on each activation."""
    correlation: float = 0.0
    """Features 2i and 2i + 1 are drawn together with this probability, else on their own."""
    hierarchy: Hierarchy | None = None

    def __post_init__(self) -> None:
        def given(*names: str) -> dict[str, float]:
            return {name: getattr(self, name) for name in names}

        problems = [
            *below_one(**given("sparsity", "interference", "correlation")),
            *whole(**given("features", "width", "samples", "feature_steps")),
            *not_negative(**given("margin", "negative_weight", "least", "beta", "noise")),
            *positive(feature_rate=self.feature_rate),
            *seeds(seed=self.seed),
        ]
        if self.variant not in ("bounded", "negative"):
            problems.append(f"variant is bounded or negative, not {self.variant!r}")
        refuse(problems + ([] if self.hierarchy is None else self.hierarchy.problems(self.features)))


def make_features(bench: Bench, stream: int = 0) -> Tensor:
    """Unit rows [n, n_p] whose inner products are at most M, by projected gradient descent from Gaussian ones.

    Lowers sum_{i != j} max(0, <w_i, w_j> - (M - eps))^2, for the negative variant plus lambda sum max(0, <w_i, w_j>)^2.
    `stream` tells apart the features of several sources. Raises InputError if M is not reached.
    """
    generator = torch.Generator().manual_seed(_seed(bench.seed, 1 + stream))
    W = functional.normalize(torch.randn(bench.features, bench.width, generator=generator), dim=1)
    own = torch.eye(bench.features, dtype=torch.bool)
    least_steps = bench.feature_steps // 10 if bench.variant == "negative" else 0
    for step in range(bench.feature_steps):
        products = (W @ W.T).masked_fill_(own, -1.0)
        if step >= least_steps and products.max() <= bench.interference:
            return W
        W = functional.normalize(W - bench.feature_rate * feature_gradient(bench, W, products), dim=1)
    raise InputError(
        f"{bench.features} features in {bench.width} dimensions did not come to inner products of at most "
        f"{bench.interference} in {bench.feature_steps} steps: take fewer features, more dimensions or a larger M"
    )


def feature_gradient(bench: Bench, W: Tensor, products: Tensor) -> Tensor:
    """The gradient by W [n, n_p] of what `make_features` lowers; `products`: W W^T, below zero on the diagonal."""
    over = (products - (bench.interference - bench.margin)).clamp_(min=0)
    if bench.variant == "negative":
        over += bench.negative_weight * products.clamp(min=0)
    return 4 * over @ W  # 2 of the square, 2 as <w_i, w_j> stands in the sum twice


def make_coefficients(bench: Bench) -> Tensor:
    """x_d float32 [samples, n], not negative."""
    generator = torch.Generator().manual_seed(_seed(bench.seed, 0))
    shape, chance = (bench.samples, bench.features), 1 - bench.sparsity

    def drawn() -> Tensor:
        return torch.rand(shape, generator=generator)

    active = drawn() < chance
    if bench.correlation:
        pairs = bench.features // 2
        together = torch.rand((bench.samples, pairs), generator=generator) < bench.correlation
        active[:, 1 : 2 * pairs : 2] = torch.where(together, active[:, 0 : 2 * pairs : 2], active[:, 1 : 2 * pairs : 2])
    if (levels := bench.hierarchy) is not None:
        parents = active[:, : levels.parents]
        last = levels.parents * (1 + levels.children)
        shares = torch.rand((bench.samples, last - levels.parents), generator=generator) < levels.child_share
        active[:, levels.parents : last] = shares & parents.repeat_interleave(levels.children, dim=1)
    strength = bench.least + bench.beta * -torch.log1p(-drawn())
    return strength.mul_(active)


def make_rows(bench: Bench, coefficients: Tensor, features: Tensor, stream: int = 0) -> Tensor:
    """x = x_d W (+ noise) float32 [samples, width]."""
    rows = coefficients @ features
    if bench.noise:
        generator = torch.Generator().manual_seed(_seed(bench.seed, 101 + stream))
        rows += bench.noise * torch.randn(rows.shape, generator=generator)
    return rows


def _seed(seed: int, stream: int) -> int:
    # Far from the seeds of trainers, whose first weights are such rows too.
    return (0x4C5242 + seed * 1009 + stream) % 2**63


# ---- scores


@dataclass(frozen=True)
class Recovery:
    """How well rows of a weight matrix recover features."""

    m_gt: float
    """Share of the features that a row's cosine with is above RECOVERED."""
    m_ip: float
    """Mean over features of the largest cosine."""
    mcc: float
    """Mean cosine where every feature has a row of its own (Hungarian matching); 0 for those that get none."""


@torch.no_grad()
def recovery(weights: Tensor, features: Tensor, first: int = 0) -> Recovery:
    """Score rows of `weights` [latents, d] on the features [first, n) of [n, d]; those before were anchored.

    Raises InputError if that leaves none.
    """
    from scipy.optimize import linear_sum_assignment  # where a bench is scored, and nowhere else

    if first >= len(features):
        raise InputError(f"all {len(features)} features were anchored, which leaves none to score: take fewer anchors")
    cosines = functional.normalize(features[first:].float(), dim=1) @ functional.normalize(weights.float(), dim=1).T
    cosines = cosines.abs()
    best = cosines.amax(1)
    matched = linear_sum_assignment(cosines.numpy(), maximize=True)
    return Recovery(
        m_gt=(best > RECOVERED).float().mean().item(),
        m_ip=best.mean().item(),
        mcc=float(cosines.numpy()[matched].sum()) / len(cosines),
    )


def best_linear_readout(coefficients: Tensor, rows: Tensor) -> Tensor:
    """The directions [n, d] along which centred rows predict each coefficient best: Cov^-1 cov(x, x_d), unit rows.

    What an encoder's rows come to without sparsity. It is not the feature itself: it turns away from the others.
    """
    x = (rows - rows.mean(0)).double()
    z = (coefficients - coefficients.mean(0)).double()
    covariance = x.T @ x + 1e-6 * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return functional.normalize(torch.linalg.solve(covariance, x.T @ z).T, dim=1).float()
