"""Moments: adding is associative and commutative, and gives what the rows give, however they were divided."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.capture.rounding import Rounded, round_rows
from pipeline.capture.unit import RawMoments, group_moments, summarise, value_moments
from storage.harvest.moments import MomentKey, Moments, encode_moments

WIDTH = 3
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(WIDTH)), elements=st.floats(-100, 100, width=32))


def direct(values: np.ndarray) -> Moments:
    wide = values.astype(np.float64)
    return Moments(len(values), wide.sum(0), (wide**2).sum(0))


def assert_close(one: Moments | RawMoments, two: Moments | RawMoments) -> None:
    assert one.count == two.count
    np.testing.assert_allclose(np.asarray(one.sum), np.asarray(two.sum), rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(np.asarray(one.sum_squares), np.asarray(two.sum_squares), rtol=1e-5, atol=1e-2)


def assert_equal_but_for_rounding(one: Moments, two: Moments) -> None:
    assert one.count == two.count
    np.testing.assert_allclose(one.sum, two.sum, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(one.sum_squares, two.sum_squares, rtol=1e-12, atol=1e-9)


@given(rows, rows, rows)
def test_addition_is_associative_and_commutative(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    x, y, z = direct(a), direct(b), direct(c)
    assert_equal_but_for_rounding((x + y) + z, x + (y + z))
    assert_equal_but_for_rounding(x + y, y + x)
    assert_equal_but_for_rounding(x + y + z, direct(np.concatenate([a, b, c])))


@given(rows)
def test_mean_and_variance(values: np.ndarray) -> None:
    wide = values.astype(np.float64)
    moments = direct(values)
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moments.total_variance, wide.var(0).sum(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moments.mean_square_norm, (wide**2).sum(1).mean(), rtol=1e-9)


@st.composite
def labelled_segments(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, int]], dict[str, list[str]]]:
    """Rows, their division into segments, and the segments' values of two labels."""
    values = draw(rows)
    cuts = draw(st.sets(st.integers(1, len(values))).map(lambda s: sorted(s - {len(values)})))
    segments = list(zip([0, *cuts], [*cuts, len(values)], strict=True))
    value = st.lists(st.sampled_from(["a", "b", "c"]), min_size=len(segments), max_size=len(segments))
    return values, segments, {"language": draw(value), "kind": draw(value)}


@given(labelled_segments())
def test_group_moments_equal_direct_computation(
    case: tuple[np.ndarray, list[tuple[int, int]], dict[str, list[str]]],
) -> None:
    values, segments, groups = case
    norms, per_segment = summarise(Rounded(torch.from_numpy(values)), segments)
    np.testing.assert_allclose(norms.numpy(), np.linalg.norm(values.astype(np.float64), axis=1), rtol=1e-5, atol=1e-12)
    found = group_moments(per_segment, groups)
    expected_keys = {(None, None)} | {(label, value) for label, given in groups.items() for value in given}
    assert found.keys() == expected_keys
    assert_close(found[None, None], direct(values))
    for label, given_values in groups.items():
        for value in set(given_values):
            parts = [values[a:b] for (a, b), v in zip(segments, given_values, strict=True) if v == value]
            assert_close(found[label, value], direct(np.concatenate(parts)))


@given(labelled_segments())
def test_groups_of_a_label_add_up_to_all_rows(
    case: tuple[np.ndarray, list[tuple[int, int]], dict[str, list[str]]],
) -> None:
    values, segments, groups = case
    found = group_moments(summarise(Rounded(torch.from_numpy(values)), segments)[1], groups)
    as_moments = {k: Moments(m.count, m.sum.numpy(), m.sum_squares.numpy()) for k, m in found.items()}
    for label in groups:
        together = reduce(Moments.__add__, [m for key, m in as_moments.items() if key[0] == label])
        assert_equal_but_for_rounding(together, as_moments[None, None])


@given(labelled_segments(), st.data())
def test_moments_of_values_of_rows_equal_direct_computation(
    case: tuple[np.ndarray, list[tuple[int, int]], dict[str, list[str]]], data: st.DataObject
) -> None:
    values, _, _ = case
    codes = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=len(values), max_size=len(values))), np.int16)
    found = value_moments(Rounded(torch.from_numpy(values)), codes)
    assert sorted(found) == sorted({*codes.tolist()} - {-1})
    for code, moments in found.items():
        assert_close(moments, direct(values[codes == code]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_moments_of_many_rows_and_values(dtype: str) -> None:
    """More rows than are added at once, of values with one row and with many, as readers get the rows."""
    rng = np.random.default_rng(0)
    rows = round_rows(1000 + torch.from_numpy(rng.standard_normal((5000, 4), dtype=np.float32)), dtype)
    codes = np.where(rng.random(5000) < 0.5, 7, rng.integers(-1, 900, 5000)).astype(np.int16)
    found = value_moments(rows, codes)
    wide = rows.float().numpy().astype(np.float64)
    for code, moments in found.items():
        part = wide[codes == code]
        assert moments.count == len(part)
        np.testing.assert_allclose(moments.sum.numpy(), part.sum(0), rtol=1e-6)
        np.testing.assert_allclose(moments.sum_squares.numpy(), (part**2).sum(0), rtol=1e-6)
    assert value_moments(rows, np.full(5000, -1, np.int16)) == {}


def test_long_segments_keep_float64_precision() -> None:
    """A large mean over more rows than are added in float32 at once."""
    acts = (1000 + torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    wide = acts.double()
    _, [found] = summarise(Rounded(acts), [(0, 5000)])
    torch.testing.assert_close(found.sum, wide.sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sum_squares, wide.square().sum(0), rtol=1e-6, atol=0)


def test_files_do_not_depend_on_the_order_of_keys() -> None:
    rng = np.random.default_rng(0)
    keys = [MomentKey("a.0"), MomentKey("a.0", "language", "en"), MomentKey("b.0"), MomentKey("b.0", "language", "en")]
    moments = {key: direct(rng.standard_normal((5, WIDTH)).astype(np.float32)) for key in keys}
    assert encode_moments(moments) == encode_moments({key: moments[key] for key in reversed(keys)})
