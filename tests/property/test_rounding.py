"""Rounding to what is stored: int8 with a scale for each row, and what it costs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.capture.rounding import LARGEST, is_exact, round_rows, square_error
from pipeline.capture.unit import summarise
from pipeline.errors import InputError
from pipeline.sites import STORED_TYPES
from storage.format.site_rows import unscaled

shapes = st.tuples(st.integers(1, 12), st.integers(1, 9))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
# Below the square root of float32's largest, so that norms are finite too.
rows_of_any_size = hnp.arrays(
    np.float32, shapes, elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)
)


def direct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 rows and their scales in numpy, row by row."""
    scales = (np.abs(values).max(1) / np.float32(LARGEST)).astype(np.float32)
    whole = np.zeros(values.shape, dtype=np.int8)
    for row, scale in enumerate(scales):
        if scale > 0:
            whole[row] = np.clip(np.rint(values[row] / scale), -LARGEST, LARGEST)  # rint: ties to even
    return whole, scales


@given(hnp.arrays(np.float32, shapes, elements=finite))
def test_int8_is_the_nearest_multiple_of_the_rows_scale(values: np.ndarray) -> None:
    rounded = round_rows(torch.from_numpy(values), "int8")
    whole, scales = direct(values)
    assert rounded.scales is not None
    np.testing.assert_array_equal(rounded.scales.numpy(), scales)
    np.testing.assert_array_equal(rounded.values.numpy(), whole)


@given(rows_of_any_size)
def test_both_sides_read_int8_to_the_last_bit(values: np.ndarray) -> None:
    """What the harvester summarises (torch) is what a reader gets (numpy)."""
    rounded = round_rows(torch.from_numpy(values), "int8")
    assert rounded.scales is not None
    read = unscaled(rounded.values.numpy(), rounded.scales.numpy())
    np.testing.assert_array_equal(rounded.float().numpy().view(np.uint32), read.view(np.uint32))


@given(rows_of_any_size)
def test_no_value_is_further_off_than_half_a_step(values: np.ndarray) -> None:
    rounded = round_rows(torch.from_numpy(values), "int8")
    assert rounded.scales is not None
    step = rounded.scales.double()[:, None]
    error = (torch.from_numpy(values).double() - rounded.float().double()).abs()
    assert bool((error <= step * (0.5 + 1e-4) + 1e-42).all())


def test_zero_rows_stay_zero_and_ties_go_to_even() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [127.0, 0.5, 1.5], [-127.0, -2.5, 126.5], [1e-45, -1e-45, 0.0]])
    rounded = round_rows(rows, "int8")
    assert rounded.scales is not None
    assert rounded.scales.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert rounded.values.tolist() == [[0, 0, 0], [127, 0, 2], [-127, -2, 126], [0, 0, 0]]
    assert rounded.float()[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", STORED_TYPES)
def test_what_is_not_finite_is_refused_whatever_it_is_stored_as(stored: str, bad: float) -> None:
    rows = torch.ones(5, 3)
    rows[2, 1] = bad
    with pytest.raises(InputError, match=rf"row 2 of the unit .* not a finite {stored}"):
        summarise(round_rows(rows, stored), [(0, 5)])


@pytest.mark.parametrize("stored", STORED_TYPES)
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_values_and_exact_types_have_none(computed: torch.dtype, stored: str) -> None:
    rows = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)).to(computed)
    rounded = round_rows(rows, stored)
    error = square_error(rows, rounded).item()
    assert error == pytest.approx((rows.double() - rounded.float().double()).square().sum().item(), rel=1e-5)
    if is_exact(computed, stored):
        assert error == 0
    elif (computed, stored) != (torch.bfloat16, "float16"):  # which loses only what is very small or large
        assert error > 0


def test_parts_of_rows_keep_values_and_scales_together() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    whole = round_rows(rows, "int8")
    assert (len(whole), whole.type, [len(t) for t in whole.tensors]) == (6, "int8", [6, 6])
    torch.testing.assert_close(whole[2:4].float(), round_rows(rows[2:4], "int8").float(), rtol=0, atol=0)
    assert [t.dtype for t in round_rows(rows, "float16").tensors] == [torch.float16]
