"""Selecting the largest of a whole batch, through the largest of each row, against sorting everything."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.sdl.dictionary.selection import dense_batch_top_k, select_batch_top_k, select_top_k
from pipeline.sdl.dictionary.sparse import Places


def check_against_a_sort(places: Places, scores: Tensor, k: int) -> None:
    """`scores` [rows, latents] float64. Of equal ones any may be kept; there are k * rows, each one once."""
    rows, latents = scores.shape
    assert (places.rows, places.latents) == (rows, latents)
    assert len(places.latent) == k * rows == int(places.starts[-1])
    kept = torch.zeros(rows, latents, dtype=torch.int64)
    for row in range(rows):
        of_row = places.latent[int(places.starts[row]) : int(places.starts[row + 1])]
        assert (of_row.diff() > 0).all()  # ascending
        kept[row, of_row] += 1
    assert int(kept.max()) == 1
    expected = scores.flatten().sort(descending=True).values[: k * rows]
    assert torch.equal(scores[kept.bool()].sort(descending=True).values, expected)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """x, W_enc, b_enc, weights, k. Whole numbers, so that products are exact in float32 and ties are frequent."""
    rows, latents = draw(st.integers(1, 30)), draw(st.sampled_from([1, 2, 5, 16, 24, 128, 130, 256]))
    k = draw(st.integers(1, min(latents, 12)) | st.just(latents) | st.just(max(1, latents - 1)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([2, 50]))

    def whole(*shape: int) -> Tensor:
        return torch.randint(-size, size + 1, shape, generator=generator).float()

    x, W_enc, b_enc = whole(rows, 4), whole(latents, 4), whole(latents)
    hogs = draw(st.integers(0, rows))
    x[:hogs] *= draw(st.sampled_from([1, 30]))  # rows that take most entries, or all of them
    weights = draw(
        st.sampled_from([None, whole(latents).abs() + 1, torch.zeros(latents), 2.0 ** whole(latents).sign()])
    )
    return x, W_enc, b_enc, weights, k


@given(problems())
def test_the_largest_of_the_batch(problem: tuple[Tensor, Tensor, Tensor, Tensor | None, int]) -> None:
    x, W_enc, b_enc, weights, k = problem
    places = select_batch_top_k(x, W_enc, b_enc, k, torch.float32, weights)
    scores = (x.double() @ W_enc.double().T + b_enc) * (1.0 if weights is None else weights.double())
    check_against_a_sort(places, scores, k)


@pytest.mark.parametrize("hogs", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 4, 60])
def test_rows_that_take_everything(hogs: int, k: int) -> None:
    """Far more than 2k of a row, over several slabs of rows."""
    generator = torch.Generator().manual_seed(k)
    x, W_enc = torch.randn(600, 8, generator=generator), torch.randn(512, 8, generator=generator)
    x[:hogs] *= 100
    b_enc = torch.randn(512, generator=generator)
    places = select_batch_top_k(x, W_enc, b_enc, k, torch.float32)
    exact = x.double() @ W_enc.double().T + b_enc
    kept = torch.zeros(exact.shape, dtype=torch.bool)
    kept[places.row, places.latent] = True
    least = exact.flatten().sort(descending=True).values[k * 600 - 1]
    assert int((kept != (exact >= least)).sum()) <= 2  # what differs in the last bit of float32
    assert int(kept[:hogs].sum(1).max()) > 2 * k or hogs * 256 > k * 600


def test_a_single_row_and_a_single_latent() -> None:
    places = select_batch_top_k(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1), 1, torch.float32)
    assert (places.starts.tolist(), places.latent.tolist()) == ([0, 1], [0])


@pytest.mark.parametrize("with_weights", [False, True])
def test_what_bfloat16_selects_is_near_the_best(with_weights: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, W_enc = torch.randn(300, 32, generator=generator), torch.randn(1024, 32, generator=generator)
    weights = torch.rand(1024, generator=generator) + 0.5 if with_weights else None
    scores = x @ W_enc.T * (1 if weights is None else weights)
    places = select_batch_top_k(x, W_enc, torch.zeros(1024), 8, torch.bfloat16, weights)
    kept = scores[places.row, places.latent]
    least = scores.flatten().topk(8 * 300).values[-1]
    assert len(kept) == 8 * 300
    assert (kept >= least - 0.02 * scores.abs().max()).all()
    assert (kept >= least).float().mean() > 0.95


def test_the_dense_formula_is_a_sort_too() -> None:
    pre = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    found = dense_batch_top_k(pre, 3, weights)
    least = (pre * weights).flatten().sort(descending=True).values[89]
    torch.testing.assert_close(found, torch.where((pre * weights >= least) & (pre > 0), pre, 0), rtol=0, atol=0)


def test_selecting_gives_no_gradient() -> None:
    W_enc = torch.randn(16, 4).requires_grad_()
    for places in (
        select_top_k(torch.randn(3, 4), W_enc, torch.zeros(16), 2, torch.float32),
        select_batch_top_k(torch.randn(3, 4), W_enc, torch.zeros(16), 2, torch.float32),
    ):
        assert not places.latent.is_floating_point()
        assert not places.latent.requires_grad
