"""Products with sparse codes against the dense formula in float64, and selecting against a full sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.sdl.dictionary.selection import select_top_k, top_k_of_rows
from pipeline.sdl.dictionary.sparse import Places

ROWS, WIDTH, LATENTS = 700, 24, 96


def uneven_places(generator: torch.Generator) -> tuple[Places, Tensor]:
    """Rows with no entries, some, and all of them; and the mask of the same."""
    share = torch.rand(ROWS, 1, generator=generator) ** 3
    mask = torch.rand(ROWS, LATENTS, generator=generator) < share
    mask[0], mask[1], mask[:, 5] = False, True, False
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return Places(starts, mask.nonzero()[:, 1].contiguous(), LATENTS), mask


def test_outputs_and_gradients_are_those_of_the_dense_code() -> None:
    generator = torch.Generator().manual_seed(0)
    places, mask = uneven_places(generator)
    x, W_enc, b_enc, W_dec, y = (
        torch.randn(shape, generator=generator)
        for shape in ((ROWS, WIDTH), (LATENTS, WIDTH), (LATENTS,), (LATENTS, WIDTH + 3), (ROWS, WIDTH + 3))
    )
    weights = [each.requires_grad_() for each in (W_enc, b_enc, W_dec)]
    values = places.encode(x, *weights[:2])
    out = places.decode(values.relu(), weights[2])
    (out - y).square().sum().backward()

    exact = [each.detach().double().requires_grad_() for each in weights]
    preactivations = x.double() @ exact[0].T + exact[1]
    expected = torch.where(mask, preactivations, 0).clamp(min=0) @ exact[2]
    (expected - y.double()).square().sum().backward()

    torch.testing.assert_close(values.double(), preactivations[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        places.dense(values).double(), torch.where(mask, preactivations, 0), rtol=1e-5, atol=1e-5
    )
    for found, wanted in zip(weights, exact, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(
            found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4 * float(wanted.grad.abs().max())
        )
    assert W_enc.grad is not None
    assert not W_enc.grad[5].any()  # a latent that is nowhere kept


@given(st.integers(1, 40), st.sampled_from([1, 3, 8, 64, 96, 1024, 1000]), st.integers(0, 2**31))
def test_the_k_largest_of_each_row(k: int, columns: int, seed: int) -> None:
    k = min(k, columns)
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    found = top_k_of_rows(values, k)
    assert torch.equal(found.sort().values, values.sort(descending=True).indices[:, :k].sort().values)


@given(st.integers(1, 8), st.integers(0, 2**31))
def test_of_equal_entries_any_may_be_kept(k: int, seed: int) -> None:
    values = torch.randint(0, 3, (4, 64), generator=torch.Generator().manual_seed(seed)).float()
    found = top_k_of_rows(values, k)
    assert all(len(set(row)) == k for row in found.tolist())
    assert torch.equal(values.gather(1, found).sort().values, values.topk(k).values.sort().values)


@pytest.mark.parametrize("k", [1, 7, 96])
def test_selection_in_float32_is_that_of_the_dense_preactivations(k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, W_enc = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(LATENTS, WIDTH, generator=generator)
    b_enc = torch.randn(LATENTS, generator=generator)
    places = select_top_k(x, W_enc, b_enc, k, dtype=torch.float32)
    expected = (x @ W_enc.T + b_enc).topk(k).indices.sort().values
    assert places.starts.tolist() == list(range(0, k * ROWS + 1, k))
    assert torch.equal(places.latent.view(ROWS, k), expected)


def test_selection_in_bfloat16_misses_only_near_ties() -> None:
    generator = torch.Generator().manual_seed(2)
    x, W_enc = torch.randn(ROWS, 64, generator=generator), torch.randn(1024, 64, generator=generator)
    exact = x @ W_enc.T
    places = select_top_k(x, W_enc, torch.zeros(1024), 16, torch.bfloat16)
    kept = exact.gather(1, places.latent.view(ROWS, 16))
    least = exact.topk(16).values[:, -1:]
    assert (kept >= least - 0.02 * exact.abs().amax(1, keepdim=True)).all()
    assert (kept >= least).float().mean() > 0.98
