"""Figures of a finished dictionary against their definitions: AUROC by counting pairs, FVU, L0, density."""

import numpy as np
import pytest
import torch
from formulas import LATENTS, ROWS, VARIANTS, Formulas, leaves, randn, random_dictionary

from pipeline.errors import InputError
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.measure.metrics import auroc, measure_code


def pairwise(scores: np.ndarray, member: np.ndarray) -> float:
    inside, outside = scores[member], scores[~member]
    return float(np.mean([1.0 if i > o else 0.5 if i == o else 0.0 for i in inside for o in outside]))


@pytest.mark.parametrize("seed", range(3))
def test_auroc_equals_counting_pairs_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.maximum(0, rng.integers(-4, 5, (30, 6))).astype(np.float32)  # most entries are tied at zero
    codes[:, 5] = 0
    member = rng.random((30, 3)) < [0.5, 0.1, 0.9]
    member[0], member[1] = True, False
    found = auroc(torch.from_numpy(codes), torch.from_numpy(member)).numpy()
    expected = [[pairwise(codes[:, i], member[:, g]) for g in range(3)] for i in range(6)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[5] == 0.5).all()


def test_auroc_of_a_group_of_all_or_none_is_nan() -> None:
    member = torch.stack([torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)], dim=1)
    assert auroc(randn(10, 2), member).isnan().all()


@pytest.mark.parametrize("split", [ROWS, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_code_metrics_are_the_formulas(variant: str, split: int) -> None:
    config = VARIANTS[variant]
    dictionary = random_dictionary(config).requires_grad_(False)
    x, y = randn(ROWS, config.d_in).double(), 2 + randn(ROWS, config.d_out, seed=1).double()
    metrics, codes = measure_code(dictionary, zip(x.split(split), y.split(split), strict=True))
    direct = Formulas(config, leaves(dictionary), x, y)
    z = torch.cat([direct.code(i) for i in direct.blocks], dim=1).detach()
    residual = y - direct.reconstruction().detach()
    assert metrics.rows == ROWS
    assert metrics.fvu == pytest.approx(((residual**2).sum() / ((y - y.mean(0)) ** 2).sum()).item())
    for number, (site, columns) in enumerate(zip(config.output, columns_of(config), strict=True)):
        part = (residual[:, columns] ** 2).sum() / ((y - y.mean(0))[:, columns] ** 2).sum()
        assert list(metrics.site_fvu)[number] == site
        assert metrics.site_fvu[site] == pytest.approx(part.item())
    assert metrics.l0 == pytest.approx((z > 0).double().sum(1).mean().item())
    np.testing.assert_allclose(metrics.density, (z > 0).double().mean(0), atol=1e-7)
    assert metrics.dead_share == pytest.approx((z.amax(0) == 0).double().mean().item())
    torch.testing.assert_close(codes, z)


def columns_of(config: DictionaryConfig) -> list[slice]:
    """The columns of each output site."""
    ends = np.cumsum(config.output_widths).tolist()
    return [slice(end - width, end) for end, width in zip(ends, config.output_widths, strict=True)]


def test_one_row_has_no_variance() -> None:
    dictionary = random_dictionary(VARIANTS["transcoder"]).float()
    with pytest.raises(InputError, match=r"^1 rows have no variance at mlp_out\.1: measure on more rows"):
        measure_code(dictionary, [(randn(1, 6), randn(1, 5))])


def test_code_metrics_keep_chosen_latents() -> None:
    dictionary = random_dictionary(VARIANTS["transcoder"]).float()
    rows = [(randn(ROWS, 6), randn(ROWS, 5))]
    chosen, every = (measure_code(dictionary, rows, keep)[1] for keep in ([5, 2], None))
    assert every.shape == (ROWS, LATENTS)
    assert torch.equal(chosen, every[:, [5, 2]])


def test_a_perfect_reconstruction_and_the_mean() -> None:
    dictionary = random_dictionary(VARIANTS["transcoder"]).float().requires_grad_(False)
    x = randn(ROWS, 6)
    assert measure_code(dictionary, [(x, dictionary(x))])[0].fvu == 0
    dictionary.W_dec.zero_()
    y = randn(ROWS, 5)
    dictionary.b_dec.copy_(y.mean(0))
    assert measure_code(dictionary, [(x, y)])[0].fvu == pytest.approx(1.0)
