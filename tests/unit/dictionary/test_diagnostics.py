"""Diagnostics of dictionaries made by hand, whose defects are known, and of a trained one."""

from dataclasses import replace
from itertools import product
from math import isnan

import numpy as np
import pytest
import torch
from formulas import randn
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional

from pipeline.lrb.cells import Data, batches, make_trainer
from pipeline.lrb.data import Bench, Hierarchy, make_coefficients, make_features, make_rows
from pipeline.lrb.methods import Cell, Size, resolve
from pipeline.sdl.dictionary.activations import ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.measure.diagnostics import absorption, antipodal_pairs, at_truth, optimality, polysemanticity
from pipeline.sdl.measure.metrics import measure_code


def dictionary_of(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor | None = None, k: int | None = None) -> Dictionary:
    latents, width = W_enc.shape
    activation = ReLU() if k is None else TopK(k)
    dictionary = Dictionary(DictionaryConfig(("x",), ("x",), (width,), (W_dec.shape[1],), latents, activation))
    with torch.no_grad():
        dictionary.W_enc.copy_(W_enc)
        dictionary.W_dec.copy_(W_dec)
        dictionary.b_enc.copy_(torch.zeros(latents) if b_enc is None else b_enc)
    return dictionary


# ---- which features each latent serves


def test_which_latents_serve_which_features() -> None:
    """Latent 0 serves features 0 and 1, latent 1 serves 2 and faintly 0, latent 2 is dead; feature 3 has none."""
    W = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.05, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    served = polysemanticity(dictionary_of(W, W), torch.eye(4), torch.zeros(4), 2.0)
    assert served.dtype == torch.bool
    assert served.tolist() == [[True, False, False], [True, False, False], [False, True, False], [False, False, False]]
    assert served.sum(0).tolist() == [2, 1, 0]  # polysemantic, of one feature, dead


def test_features_are_given_on_top_of_the_base() -> None:
    W = torch.eye(3)
    dictionary = dictionary_of(W, W, torch.full((3,), -0.5))
    base = torch.tensor([0.0, 1.0, 0.0])  # where latent 1 fires anyway
    served = polysemanticity(dictionary, torch.eye(3), base, 1.0)
    assert served.tolist() == [[True, True, False], [False, True, False], [False, True, True]]
    assert not polysemanticity(dictionary, torch.eye(3), torch.zeros(3), 0.4).any()  # too weak for any


# ---- absorption

FEATURES = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]), dim=1)
FAMILY = [(0, (1, 2))]


def family_rows() -> tuple[Tensor, Tensor]:
    """All combinations of a parent and two children that are active with it alone."""
    z = torch.tensor([c for c in product((0.0, 1.0), repeat=3) if c[0] or not any(c[1:])])
    return z @ FEATURES, z


def test_a_clean_dictionary_absorbs_nothing() -> None:
    x, z = family_rows()
    found = absorption(dictionary_of(FEATURES, FEATURES), x, z, FEATURES, FAMILY)
    assert (found.alone, found.with_child, found.leaning, found.rate) == (0, 0, 0, 0)


def test_absorbed_parents_are_silent_where_a_child_is_active() -> None:
    """The parent's latent is switched off by children, whose decoders write the parent too."""
    W_enc = FEATURES.clone()
    W_enc[0] -= FEATURES[1] + FEATURES[2]
    W_dec = FEATURES.clone()
    W_dec[1:] += 0.5 * FEATURES[0]
    x, z = family_rows()
    found = absorption(dictionary_of(W_enc, W_dec), x, z, FEATURES, FAMILY)
    assert (found.alone, found.with_child, found.rate) == (0, 1, 1)
    assert found.leaning == pytest.approx(0.5 / 1.25**0.5)


def test_one_absorbing_child_of_two() -> None:
    """Rows with a child: of the first alone, of the second alone, of both; the first silences the parent."""
    W_enc = FEATURES.clone()
    W_enc[0] -= FEATURES[1]
    x, z = family_rows()
    found = absorption(dictionary_of(W_enc, FEATURES), x, z, FEATURES, FAMILY)
    assert found.with_child == pytest.approx(2 / 3)
    assert found.leaning == 0


def test_a_parent_that_is_never_found_is_not_absorbed() -> None:
    """Silent with and without children: that is another failure."""
    x, z = family_rows()
    found = absorption(dictionary_of(FEATURES, FEATURES, torch.tensor([-9.0, 0, 0])), x, z, FEATURES, FAMILY)
    assert (found.alone, found.with_child, found.rate) == (1, 1, 0)


def test_leaning_is_beyond_what_the_features_have_in_common() -> None:
    features = FEATURES.clone()
    features[1] = torch.nn.functional.normalize(torch.tensor([0.6, 0.8, 0, 0]), dim=0)
    z = family_rows()[1]
    found = absorption(dictionary_of(features, features), z @ features, z, features, [(0, (1,))])
    assert found.leaning == pytest.approx(0, abs=1e-6)


def test_features_of_several_sites_side_by_side_lean_no_further() -> None:
    """Their norm is that of their sites together."""
    W_dec = FEATURES.clone()
    W_dec[1:] += 0.5 * FEATURES[0]
    x, z = family_rows()
    alone = absorption(dictionary_of(FEATURES, W_dec), x, z, FEATURES, FAMILY)
    twice = absorption(dictionary_of(FEATURES, W_dec), x, z, FEATURES * 2**0.5, FAMILY)
    assert twice.leaning == pytest.approx(alone.leaning)
    assert alone.leaning > 0.4


def test_without_a_parent_alone_there_is_no_rate() -> None:
    x, z = family_rows()
    always = z[:, 1:].any(1) | (z[:, 0] == 0)
    found = absorption(dictionary_of(FEATURES, FEATURES), x[always], z[always], FEATURES, FAMILY)
    assert isnan(found.alone)
    assert isnan(found.rate)
    assert found.with_child == 0


HIERARCHICAL = Size(
    Bench(100, 80, 10_000, 0.95, 0.25, hierarchy=Hierarchy(parents=15, children=3, child_share=0.3)),
    *(300, 300, 512, 5e-3, 5, 15),
)


def test_plain_training_absorbs() -> None:
    """On hierarchical data parents' latents are silent with children more often than alone."""
    torch.set_num_threads(1)
    cell = Cell(HIERARCHICAL, "topk", "plain", 0)
    size, how = resolve(cell)
    z, features = make_coefficients(size.bench), make_features(size.bench)
    x = make_rows(size.bench, z, features)
    trainer = make_trainer(size, how, cell, Data(z, (x,), (features,)))
    for rows in batches(size, 0):
        trainer.step(x[rows], x[rows])
    families = [(p, tuple(range(15 + 3 * p, 18 + 3 * p))) for p in range(15)]
    found = absorption(trainer.result(), x, z, features, families)
    assert found.rate > 0.1, found
    assert found.leaning > 0.05, found


# ---- the configuration of the truth


def test_the_truth_reads_and_writes_each_feature_alone() -> None:
    """A crosscoder whose sites have means and scales of their own, against the formula on raw activations."""
    read = torch.cat([functional.normalize(randn(9, 5, seed=seed), dim=1) for seed in (0, 1)], dim=1)
    config = DictionaryConfig(("a", "b"), ("a", "b"), (5, 5), (5, 5), 40, TopK(3))
    norm = Normalisation(randn(10, seed=2), torch.tensor([0.5] * 5 + [2.0] * 5))
    truth = at_truth(config, (read, read), norm, norm)
    assert not truth.W_enc[9:].any()
    one = norm.mean + 7 * read[4]  # a feature of strength 7
    alone = Dictionary(replace(truth.config, activation=TopK(1)))
    alone.load_state_dict(truth.state_dict())
    torch.testing.assert_close(alone(one[None])[0], one)
    x = randn(50, 10, seed=3)
    weights = read.double() * norm.scale**2 / (read * norm.scale).double().square().sum(1, keepdim=True)
    strengths = ((x - norm.mean).double() @ weights.T).relu()
    kept = strengths * (read * norm.scale).norm(dim=1)
    strengths = torch.where(kept >= kept.topk(3).values[:, -1:], strengths, 0)
    torch.testing.assert_close(truth(x).double(), strengths @ read.double() + norm.mean, rtol=1e-4, atol=1e-4)


def test_the_truth_loses_nothing_where_features_do_not_interfere() -> None:
    """A transcoder with orthogonal inputs loses nothing; with others, and with wrong ones, it does."""
    read = torch.linalg.qr(randn(12, 12, seed=0))[0][:8]
    written = functional.normalize(randn(8, 7, seed=1), dim=1)
    z = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    z[z < 0.7] = 0
    config = DictionaryConfig(("a",), ("b",), (12,), (7,), 20, TopK(8))
    x_norm, y_norm = (Normalisation(torch.zeros(d), torch.full((d,), s)) for d, s in ((12, 3.0), (7, 0.1)))

    def fvu(read: Tensor, written: Tensor) -> float:
        return measure_code(at_truth(config, (read, written), x_norm, y_norm), [(z @ read, z @ written)])[0].fvu

    assert fvu(read, written) < 1e-10
    wrong = at_truth(config, (read, written.roll(1, 0)), x_norm, y_norm)
    assert measure_code(wrong, [(z @ read, z @ written)])[0].fvu > 0.5
    assert fvu(functional.normalize(randn(8, 12, seed=4), dim=1), written) > 0.01


# ---- conditions of an optimum


def exact_code(x: np.ndarray, D: np.ndarray, penalty: float) -> np.ndarray:
    """argmin over z >= 0 of 1/2 ||x - D^T z||^2 + penalty sum z for each row, D [latents, width] with full row rank."""
    shifted = np.linalg.solve(D @ D.T, np.full(len(D), penalty)) @ D  # D shifted = penalty
    return np.stack([nnls(D.T, row - shifted)[0] for row in x])


def an_optimum(penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, 6], its exact codes, and unit atoms [4, 6]: alternately the best codes and the best unit atoms."""
    generator = np.random.default_rng(0)
    truth = generator.standard_normal((4, 6))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    z = (generator.random((150, 4)) < 0.4) * (0.5 + generator.exponential(size=(150, 4)))
    x = z @ truth + 0.1 * generator.standard_normal((150, 6))
    D = truth + 0.2 * generator.standard_normal((4, 6))
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    for _ in range(250):
        z = exact_code(x, D, penalty)
        for i in range(4):  # given all others, the best unit atom lies along what it has to write
            D[i] = z[:, i] @ (x - z @ D + np.outer(z[:, i], D[i]))
            D[i] /= np.linalg.norm(D[i])
    return torch.tensor(x), torch.tensor(exact_code(x, D, penalty)), torch.tensor(D)


class Given(Dictionary):
    """A dictionary whose encoder is a table of codes."""

    def __init__(self, D: Tensor, z: Tensor):
        width = D.shape[1]
        super().__init__(DictionaryConfig(("x",), ("x",), (width,), (width,), len(D), ReLU()))
        self.double().W_dec.data.copy_(D)
        self.code = z

    def encode(self, x: Tensor) -> Tensor:
        return self.code


@pytest.mark.parametrize("penalty", [0.0, 0.15])
def test_an_optimum_has_no_tilt(penalty: float) -> None:
    x, z, D = an_optimum(penalty)
    found = optimality(Given(D, z), x, x)
    assert found.tilt.max() < 0.02  # without a penalty it is a slow way there
    expected = penalty * z.mean(0) / z.square().mean(0)  # <d, r> = penalty wherever a latent is active
    torch.testing.assert_close(found.pull, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.density.double(), (z > 0).double().mean(0), rtol=0, atol=1e-6)


def test_off_the_optimum_there_is_tilt() -> None:
    """One atom turned, with the best codes for the turned dictionary."""
    x, _, D = an_optimum(0.0)
    across = torch.linalg.svd(D).Vh[-1]  # at a right angle to all atoms
    D[1] = torch.nn.functional.normalize(D[1] + 0.5 * across, dim=0)
    z = torch.tensor(exact_code(x.numpy(), D.numpy(), 0.0))
    found = optimality(Given(D, z), x, x)
    assert found.tilt[1] > 0.5
    assert found.tilt[1] == found.tilt.max()


def test_the_length_of_atoms_does_not_matter() -> None:
    """A decoder row of norm 3 with a third of the activity is the same dictionary: tilt and relative pull are."""
    x, z, D = an_optimum(0.15)
    D[1] = torch.nn.functional.normalize(D[1] + 0.3 * D[0], dim=0)
    found, scaled = (optimality(Given(D * s, z / s), x, x) for s in (1.0, 3.0))
    torch.testing.assert_close(found.tilt, scaled.tilt)
    torch.testing.assert_close(found.pull, scaled.pull)


def test_activity_that_is_too_high_pulls_back() -> None:
    x, z, D = an_optimum(0.0)
    found = optimality(Given(D, 1.2 * z), x, x)
    assert (found.pull < 0).all()


def test_silent_latents_have_no_figures_and_perfect_ones_no_tilt() -> None:
    _, z, D = an_optimum(0.0)
    z[:, 2] = 0
    found = optimality(Given(D, z), z @ D, z @ D)
    assert found.tilt.isnan().tolist() == [False, False, True, False]
    assert found.pull.isnan().tolist() == [False, False, True, False]
    assert found.density[2] == 0
    assert found.tilt[[0, 1, 3]].max() < 1e-6


# ---- dense pairs


def test_antipodal_pairs_are_dense_and_opposite() -> None:
    atoms = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [-3.0, 0.1, 0], [0, -1.0, 0], [0, 0, 1.0], [0, 0, 0]])
    dictionary = dictionary_of(atoms, atoms)
    density = torch.tensor([0.5, 0.5, 0.2, 0.05, 0.9, 0.9])  # latent 3 is rare
    assert antipodal_pairs(dictionary, density).tolist() == [[0, 2]]
    assert antipodal_pairs(dictionary, density, least_density=0.01).tolist() == [[0, 2], [1, 3]]
    assert antipodal_pairs(dictionary, torch.zeros(6)).shape == (0, 2)
