"""Thresholds of BatchTopK dictionaries: just k N latents are active on N held-out rows, as sorting everything says."""

from collections.abc import Callable, Iterator

import pytest
import torch
from formulas import ACTIVATIONS, LATENTS, VARIANTS, K, config_of, randn, random_dictionary
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.calibration import calibrate
from pipeline.sdl.dictionary.dictionary import Dictionary

ROWS = 333


def batches(x: Tensor, size: int) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(x.split(size))


def batch_top_k(variant: str = "sae") -> Dictionary:
    return random_dictionary(config_of(variant, "batch_topk")).float().requires_grad_(False)


@pytest.mark.parametrize("size", [ROWS, 100, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_asked_l0_exactly(variant: str, size: int) -> None:
    dictionary = batch_top_k(variant)
    x = randn(ROWS, dictionary.config.d_in, seed=5)
    asked: list[int] = []
    calibrate(dictionary, lambda: asked.append(0) or iter(x.split(size)))  # type: ignore[func-returns-value]
    assert len(asked) == 2  # however many blocks there are
    for block in dictionary.each_block():
        every = torch.cat([block.preactivations(part[:, block.shape.reads]) for part in x.split(size)]).flatten()
        expected = every.sort(descending=True).values[K * ROWS]
        assert torch.equal(block.own("threshold"), expected.expand(LATENTS))
    active = torch.cat([dictionary.encode(part) for part in x.split(size)]) > 0
    assert [int(part.sum()) for part in active.split(LATENTS, dim=1)] == [K * ROWS] * len(dictionary.each_block())


def test_another_l0_than_k() -> None:
    dictionary = batch_top_k()
    x = randn(ROWS, dictionary.config.d_in, seed=5)
    for l0 in (0.5, K - 0.25, K + 1.0):
        calibrate(dictionary, batches(x, 64), l0=l0)
        active = torch.cat([dictionary.encode(part) for part in x.split(64)]) > 0
        assert int(active.sum()) == round(l0 * ROWS)
    for wrong in (0.0, -1.0, LATENTS + 1.0, float("nan")):
        with pytest.raises(InputError, match=rf"an L0 is above 0 and at most latents = {LATENTS}, unlike {wrong}"):
            calibrate(dictionary, batches(x, 64), l0=wrong)


@pytest.mark.parametrize("variant", ["sae", "crosscoder", "cross_layer"])
def test_with_the_weights_that_competed_in_training(variant: str) -> None:
    dictionary = batch_top_k(variant)
    x = randn(ROWS, dictionary.config.d_in, seed=5)
    weights = [randn(LATENTS, seed=n).abs() + 0.1 for n in range(len(dictionary.each_block()))]
    calibrate(dictionary, batches(x, 64), weights)
    z = torch.cat([dictionary.encode(part) for part in x.split(64)])
    for block, weight, code in zip(dictionary.each_block(), weights, z.split(LATENTS, dim=1), strict=True):
        scores = torch.cat([block.preactivations(part[:, block.shape.reads]) * weight for part in x.split(64)])
        least_kept = scores.flatten().sort(descending=True).values[K * ROWS - 1]
        assert torch.equal(code > 0, scores >= least_kept)
        one = block.own("threshold") * weight
        torch.testing.assert_close(one, one[:1].expand(LATENTS))  # one threshold for what competed


@given(st.integers(0, 2**31))
def test_with_weights_no_rounding_lets_one_more_pass(seed: int) -> None:
    dictionary, generator = batch_top_k(), torch.Generator().manual_seed(seed)
    x, weights = torch.randn(50, 6, generator=generator), torch.rand(LATENTS, generator=generator) * 3
    calibrate(dictionary, batches(x, 50), [weights])
    assert int((dictionary.encode(x) > 0).sum()) == K * 50


def test_a_latent_without_weight_never_competes() -> None:
    dictionary = batch_top_k()
    weights = torch.ones(LATENTS)
    weights[3] = 0
    calibrate(dictionary, batches(randn(ROWS, 6), 50), [weights])
    z = dictionary.encode(randn(ROWS, 6))
    assert not z[:, 3].any()
    assert int((z > 0).sum()) == K * ROWS


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_of_equal_preactivations_all_or_none_pass(levels: int, rows: int, seed: int) -> None:
    """Never more than k N: values like the threshold stay out, so that fewer are active where they are tied."""
    dictionary = batch_top_k()
    generator = torch.Generator().manual_seed(seed)
    dictionary.W_enc.zero_()
    dictionary.W_enc[:, 0] = torch.randint(-1, levels, (LATENTS,), generator=generator).float()
    dictionary.b_enc.zero_()
    x = torch.randint(0, 3, (rows, 6), generator=generator).float()
    calibrate(dictionary, batches(x, 16))
    every = (x @ dictionary.W_enc.T).flatten().sort(descending=True).values
    threshold = max(0.0, every[K * rows].item())
    assert dictionary.only.own("threshold").tolist() == [threshold] * LATENTS
    assert int((dictionary.encode(x) > 0).sum()) == int((every > threshold).sum()) <= K * rows


def test_where_fewer_are_positive_all_of_them_pass() -> None:
    dictionary = batch_top_k()
    dictionary.b_enc.fill_(-2.0)
    x = randn(ROWS, 6)
    calibrate(dictionary, batches(x, 50))
    assert dictionary.only.own("threshold").tolist() == [0.0] * LATENTS
    active = dictionary.encode(x) > 0
    assert 0 < int(active.sum()) < K * ROWS
    assert torch.equal(active, dictionary.only.preactivations(x) > 0)


def test_as_many_as_there_are() -> None:
    """k = latents: whatever is positive is active."""
    config = config_of("sae", "batch_topk")
    dictionary = random_dictionary(type(config)(**{**vars(config), "activation": type(config.activation)(LATENTS)}))
    dictionary = dictionary.float().requires_grad_(False)
    dictionary.b_enc.fill_(9.0)
    calibrate(dictionary, batches(randn(20, 6), 7))
    assert dictionary.only.own("threshold").tolist() == [0.0] * LATENTS


def test_values_of_all_sizes_sort_by_their_bits() -> None:
    dictionary = batch_top_k()
    x = randn(ROWS, 6) * torch.logspace(-30, 30, ROWS)[:, None]
    dictionary.b_enc.zero_()
    calibrate(dictionary, batches(x, 10))
    every = dictionary.only.preactivations(x).flatten().sort(descending=True).values
    assert dictionary.only.own("threshold")[0] == every[K * ROWS]


def test_no_rows() -> None:
    with pytest.raises(InputError, match="no rows to calibrate the threshold on"):
        calibrate(batch_top_k(), lambda: iter([]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    x = randn(20, 6)
    x[3, 2] = x[4, 2] = bad
    with pytest.raises(InputError, match=r"calibration: activations are nan or infinite in column 2 \(1 such\);"):
        calibrate(batch_top_k(), batches(x, 7))


def test_rows_that_come_only_once() -> None:
    once = iter(randn(20, 6).split(7))
    with pytest.raises(InputError, match="`rows` gave 20 rows when it was called first and then 0"):
        calibrate(batch_top_k(), lambda: once)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "batch_topk"])
def test_other_activations_have_nothing_to_calibrate(activation: str) -> None:
    dictionary = random_dictionary(config_of("sae", activation))
    with pytest.raises(InputError, match=f"{activation} has no threshold to calibrate; batch_topk has"):
        calibrate(dictionary, batches(randn(5, 6), 5))
