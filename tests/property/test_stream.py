"""The shuffled stream: each epoch gives every row once, and batch s is the same however the reader came to it."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import stored_rows, write_store
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StorageError, UncommittedRows
from storage.read.stream import Order
from storage.read.stream import _read_pool as read_pool
from storage.store import Store

SITES = ["resid_post.0", "mlp_out.0"]
orders = st.builds(Order, st.integers(1, 200), st.integers(1, 30), st.integers(0, 5), st.integers(1, 100))


def rows_of_pool(order: Order, number: int) -> list[int]:
    ranges, permutation = order.pool(number)
    rows = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    assert sorted(permutation) == list(range(len(rows)))
    return rows[permutation].tolist()


def sequence(order: Order, epochs: int) -> list[int]:
    """The rows of some epochs, pool by pool."""
    return [row for number in range(epochs * order.pools_per_epoch) for row in rows_of_pool(order, number)]


@given(orders, st.integers(0, 3))
def test_each_epoch_gives_every_row_once(order: Order, epoch: int) -> None:
    first = epoch * order.pools_per_epoch
    rows = [row for pool in range(first, first + order.pools_per_epoch) for row in rows_of_pool(order, pool)]
    assert Counter(rows) == Counter(range(order.num_rows))


@given(orders)
def test_pools_are_whole_blocks_within_the_limit(order: Order) -> None:
    for number in range(order.pools_per_epoch):
        ranges, permutation = order.pool(number)
        assert all(start % order.block_rows == 0 for start, _ in ranges)
        assert len(permutation) <= max(order.pool_rows, order.block_rows)


@given(orders)
def test_locate_agrees_with_walking_the_pools(order: Order) -> None:
    position = 0
    for number in range(2 * order.pools_per_epoch):
        for offset in range(len(order.pool(number)[1])):
            assert order.locate(position) == (number, offset)
            position += 1


@given(orders, st.integers(6, 9))
def test_another_seed_is_another_order(order: Order, seed: int) -> None:
    if order.num_rows >= 30:
        other = Order(order.num_rows, order.block_rows, seed, order.pool_rows)
        assert sequence(order, 1) != sequence(other, 1)


def test_epochs_differ() -> None:
    rows = sequence(Order(100, 8, seed=0, pool_rows=24), 2)
    assert rows[:100] != rows[100:]


# ---- the stream of a store, with pools of 24 rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """75 rows in chunks of 8, of which 64 are streamed."""
    return write_store(tmp_path_factory.mktemp("stream") / "store", num_rows=75, rows_per_unit=16, held_out_start=64)


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.read.stream.Order", partial(Order, pool_rows=24))
    monkeypatch.setattr("storage.read.stream.BLOCK_ROWS", 8)


def assert_same_batch(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("batch_rows", [1, 5, 16, 24, 64, 100, 150])
def test_batches_follow_the_order_across_pools_and_epochs(store: Store, batch_rows: int) -> None:
    epochs = 3 + 2 * batch_rows // 64
    expected = sequence(Order(64, 8, 7, 24), epochs)
    steps = 64 * epochs // batch_rows
    batches = list(store.stream(SITES, batch_rows=batch_rows, seed=7, steps=steps))
    assert len(batches) == steps
    assert all(batch["row"].shape == (batch_rows,) for batch in batches)
    assert np.concatenate([batch["row"] for batch in batches]).tolist() == expected[: steps * batch_rows]


@pytest.mark.usefixtures("small_pools")
def test_sites_are_aligned(store: Store) -> None:
    stored = {site: stored_rows(store, site) for site in SITES}
    for batch in store.stream(SITES, batch_rows=10, seed=1, steps=20):
        for site in SITES:
            assert batch[site].dtype.name == "bfloat16"
            np.testing.assert_array_equal(batch[site], stored[site][batch["row"]])


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize(
    ("start", "steps", "pools"), [(0, 0, []), (0, 2, [0]), (0, 3, [0, 1]), (2, 4, [0, 1, 2]), (6, 1, [2, 3])]
)
def test_no_pool_is_read_that_is_not_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, start: int, steps: int, pools: list[int]
) -> None:
    """Batches of 10 from pools of 24, 24 and 16 rows."""
    read: list[int] = []

    def recorded(*arguments: Any) -> dict[str, Any]:
        read.append(arguments[-1])
        return read_pool(*arguments)

    monkeypatch.setattr("storage.read.stream._read_pool", recorded)
    assert len(list(store.stream(SITES, batch_rows=10, seed=3, start_step=start, steps=steps))) == steps
    assert read == pools


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("batch_rows", [3, 10, 64, 90])
def test_a_stream_started_at_any_step_equals_one_that_ran_there(store: Store, batch_rows: int) -> None:
    steps = 2 * 64 // batch_rows + 2
    whole = list(store.stream(SITES, batch_rows=batch_rows, seed=3, steps=steps))
    for start in range(steps):
        rest = store.stream(SITES, batch_rows=batch_rows, seed=3, start_step=start, steps=steps - start)
        for one, two in zip(whole[start:], rest, strict=True):
            assert_same_batch(one, two)


def test_what_else_is_read_does_not_change_the_order(small_store: Callable[..., Store]) -> None:
    """A run that goes on alone after another one was finished gets the batches that it had got beside it."""
    store = small_store(chunk_rows={"resid_post.0": 16, "mlp_out.0": 4})
    together, alone = (
        np.stack([batch["row"] for batch in store.stream(sites, batch_rows=10, seed=1, steps=12)])
        for sites in (SITES, ["mlp_out.0"])
    )
    np.testing.assert_array_equal(together, alone)


@pytest.mark.usefixtures("small_pools")
def test_held_out_rows_are_never_given(store: Store) -> None:
    rows = np.concatenate([batch["row"] for batch in store.stream(SITES, batch_rows=16, steps=8)])
    assert Counter(rows.tolist()) == Counter(dict.fromkeys(range(64), 2))


def test_a_stream_without_an_end(store: Store) -> None:
    batches = list(islice(store.stream(SITES, batch_rows=60), 10))
    assert len(batches) == 10
    with_end = list(store.stream(SITES, batch_rows=60, steps=10))
    for one, two in zip(batches, with_end, strict=True):
        assert_same_batch(one, two)


def test_a_batch_is_not_changed_by_the_ones_after_it(store: Store) -> None:
    batches = store.stream(SITES, batch_rows=16, seed=2)
    first = next(batches)
    kept = {name: values.copy() for name, values in first.items()}
    for _ in range(12):
        next(batches)
    assert_same_batch(first, kept)


@pytest.fixture
def small_store(tmp_path: Path) -> Callable[..., Store]:
    return lambda **options: write_store(tmp_path / "small", num_rows=75, rows_per_unit=16, **options)


def test_a_missing_unit_is_an_error_before_the_first_batch(small_store: Callable[..., Store]) -> None:
    store = small_store(units=[0, 1, 3, 4])
    with pytest.raises(UncommittedRows, match=": 2 "):
        store.stream(SITES, batch_rows=4)


def test_a_missing_held_out_unit_is_none(small_store: Callable[..., Store]) -> None:
    store = small_store(units=[0, 1, 2, 3], held_out_start=64)
    assert len(list(store.stream(SITES, batch_rows=4, steps=3))) == 3


def test_a_store_that_is_all_held_out(small_store: Callable[..., Store]) -> None:
    with pytest.raises(StorageError, match="held out"):
        small_store(held_out_start=0).stream(SITES, batch_rows=4)
