"""Rows of extreme norm are left out of the stream, whose order stays a pure function."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_store
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StorageError
from storage.read import norm_filter as filters
from storage.read.stream import Order
from storage.store import Store

SITES = ["resid_post.0", "mlp_out.0"]
MAX_NORM = 1.4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Random rows: about a tenth has more than 1.4 times the median norm."""
    return write_store(tmp_path_factory.mktemp("norms") / "store", num_rows=500, held_out_start=448)


def kept_rows(store: Store, site: str) -> set[int]:
    norms = np.linalg.norm(store.read(site).astype(np.float64), axis=1)[:448]
    return set(np.flatnonzero(norms <= MAX_NORM * np.median(norms)).tolist())


@pytest.mark.parametrize("site", SITES)
def test_an_epoch_gives_every_row_within_the_limit_once(store: Store, site: str) -> None:
    expected = kept_rows(store, site)
    assert 300 < len(expected) < 448
    stream = store.stream(SITES, batch_rows=1, steps=2 * len(expected), max_norm=MAX_NORM, norm_site=site)
    rows = [int(batch["row"][0]) for batch in stream]
    for epoch in (rows[: len(expected)], rows[len(expected) :]):
        assert len(set(epoch)) == len(expected)
        assert set(epoch) == expected
    assert rows[: len(expected)] != rows[len(expected) :]


def test_batches_hold_the_rows_they_say_at_every_site(store: Store) -> None:
    for batch in store.stream(SITES, batch_rows=37, steps=20, max_norm=MAX_NORM):  # the first site's norms, if not said
        assert set(batch["row"].tolist()) <= kept_rows(store, SITES[0])
        for site in SITES:
            np.testing.assert_array_equal(batch[site], store.read(site, batch["row"]))


@pytest.mark.parametrize("start", [1, 7, 13, 40])
def test_a_stream_that_begins_later_is_the_same(store: Store, start: int) -> None:
    whole = list(store.stream(SITES, batch_rows=23, seed=3, steps=45, max_norm=MAX_NORM))
    later = list(store.stream(SITES, batch_rows=23, seed=3, start_step=start, steps=45 - start, max_norm=MAX_NORM))
    for one, two in zip(whole[start:], later, strict=True):
        np.testing.assert_array_equal(one["row"], two["row"])


def test_a_limit_that_nothing_is_above_changes_nothing(store: Store) -> None:
    plain = store.stream(SITES, batch_rows=50, steps=20)
    for one, two in zip(plain, store.stream(SITES, batch_rows=50, steps=20, max_norm=1e6), strict=True):
        np.testing.assert_array_equal(one["row"], two["row"])


def test_the_median_of_many_rows_is_that_of_evenly_spaced_ones(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MEDIAN_ROWS", 100)
    norms = store.norms(SITES[0])[:448]
    found = filters.norm_filter(store, SITES[0], MAX_NORM, 8)
    assert found.limit == pytest.approx(MAX_NORM * np.median(norms[np.arange(100) * 448 // 100]), rel=1e-6)
    np.testing.assert_array_equal(found.counts, (norms <= found.limit).reshape(-1, 8).sum(1))


def test_a_limit_below_the_median_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="at least 1"):
        next(store.stream(SITES, batch_rows=1, max_norm=0.5))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 5), st.integers(1, 30))
def test_locate_agrees_with_walking_the_pools(counts: list[int], seed: int, pool_rows: int) -> None:
    counts[0] = max(counts[0], 1)
    order = Order(5 * len(counts), 5, seed, pool_rows, kept=np.array(counts))
    position = 0
    for number in range(2 * order.pools_per_epoch):
        for offset in range(len(order.pool(number)[1])):
            assert order.locate(position) == (number, offset)
            position += 1
    assert position == 2 * sum(counts)
