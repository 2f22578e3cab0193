"""The Linear Representation Bench: its data is what it says it is, and its scores are what brute force finds."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from formulas import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import InputError
from pipeline.lrb.data import (
    Bench,
    Hierarchy,
    best_linear_readout,
    feature_gradient,
    make_coefficients,
    make_features,
    make_rows,
    recovery,
)
from pipeline.sdl.dictionary.activations import TopK
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.anchor_controls import controlled

SMALL = Bench(60, 40, 20_000, 0.9, 0.3)


def products_of(features: Tensor) -> Tensor:
    """Inner products of different features."""
    products = features.double() @ features.double().T
    return products[~torch.eye(len(features), dtype=torch.bool)]


# ---- features


@pytest.mark.parametrize("variant", ["bounded", "negative"])
@pytest.mark.parametrize("stream", [0, 1])
def test_features_are_unit_and_apart(variant: str, stream: int) -> None:
    features = make_features(replace(SMALL, variant=variant), stream)
    assert (features.shape, features.dtype) == ((60, 40), torch.float32)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(60))
    assert products_of(features).max() <= 0.3 + 1e-6


@pytest.mark.parametrize("variant", ["bounded", "negative"])
def test_they_are_pushed_along_the_gradient_of_the_papers_sum(variant: str) -> None:
    bench = replace(SMALL, variant=variant, interference=0.1, margin=0.02, negative_weight=0.3)
    W = torch.nn.functional.normalize(randn(60, 40), dim=1).requires_grad_()
    products = W @ W.T
    between = products[~torch.eye(60, dtype=torch.bool)]
    total = (between - 0.08).clamp(min=0).square().sum()
    if variant == "negative":
        total = total + 0.3 * between.clamp(min=0).square().sum()
    total.backward()
    with torch.no_grad():
        found = feature_gradient(bench, W, products.masked_fill(torch.eye(60, dtype=torch.bool), -1.0))
    torch.testing.assert_close(found, W.grad)


def test_without_pushing_they_would_not_be_apart() -> None:
    assert products_of(torch.nn.functional.normalize(randn(60, 40), dim=1)).max() > 0.4


def test_the_negative_variant_pushes_inner_products_below_zero() -> None:
    bounded, negative = (products_of(make_features(replace(SMALL, variant=v))) for v in ("bounded", "negative"))
    assert negative.clamp(min=0).square().sum() < 0.5 * bounded.clamp(min=0).square().sum()
    assert negative.mean() < bounded.mean()


def test_features_that_are_apart_already_are_the_gaussian_ones() -> None:
    """Nothing is pushed that need not be."""
    far = make_features(replace(SMALL, interference=0.99))
    assert torch.equal(far, make_features(replace(SMALL, interference=0.98)))
    assert products_of(far).max() > 0.4


def test_too_many_features_are_refused() -> None:
    """Among more than 2 d unit vectors in d dimensions two have an inner product well above zero."""
    with pytest.raises(InputError, match=r"^100 features in 3 dimensions did not come to inner products of"):
        make_features(Bench(100, 3, 10, interference=0.01, feature_steps=50))


def test_the_published_size_is_reached_at_once() -> None:
    """n = 1000 in 768 dimensions at M = 0.1."""
    assert products_of(make_features(Bench())).max() <= 0.1 + 1e-6


# ---- coefficients


def test_frequency_least_and_mean() -> None:
    z = make_coefficients(replace(SMALL, least=0.25, beta=2.0))
    active = z > 0
    assert (z.shape, z.dtype) == ((20_000, 60), torch.float32)
    assert active.float().mean().item() == pytest.approx(0.1, abs=0.002)  # 1.2 M draws: four deviations are 0.0011
    assert (active.float().mean(0) - 0.1).abs().max() < 0.011  # of one feature: five deviations
    assert z[active].min() == pytest.approx(0.25, abs=1e-3)
    assert z[active].mean().item() == pytest.approx(2.25, rel=0.02)
    assert z[active].std().item() == pytest.approx(2.0, rel=0.03)
    # An exponential: the share above its mean is 1 / e.
    assert (z[active] > 2.25).float().mean().item() == pytest.approx(np.exp(-1), abs=0.01)


def test_features_are_independent() -> None:
    active = (make_coefficients(SMALL) > 0).double()
    correlation = torch.corrcoef(active.T) - torch.eye(60)
    assert correlation.abs().max() < 5 / 20_000**0.5


@pytest.mark.parametrize("features", [60, 61])
def test_pairs_are_drawn_together(features: int) -> None:
    """With probability c the second of a pair is active where the first is: their correlation is c."""
    active = (make_coefficients(replace(SMALL, features=features, correlation=0.7)) > 0).double()
    correlation = torch.corrcoef(active.T)
    assert (active.mean(0) - 0.1).abs().max() < 0.011  # as often as without
    for i in range(0, 60, 2):
        assert correlation[i, i + 1].item() == pytest.approx(0.7, abs=0.05)
        correlation[i, i + 1] = correlation[i + 1, i] = 0
    assert (correlation - torch.eye(features)).abs().max() < 5 / 20_000**0.5


def test_a_child_is_active_only_with_its_parent() -> None:
    levels = Hierarchy(parents=6, children=3, child_share=0.4)
    active = make_coefficients(replace(SMALL, hierarchy=levels)) > 0
    for parent in range(6):
        children = active[:, 6 + 3 * parent : 9 + 3 * parent]
        of_parent = active[:, parent]
        assert of_parent.float().mean().item() == pytest.approx(0.1, abs=0.011)
        assert not children[~of_parent].any()
        share = children[of_parent].float().mean(0)
        assert (share - 0.4).abs().max() < 0.06  # of 2,000 rows: five deviations
    rest = active[:, 24:].float().mean(0)
    assert (rest - 0.1).abs().max() < 0.011


def test_rows_are_the_sum_of_their_features_and_noise() -> None:
    bench = replace(SMALL, samples=5000)
    z, W = make_coefficients(bench), make_features(bench)
    x = make_rows(bench, z, W)
    torch.testing.assert_close(x[7], sum(z[7, i] * W[i] for i in range(60)))
    noise = make_rows(replace(bench, noise=0.3), z, W) - x
    assert noise.std().item() == pytest.approx(0.3, rel=0.01)
    assert noise.mean().abs() < 0.003
    of_another = make_rows(replace(bench, noise=0.3), z, W, stream=1) - x
    assert torch.corrcoef(torch.stack([noise.flatten(), of_another.flatten()]))[0, 1].abs() < 0.01


# ---- seeds


def test_the_same_seed_gives_the_same_bytes() -> None:
    for make in (make_features, make_coefficients):
        assert torch.equal(make(SMALL), make(replace(SMALL)))
        assert not torch.equal(make(SMALL), make(replace(SMALL, seed=1)))


def test_sources_have_features_of_their_own() -> None:
    one, other = make_features(SMALL, 0), make_features(SMALL, 1)
    assert (one @ other.T).abs().max() < 0.8
    assert (one @ make_features(replace(SMALL, seed=1), 0).T).abs().max() < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_no_first_weight_is_a_feature(seed: int) -> None:
    """Nor a random anchor: both come from small seeds too, and would recover features from the start."""
    bench = Bench(100, 64, 10, interference=0.99, seed=seed)
    config = DictionaryConfig(("x",), ("x",), (64,), (64,), 400, TopK(1))
    for stream in (0, 1):
        features = make_features(bench, stream)
        for of_trainer in range(8):
            dictionary = Dictionary(config)
            dictionary.initialise(of_trainer)
            assert recovery(dictionary.W_dec, features).m_gt == 0
            assert recovery(controlled({"0": features}, "random", of_trainer)["0"], features).m_gt == 0


# ---- what is refused


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"variant": "positive"}, "variant is bounded or negative, not 'positive'"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, not 1.0"),
        (
            {"interference": -0.1, "correlation": 2},
            "interference must .*; correlation must be at least 0 and bel",
        ),
        (
            {"hierarchy": Hierarchy(parents=15, children=4)},
            "15 parents with 4 children each do not fit into 60 features",
        ),
        ({"hierarchy": Hierarchy(child_share=1.0)}, r"hierarchy\.child_share must be at least 0 and below 1, not 1.0"),
        ({"hierarchy": Hierarchy(child_share=0.0)}, r"hierarchy\.child_share must be above 0 and finite, not 0.0"),
        ({"hierarchy": Hierarchy(children=0)}, r"hierarchy\.children must be a whole number above 0, not 0"),
        ({"hierarchy": Hierarchy(parents=-5)}, r"hierarchy\.parents must be a whole number above 0, not -5"),
        ({"samples": 0}, "samples must be a whole number above 0, not 0"),
        ({"noise": -1.0, "beta": -0.5}, "beta must be at least 0 and finite, not -0.5; noise must be at least 0 and"),
        ({"noise": float("inf")}, "noise must be at least 0 and finite, not inf"),
        ({"seed": 2**63}, "seed must be a whole number, at least 0 and below 2.63, not 9223372036854775808"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        replace(SMALL, **keys)


# ---- scores


def brute_force(weights: Tensor, features: Tensor, first: int) -> tuple[float, float, float]:
    """Each cosine by itself, and every way to give each feature a row of its own, or none."""
    cosine = np.array(
        [
            [abs(float(w @ f)) / (float(w @ w) * float(f @ f)) ** 0.5 for w in weights.double()]
            for f in features.double()[first:]
        ]
    )
    best = cosine.max(axis=1)
    scored, latents = cosine.shape
    if scored <= latents:
        sums = [sum(cosine[i, j] for i, j in enumerate(rows)) for rows in permutations(range(latents), scored)]
    else:
        sums = [sum(cosine[i, j] for j, i in enumerate(of)) for of in permutations(range(scored), latents)]
    return float((best > 0.95).mean()), float(best.mean()), max(sums) / scored


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**31))
def test_recovery_is_what_brute_force_finds(latents: int, features: int, first: int, seed: int) -> None:
    first = min(first, features - 1)
    truth = randn(features, 3, seed=seed)
    weights = randn(latents, 3, seed=seed + 1) * 5
    weights[0] = -0.2 * truth[-1]  # a sign and a length do not matter
    found = recovery(weights, truth, first)
    assert (found.m_gt, found.m_ip, found.mcc) == pytest.approx(brute_force(weights, truth, first), abs=1e-5)


def test_features_that_were_anchored_are_not_scored() -> None:
    truth = torch.eye(6)
    assert recovery(truth[:2], truth, first=2).m_gt == 0
    assert recovery(truth[:2], truth, first=0).m_gt == pytest.approx(2 / 6)
    assert recovery(truth[2:], truth, first=2) == recovery(truth, truth, first=2)
    assert recovery(truth, truth, first=2).m_gt == 1


def test_one_row_for_two_features_counts_once_in_the_matching() -> None:
    truth = torch.tensor([[1.0, 0.05], [1.0, -0.05]])
    found = recovery(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), truth)
    assert found.m_gt == 1
    assert found.mcc == pytest.approx((0.99875 + 0.04994) / 2, abs=1e-4)


def test_dead_rows_recover_nothing() -> None:
    found = recovery(torch.zeros(5, 4), torch.eye(4))
    assert (found.m_gt, found.m_ip, found.mcc) == (0, 0, 0)


def test_nothing_left_to_score_is_refused() -> None:
    with pytest.raises(InputError, match="all 4 features were anchored"):
        recovery(torch.eye(4), torch.eye(4), first=4)


def test_the_best_linear_readout_is_least_squares() -> None:
    bench = replace(SMALL, samples=4000, noise=0.1)
    z, W = make_coefficients(bench), make_features(bench)
    x = make_rows(bench, z, W)
    design = np.column_stack([x.double().numpy(), np.ones(len(x))])
    solved = np.linalg.lstsq(design, z.double().numpy(), rcond=None)[0][:-1].T
    expected = solved / np.linalg.norm(solved, axis=1, keepdims=True)
    np.testing.assert_allclose(best_linear_readout(z, x).numpy(), expected, atol=1e-3)
