"""Which units are committed: whatever was committed, in whatever order, however stale the bitmap is."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.backends.place import Place, open_place
from storage.format.layout import UNITS_PER_BLOCK, StoreLayout
from storage.format.units import UnitRanges, UnitSet, shown
from storage.harvest.commits import Commit
from storage.harvest.log import HarvestLog

TOTAL = 3 * UNITS_PER_BLOCK + 7
RANGES = UnitRanges(TOTAL * 4 - 1, 4)
units = st.integers(0, TOTAL - 1)
some = st.frozensets(st.one_of(units, st.sampled_from([0, 1023, 1024, 2047, 2048, TOTAL - 1])), max_size=40)


def place(folder: str) -> Place:
    return open_place(Path(folder) / "store")


def commit(store: Place, unit: int, writer: str = "w", crc: int = 1) -> bool:
    made = Commit("h", unit, unit, unit + 1, writer, {"s": {"crc32c": [crc]}}, "0")
    return HarvestLog(store, "h", RANGES).commit(made)


@given(some, some, some)
def test_bitmap_and_listing_give_exactly_what_is_committed(
    first: frozenset[int], second: frozenset[int], third: frozenset[int]
) -> None:
    """Two drivers compact in turns, each with what it knows, and more is committed after."""
    with tempfile.TemporaryDirectory() as folder:
        store = place(folder)
        for unit in first | second:
            commit(store, unit)
        HarvestLog(store, "h", RANGES).compact(UnitSet(TOTAL, first))
        HarvestLog(store, "h", RANGES).compact(UnitSet(TOTAL, second))
        assert HarvestLog(store, "h", RANGES).bitmap() == first | second  # merged by union
        for unit in third - first - second:
            commit(store, unit)
        everything = first | second | third
        assert HarvestLog(store, "h", RANGES).committed() == everything
        assert HarvestLog(store, "h", RANGES).bitmap() <= everything
        StoreLayout(store).bitmap("h").remove()
        assert HarvestLog(store, "h", RANGES).committed() == everything


@given(some)
def test_a_unit_set_is_a_set(found: frozenset[int]) -> None:
    ours = UnitSet(TOTAL, found)
    assert ours == found
    assert list(ours) == sorted(found)
    assert len(ours) == len(found)
    assert {unit for first, last in ours.ranges() for unit in range(first, last + 1)} == found
    assert ours.complement() == frozenset(range(TOTAL)) - found
    assert shown(ours, most=TOTAL) == shown(found, most=TOTAL)
    assert -1 not in ours
    assert TOTAL not in ours


@given(st.binary(min_size=1, max_size=40), st.integers(0, 10**6))
def test_a_damaged_bitmap_costs_listings_and_never_truth(garbage: bytes, at: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = place(folder)
        commit(store, 3)
        HarvestLog(store, "h", RANGES).compact(UnitSet(TOTAL, [3]))
        bitmap = StoreLayout(store).bitmap("h")
        content = bytearray(bitmap.read())
        at %= len(content)
        content[at : at + len(garbage)] = garbage
        bitmap.write(bytes(content))
        assert HarvestLog(store, "h", RANGES).committed() == {3}
        commit(store, 4)
        HarvestLog(store, "h", RANGES).compact(UnitSet(TOTAL, [4]))
        assert HarvestLog(store, "h", RANGES).committed() == {3, 4}


@pytest.mark.parametrize("done", [0, 1, 500_000, 10**6])
def test_a_million_units_are_read_with_few_requests(tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first `done` are in the bitmap, and 300 more are committed since."""
    store, total = open_place(tmp_path), 10**6
    ranges = UnitRanges(total * 4, 4)
    mask = UnitSet(total, range(done))
    HarvestLog(store, "h", ranges).compact(mask)
    for unit in range(done, min(total, done + 300)):
        place = HarvestLog(store, "h", ranges).commit_place(unit).path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    requests = []
    for name in ("read", "names"):
        method = getattr(Place, name)
        monkeypatch.setattr(Place, name, lambda self, method=method: (requests.append(str(self)), method(self))[1])
    found = HarvestLog(store, "h", ranges).committed()
    assert len(found) == min(total, done + 300)
    assert len(requests) <= (1 if done == total else 4)
