"""Which units are committed: whatever was committed, in whatever order, however stale the bitmap is."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.commits import BITMAP, UNITS_PER_BLOCK, commit_path, commit_unit, committed_units, compact, read_bitmap
from storage.places import Place, open_place
from storage.unitsets import UnitRanges, UnitSet, shown

TOTAL = 3 * UNITS_PER_BLOCK + 7
RANGES = UnitRanges(TOTAL * 4 - 1, 4)
units = st.integers(0, TOTAL - 1)
some = st.frozensets(st.one_of(units, st.sampled_from([0, 1023, 1024, 2047, 2048, TOTAL - 1])), max_size=40)


def place(folder: str) -> Place:
    return open_place(Path(folder) / "store")


def commit(store: Place, unit: int, writer: str = "w", crc: int = 1) -> bool:
    record = {"harvest": "h", "unit": unit, "row_start": unit, "row_stop": unit + 1, "writer": writer}
    return commit_unit(store, RANGES.name(unit), {**record, "sites": {"s": {"crc32c": [crc]}}, "moments_sha256": "0"})


@given(some, some, some)
def test_bitmap_and_listing_give_exactly_what_is_committed(
    first: frozenset[int], second: frozenset[int], third: frozenset[int]
) -> None:
    """Two drivers compact in turns, each with what it knows, and more is committed after."""
    with tempfile.TemporaryDirectory() as folder:
        store = place(folder)
        for unit in first | second:
            commit(store, unit)
        compact(store, "h", RANGES, UnitSet(TOTAL, first))
        compact(store, "h", RANGES, UnitSet(TOTAL, second))
        assert read_bitmap(store, "h", RANGES) == first | second  # merged by union
        for unit in third - first - second:
            commit(store, unit)
        everything = first | second | third
        assert committed_units(store, "h", RANGES) == everything
        assert read_bitmap(store, "h", RANGES) <= everything
        (store / "commits" / "h" / BITMAP).remove()
        assert committed_units(store, "h", RANGES) == everything


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
        compact(store, "h", RANGES, UnitSet(TOTAL, [3]))
        bitmap = store / "commits" / "h" / BITMAP
        content = bytearray(bitmap.read())
        at %= len(content)
        content[at : at + len(garbage)] = garbage
        bitmap.write(bytes(content))
        assert committed_units(store, "h", RANGES) == {3}
        commit(store, 4)
        compact(store, "h", RANGES, UnitSet(TOTAL, [4]))
        assert committed_units(store, "h", RANGES) == {3, 4}


@pytest.mark.parametrize("done", [0, 1, 500_000, 10**6])
def test_a_million_units_are_read_with_few_requests(tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first `done` are in the bitmap, and 300 more are committed since."""
    store, total = open_place(tmp_path), 10**6
    ranges = UnitRanges(total * 4, 4)
    mask = UnitSet(total, range(done))
    compact(store, "h", ranges, mask)
    for unit in range(done, min(total, done + 300)):
        place = commit_path(store, "h", ranges.name(unit)).path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    requests = []
    for name in ("read", "names"):
        method = getattr(Place, name)
        monkeypatch.setattr(Place, name, lambda self, method=method: (requests.append(str(self)), method(self))[1])
    found = committed_units(store, "h", ranges)
    assert len(found) == min(total, done + 300)
    assert len(requests) <= (1 if done == total else 4)
