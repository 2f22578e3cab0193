"""Growing a store step by step: kills, races, and writers and readers that still have the old table.

The rows are made up and `storage` is alone here; tests/unit/storage/test_growth.py does the same with models.
"""

import errno
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import plan_table
from growing import first_rows, grow, info_of, save_no_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from storage.backends.place import open_place
from storage.errors import CorruptChunk, StorageError, StoreGrown, StoreMismatch, UncommittedRows
from storage.format.arrays import DTYPES, RowArray, group_metadata
from storage.format.units import UnitRanges
from storage.harvest.harvest import Harvest, SiteLayout, declare_harvest
from storage.harvest.identity import HarvestIdentity
from storage.harvest.log import HarvestLog, log_of
from storage.harvest.moments import MomentKey, Moments
from storage.harvest.write_unit import UnitBlock, rewrite_unit, write_unit
from storage.make.create import Table, create_store
from storage.make.grow import grown_table, settle
from storage.read.moments import merged_moments
from storage.store import Store, open_store
from storage.verify.findings import Fault, Note, Rewrite
from storage.verify.verify import verify

SITE, WIDTH, UNIT = "resid_post.0", 5, 32
ROOT = Path(__file__).parents[3]
TABLE = plan_table(500, 25)
SMALL, LARGE = first_rows(TABLE, 203), first_rows(TABLE, 301)
SHORT = 6
"""The last unit of the small table: 11 of its rows."""


@pytest.fixture(params=["local", "memory://granary-test-growth"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "local":
        yield tmp_path / "store"
        return
    open_place(request.param).remove()
    yield request.param
    open_place(request.param).remove()


def make(place: Any, table: Table = SMALL) -> Store:
    return create_store(place, table, lambda digest: info_of(table, digest, UNIT), save_no_tokenizer)


def columns(store: Store) -> dict[str, list[int]]:
    """The table as a reader gets it."""
    rows = {name: values.tolist() for name, values in store.columns(0, store.num_rows).items()}
    contexts = store.context_tokens(0, store.info.num_contexts - 1)
    return {**rows, "context_token": np.concatenate(contexts).tolist(), "documents": store.documents.to_pylist()}


def table_of(table: Table) -> dict[str, list[int]]:
    rows = {name: values.tolist() for name, values in table.columns.items()}
    return {**rows, "context_token": table.context_token.tolist(), "documents": table.documents.to_pylist()}


def tables(store: Store) -> list[str]:
    return [name for name in store.root.names() if name.startswith("corpus")]


def faults(store: Store) -> list[Fault]:
    return [finding for finding in verify(store.root) if isinstance(finding, Fault)]


# ---- the table


def test_growing_again_and_again(place: Any) -> None:
    """Readers that are one table behind go on; those further behind are told to open it again."""
    first = make(place)
    before = columns(first)
    second = grow(first, LARGE)
    assert columns(second) == table_of(LARGE)
    assert columns(Store(first.root, first.info)) == before
    assert len(tables(second)) == 2
    third = grow(second, first_rows(TABLE, 333))
    fourth = grow(third, TABLE)
    assert columns(open_store(place)) == table_of(TABLE)
    assert columns(Store(third.root, third.info)) == table_of(first_rows(TABLE, 333))
    assert [table["num_rows"] for table in fourth.info.grown_from] == [203, 301, 333]
    assert tables(fourth) == sorted([third.info.folder, fourth.info.folder])
    for old in (first, second):
        for read in (
            columns,
            lambda store: store.documents,
            lambda store: store.corpus_file("tokenizer/tokenizer.json"),
        ):
            with pytest.raises(StoreGrown, match=rf"grown .* from {old.num_rows} to 500 rows: open it again"):
                read(Store(old.root, old.info))
    assert faults(fourth) == []
    notes = [finding.text for finding in verify(fourth.root) if isinstance(finding, Note)]
    assert [note for note in notes if "from before the store grew" in note]
    assert not [note for note in notes if "not part of the store" in note]


def changed(name: str) -> Table:
    """The large table with one entry of its beginning changed."""
    arrays, documents = {k: v.copy() for k, v in LARGE.arrays.items()}, LARGE.documents
    if name == "documents":
        labels = documents.column("language").to_pylist()
        at = documents.column_names.index("language")
        documents = documents.set_column(at, "language", pa.array([*labels[:3], "it", *labels[4:]]))
    else:
        arrays[name][5] += 1
    return Table({n: arrays[n] for n in LARGE.columns}, arrays["context_token"], arrays["context_start"], documents)


@pytest.mark.parametrize("name", [*TABLE.arrays, "documents"])
def test_a_table_that_does_not_begin_with_the_old_one_is_refused(place: Any, name: str) -> None:
    store = make(place)
    before = {name: (store.root / name).read() for name in store.root.backend.walk("")}
    what = "language of document 3 is .* in the store and it now" if name == "documents" else f"{name} 5 is"
    with pytest.raises(StoreMismatch, match=f"are not the first of those that the spec gives: {what}"):
        grow(store, changed(name))
    assert {name: (store.root / name).read() for name in store.root.backend.walk("")} == before


def test_of_two_growths_at_once_one_wins(place: Any) -> None:
    """Both would have been a continuation; one after the other they are not."""
    store = make(place)
    won = []

    def lose() -> None:
        with grown_table(store) as draft:
            draft.begin_table(TABLE.sizes)
            won.append(grow(store, LARGE))
            draft.finish(info_of(TABLE, "other", UNIT))

    with pytest.raises(StorageError, match="was grown by another process meanwhile"):
        lose()
    assert columns(open_store(place)) == table_of(LARGE)
    assert tables(won[0]) == sorted(["corpus", won[0].info.folder])


def test_a_zombie_that_puts_an_old_root_back(place: Any) -> None:
    """It decided its growth, slept, and writes the root record after the store has grown further."""
    first = make(place)
    second = grow(first, LARGE)
    third = grow(second, TABLE)
    (first.root / "zarr.json").write(group_metadata({"granary": second.info.to_record()}))
    assert columns(open_store(place)) == table_of(LARGE)  # a table that is still there, and the beginning of the other
    with pytest.raises(StorageError, match="grown by another process"):
        grow(open_store(place), TABLE)
    assert settle(first.root) == open_store(place).info == third.info


STEPS = {
    "in the middle of the table": "storage.make.create.TableFiles.write_documents",
    "before it is decided": "storage.make.grow.file_digests",
    "when it is decided": "storage.make.grow.settle",
    "before the root record": "storage.make.grow.group_metadata",
    "before old tables go": "storage.make.grow._remove_old",
}
KILLED = """
import importlib, os, pickle, signal, sys
sys.path.insert(0, "tests")
from growing import grow
from storage.store import open_store
place, target, table = sys.argv[1], sys.argv[2].split("."), sys.argv[3]
owner = importlib.import_module(".".join(target[:2]))
for name in target[2:-1]:
    owner = getattr(owner, name)
setattr(owner, target[-1], lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
grow(open_store(place), pickle.loads(open(table, "rb").read()))
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_growth_that_is_killed_leaves_the_old_store_or_the_new(tmp_path: Path, step: str) -> None:
    place = tmp_path / "store"
    make(place)
    (tmp_path / "table").write_bytes(pickle.dumps(LARGE))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(place), STEPS[step], str(tmp_path / "table")], cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    left = open_store(place)
    is_new = step == "before old tables go"
    assert columns(left) == table_of(LARGE if is_new else SMALL)
    assert faults(left) == []
    if settle(left.root).num_rows == SMALL.sizes.num_rows:  # what the next --grow begins with
        assert step in ("in the middle of the table", "before it is decided")
        grow(left, LARGE)
    store = open_store(place)
    assert columns(store) == table_of(LARGE)
    assert tables(store) == sorted(["corpus", store.info.folder])  # nothing is left of the attempt
    assert faults(store) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_growth_that_fails_leaves_the_old_store(
    place: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(place)
    before = list(store.root.backend.walk(""))

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("storage.make.grow.file_digests", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        grow(store, LARGE)
    assert isinstance(error, KeyboardInterrupt) or "cannot grow: No space left on device" in str(caught.value)
    assert sorted(store.root.backend.walk("")) == sorted(before)


@pytest.mark.parametrize("damage", ["the present one", "an older one"])
def test_verify_finds_a_damaged_record_of_a_growth(tmp_path: Path, damage: str) -> None:
    store = grow(grow(make(tmp_path / "store"), LARGE), TABLE)
    path = tmp_path / "store" / "growths" / ("00000003.json" if damage == "the present one" else "00000002.json")
    sound = path.read_bytes()
    for content in (sound.replace(b"301", b"302"), b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        (fault,) = faults(store)
        assert fault.place.path == path
        assert isinstance(fault.remedy, Rewrite)
        path.write_bytes(fault.remedy.content)
        assert faults(store) == []


# ---- units


def block_of(store: Store, unit: int) -> UnitBlock:
    """Rows that depend on the unit and their place in it alone."""
    start, stop = store.info.unit_rows(unit)
    acts = np.random.default_rng(unit).standard_normal((UNIT, WIDTH))[: stop - start].astype(DTYPES["bfloat16"])
    wide = acts.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1).astype(np.float32)
    return UnitBlock({SITE: acts}, {SITE: norms}, {MomentKey(SITE): Moments(len(wide), wide.sum(0), (wide**2).sum(0))})


def declare(store: Store) -> Harvest:
    identity = HarvestIdentity.made_up(UNIT, sites=[SITE], model={"fingerprint": "made-up"})
    made = Harvest.of(identity, "made-up", {SITE: SiteLayout(WIDTH, "bfloat16", 8)}, {})
    declare_harvest(store.root, store.num_rows, made)
    return made


def write(store: Store, *units: int, writer: str = "test") -> list[bool]:
    return [
        write_unit(store, declare(store), unit, block_of(store, unit), writer=writer, figures=None) for unit in units
    ]


def rows_of(store: Store) -> np.ndarray:
    return np.concatenate([block_of(store, unit).activations[SITE] for unit in range(store.info.num_units)])


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers looked whether the store has grown before it did."""
    monkeypatch.setattr(Store, "require_newest", lambda store: None)


def test_a_short_unit_s_commit_never_counts_for_the_longer_unit(place: Any, sleepers: None) -> None:
    old = make(place)
    write(old, *range(SHORT + 1))
    harvest = old.harvests[0].digest
    log_of(old, harvest).compact(log_of(old, harvest).committed())
    new = grow(old, LARGE)
    everything = frozenset(range(SHORT + 1))
    for _ in range(2):  # with the bitmap of the old table, and without one
        assert log_of(old, harvest).committed() == everything
        assert HarvestLog(old.root, harvest, new.info.units).committed() == everything - {SHORT}
        (old.root / "commits" / harvest / "committed.json").remove()
    assert new.array(SITE).shape == (301, WIDTH)  # the metadata says 203 until it is declared again
    with pytest.raises(UncommittedRows, match=r"1 of the 1 units asked for .* 6 "):
        new.read(SITE, slice(195, 200))
    with pytest.raises(UncommittedRows, match=r"3 of the 4 units asked for .* 7-9 "):
        new.norms(SITE, [5, 230, 270, 300])
    np.testing.assert_array_equal(new.read(SITE, slice(0, 192)), rows_of(new)[:192])
    declare(new)
    declare(old)  # a driver with the old table
    assert RowArray.open(new.array(SITE).path).shape == (301, WIDTH)  # never shrinks
    write(old, SHORT, writer="late")  # is told that its unit is there
    assert SHORT not in new.committed(SITE)
    assert write(new, *range(SHORT + 1, new.info.num_units)) == [True] * 3
    log_of(new, harvest).compact(log_of(new, harvest).committed())
    assert HarvestLog(new.root, harvest, old.info.units).bitmap() == everything - {SHORT}
    assert log_of(old, harvest).committed() == everything
    log_of(old, harvest).compact(log_of(old, harvest).committed())
    assert log_of(new, harvest).committed() == frozenset(range(10)) - {SHORT}
    assert write(new, SHORT) == [True]
    fresh = open_store(place)
    np.testing.assert_array_equal(fresh.read(SITE), rows_of(new))
    assert merged_moments(fresh, SITE, range(10))[MomentKey(SITE)].count == 301
    assert faults(fresh) == []


def test_readers_of_the_old_table_go_on(place: Any) -> None:
    old = make(place)
    write(old, *range(SHORT + 1))
    reader = open_store(place)
    new = grow(old, LARGE)
    write(new, *range(SHORT, new.info.num_units))
    np.testing.assert_array_equal(reader.read(SITE, slice(0, 192)), rows_of(old)[:192])
    if isinstance(place, Path):
        np.testing.assert_array_equal(reader.read(SITE), rows_of(old))
    else:  # the unit's object has another size
        with pytest.raises(StoreGrown, match="has grown since it was opened, from 203 to 301 rows: open it again"):
            reader.read(SITE)
    assert len(list(open_store(place).stream([SITE], batch_rows=100, steps=3))) == 3


def test_a_writer_of_the_old_table_is_told_before_it_writes(place: Any) -> None:
    old = make(place)
    declare(old)
    grow(old, LARGE)
    before = sorted(old.root.backend.walk(""))
    with pytest.raises(StoreGrown, match="run the command again"):
        write(old, SHORT)
    assert sorted(old.root.backend.walk("")) == before
    assert write(old, 3) == [True]  # a full unit is the same in both
    assert 3 in open_store(place).committed(SITE)


@pytest.mark.parametrize("kind", ["read", "norms", "stream"])
def test_a_zombie_that_writes_the_short_unit_over_the_longer_is_found(place: Any, kind: str, sleepers: None) -> None:
    """Its chunk is sound in itself and has zeros where the rows are that came later."""
    old = make(place)
    declare(old)
    new = grow(old, LARGE)
    write(new, *range(new.info.num_units))
    reader = open_store(place)
    reader.read(SITE, slice(196, 208))
    assert write(old, SHORT, writer="zombie") == [True]  # a commit of another name

    def read(store: Store) -> Any:
        if kind == "stream":
            return list(store.stream([SITE], batch_rows=301, steps=1))
        return getattr(store, kind)(SITE, slice(190, 210))

    for store in (reader, open_store(place)):
        with pytest.raises(
            CorruptChunk, match=r"(is not the one that was committed|has \d+ bytes, not .*); .*makes unit 6"
        ):
            read(store)
    damaged = {fault.place.key.partition("/")[0] for fault in faults(new)}
    assert damaged == {"activations", "norms"}
    rewrite_unit(new, new.harvests[0], SHORT, block_of(new, SHORT), writer="repair", figures=None)
    assert faults(new) == []
    read(reader)
    np.testing.assert_array_equal(open_store(place).read(SITE), rows_of(new))


def test_a_table_that_grows_within_its_last_unit_twice(place: Any) -> None:
    tables_of = [first_rows(TABLE, rows) for rows in (195, 203, 230)]
    store = make(place, tables_of[0])
    write(store, *range(SHORT + 1))
    for table in tables_of[1:]:
        store = grow(store, table)
        assert write(store, *store.committed(SITE).complement()) == [True] * (2 if table is tables_of[2] else 1)
        np.testing.assert_array_equal(open_store(place).read(SITE), rows_of(store))
    assert faults(store) == []


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
def test_a_name_says_the_rows_of_its_unit(rows: int, more: int, per_unit: int) -> None:
    """In every table that a store ever has: equal names are of equal row ranges, and other names of other ones."""
    tables = [UnitRanges(rows, per_unit), UnitRanges(rows + more, per_unit)]
    named: dict[str, tuple[int, int]] = {}
    for table in tables:
        for unit in range(table.total):
            assert named.setdefault(table.name(unit), table.rows(unit)) == table.rows(unit)
            assert table.unit(table.name(unit)) == unit
    assert len(set(named.values())) == len(named)
    for name in named:
        assert (tables[0].unit(name) is not None) == (name in map(tables[0].name, range(tables[0].total)))
    for name in ("", "x", "00000000-", "00000000-0", "²0000000", "0", f"{tables[0].total:08d}"):
        assert tables[0].unit(name) is None
