"""Commits, failures and drivers' records, on a local disk and on an object store's rules (memory://)."""

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_store

from storage.backends.local import LocalFiles, StagedFile
from storage.backends.place import Place, open_place
from storage.errors import CannotWrite, NotAStore, StorageError, UnitConflict
from storage.format.layout import StoreLayout
from storage.format.records import encode
from storage.format.units import UnitRanges
from storage.harvest.driver_records import ALIVE_S, GONE_S, Driver, DriverRecords, DriverWatch
from storage.harvest.failures import Failure
from storage.harvest.harvest import declare_harvest
from storage.harvest.log import HarvestLog, log_of
from storage.harvest.moments import MomentKey, Moments
from storage.harvest.progress import harvest_progress
from storage.harvest.write_unit import UnitBlock, rewrite_unit, write_unit
from storage.store import Store

SITES = ("resid_post.0", "mlp_out.0")
UNITS = UnitRanges(20, 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", num_rows=96, sites=SITES, units=[0, 2])


def block_of(store: Store, unit: int, seed: int | None = None) -> UnitBlock:
    """What tests/conftest.py writes for a unit; of another `seed`, what a broken machine would."""
    start, stop = store.info.unit_rows(unit)
    rng = np.random.default_rng(unit if seed is None else seed)
    dtype = store.array(SITES[0]).numpy_dtype
    acts = {site: rng.standard_normal((stop - start, 5)).astype(dtype) for site in SITES}
    wide = {site: values.astype(np.float64) for site, values in acts.items()}
    return UnitBlock(
        acts,
        {site: np.linalg.norm(values, axis=1).astype(np.float32) for site, values in wide.items()},
        {MomentKey(s): Moments(len(v), v.sum(0), (v**2).sum(0)) for s, v in wide.items()},
    )


def files(store: Store) -> dict[str, bytes]:
    return {str(p.relative_to(store.path)): p.read_bytes() for p in store.path.rglob("*") if p.is_file()}


def write(store: Store, unit: int, *, seed: int | None = None, writer: str = "other") -> bool:
    return write_unit(store, store.harvests[0], unit, block_of(store, unit, seed), writer=writer, figures=None)


def test_a_unit_that_is_committed_is_compared_and_not_touched(store: Store) -> None:
    before = files(store)
    assert write(store, 0) is False
    assert files(store) == before


def test_other_bytes_for_a_committed_unit_name_both_writers(store: Store) -> None:
    before = files(store)
    with pytest.raises(UnitConflict, match=r"unit 0 .*writer other .*writer test.*granary verify STORE --repair"):
        write(store, 0, seed=99)
    assert files(store) == before


def test_the_loser_of_the_race_compares(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another commits between our look for the commit and our own: a zombie, or a unit given out twice."""
    monkeypatch.setattr(Place, "exists", lambda self: False)
    before = files(store)
    assert write(store, 0) is False
    assert files(store) == before
    with pytest.raises(UnitConflict, match="unit 0 "):
        write(store, 0, seed=99)


def test_the_answer_to_a_create_that_was_lost(store: Store) -> None:
    """The commit is ours, and its repetition is told that it exists: the bytes are equal, so it counts as ours."""
    harvest = store.harvests[0].digest
    stored = log_of(store, harvest).read(0)
    assert log_of(store, harvest).commit(stored) is True
    assert log_of(store, harvest).read(0) == stored


@pytest.mark.parametrize("seed", [None, 99])
def test_whose_temporary_files_were_swept_compares(
    store: Store, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another commits while we write, and a run that finds all units there sweeps what we have staged."""
    publish = LocalFiles.publish

    def lose(self: LocalFiles, staged: Sequence[StagedFile]) -> None:
        monkeypatch.setattr(LocalFiles, "publish", publish)
        assert write(store, 1, writer="faster") is True
        self.discard(staged)
        publish(self, staged)

    monkeypatch.setattr(LocalFiles, "publish", lose)
    if seed is None:
        assert write(store, 1) is False
    else:
        with pytest.raises(UnitConflict, match=r"unit 1 .*writer other .*writer faster"):
            write(store, 1, seed=seed)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; committed units are safe, start again when there is room"),
        (errno.EDQUOT, "Disk quota exceeded; committed units are safe, start again when there is room"),
        (errno.EIO, "Input/output error; committed units are safe, start again when it can be written"),
        (errno.EACCES, "Permission denied; committed units are safe, start again when it can be written"),
    ],
)
def test_what_to_do_about_a_disk_depends_on_its_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(self: LocalFiles, staged: Sequence[StagedFile]) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(LocalFiles, "publish", fail)
    with pytest.raises(CannotWrite, match=words):
        write(store, 1)


@pytest.mark.parametrize("what", ["chunk", "commit", "moments"])
def test_repair_writes_the_bytes_again_and_never_removes_the_commit(store: Store, what: str) -> None:
    before = files(store)
    harvest = store.harvests[0]
    damaged = {
        "chunk": store.array(SITES[0]).object_place(0),
        "commit": log_of(store, harvest).commit_place(0),
        "moments": store.root / "moments" / harvest.digest / "00000000.parquet",
    }[what]
    damaged.write(bytes(10))
    rewrite_unit(store, harvest, 0, block_of(store, 0), writer="repair", figures=None)
    after = files(store)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == ({f"commits/{harvest.digest}/000000/00000000.json"} if what == "commit" else set())
    assert log_of(store, harvest).read(0).writer == ("repair" if what == "commit" else "test")
    assert 0 in log_of(store, harvest).committed()


def test_a_machine_that_computes_other_bytes_repairs_nothing(store: Store) -> None:
    store.array(SITES[0]).object_place(0).write(bytes(10))
    before = files(store)
    with pytest.raises(UnitConflict):
        rewrite_unit(store, store.harvests[0], 0, block_of(store, 0, seed=99), writer="repair", figures=None)
    assert files(store) == before


def test_a_zombie_after_a_repair_changes_nothing(store: Store) -> None:
    rewrite_unit(store, store.harvests[0], 0, block_of(store, 0), writer="repair", figures=None)
    before = files(store)
    assert write(store, 0, writer="zombie") is False
    assert files(store) == before


def test_a_changed_byte_anywhere_in_a_record_is_found(store: Store) -> None:
    harvest = store.harvests[0]
    log_of(store, harvest).record_failure(Failure(1, ["e"], ["w"]))
    readers = {
        log_of(store, harvest).commit_place(0): lambda: log_of(store, harvest).read(0),
        store.root / "commits" / harvest.digest / "harvest.json": lambda: store.for_model(harvest.model).harvests,
        store.root / "failures" / harvest.digest / "00000001.json": lambda: log_of(store, harvest).failure(1),
    }
    rng = random.Random(0)
    for place, read in readers.items():
        content = place.read()
        for at in rng.sample(range(len(content)), 60):
            changed = bytearray(content)
            changed[at] ^= 1 << rng.randrange(8)
            place.write(bytes(changed))
            with pytest.raises(StorageError, match=str(place)):
                read()
        place.write(content)
        read()


def test_a_kill_between_the_record_and_the_arrays(store: Store, tmp_path: Path) -> None:
    """Readers say that metadata is missing; declaring again writes it, and another site is no contradiction."""
    for kind in ("activations", "norms"):
        (store.root / kind).remove()
    fresh = Store(store.root, store.info)
    with pytest.raises(NotAStore, match="its metadata is missing; if a run was killed as it began"):
        fresh.array(SITES[0])
    declare_harvest(store.root, store.num_rows, fresh.harvests[0])
    assert Store(store.root, store.info).array(SITES[0]).shape == (96, 5)


@pytest.mark.parametrize("url", ["local", "memory://granary-test-commits"])
def test_failures_and_drivers_come_and_go(tmp_path: Path, url: str) -> None:
    root = open_place(tmp_path if url == "local" else url)
    assert HarvestLog(root, "h", UNITS).failed() == []
    HarvestLog(root, "h", UNITS).record_failure(Failure(12, ["a", "b", "c"], ["x", "y", "z"], {"torch": "2"}))
    HarvestLog(root, "h", UNITS).record_failure(Failure(3, ["a"], ["x"]))
    assert HarvestLog(root, "h", UNITS).failed() == [3, 12]
    assert HarvestLog(root, "h", UNITS).failure(12) == Failure(12, ["a", "b", "c"], ["x", "y", "z"], {"torch": "2"})
    HarvestLog(root, "h", UNITS).clear_failure(3)
    HarvestLog(root, "h", UNITS).clear_failure(4)
    assert HarvestLog(root, "h", UNITS).failed() == [12]
    driver = Driver("me", counter=3, units_done=4, in_flight=[7, 8])
    HarvestLog(root, "h", UNITS).write_driver(driver)
    assert HarvestLog(root, "h", UNITS).drivers() == DriverRecords([driver], [])
    HarvestLog(root, "h", UNITS).remove_driver("me")
    assert HarvestLog(root, "h", UNITS).drivers().drivers == []


def test_a_driver_s_record_that_cannot_be_read_is_left_out_and_told(store: Store) -> None:
    harvest = store.harvests[0].digest
    log_of(store, harvest).write_driver(Driver("sound"))
    sound = StoreLayout(store.root).driver(harvest, "sound").read()
    place, rng = StoreLayout(store.root).driver(harvest, "x"), random.Random(0)
    for at in rng.sample(range(len(sound)), 60):
        changed = bytearray(sound)
        changed[at] ^= 1 << rng.randrange(8)
        place.write(bytes(changed))
        found = log_of(store, harvest).drivers()
        assert found.drivers == [Driver("sound")]
        assert f"the record {place} is damaged: " in found.unreadable[0]
        assert f"`granary verify {store.root} --repair` removes it" in found.unreadable[0]
    place.write(encode({"id": "x", "counter": 1}))
    assert log_of(store, harvest).drivers() == DriverRecords(
        [Driver("sound")], [f"the driver's record {place} lacks 'interval_s': another version of Granary wrote it"]
    )


def heard(watch: DriverWatch, now: float, **counters: int) -> list[str]:
    watch.observe([Driver(name, counter) for name, counter in counters.items()], now)
    return [driver.id for driver in watch.alive(now)]


def test_a_driver_lives_while_its_counter_moves() -> None:
    watch = DriverWatch(own="me")
    assert heard(watch, 0, me=1, other=70, dead=5) == []  # nobody was seen moving yet
    assert heard(watch, 5, me=2, other=71, dead=5) == ["other"]
    assert heard(watch, 10, me=3, other=71, dead=5) == ["other"]
    assert heard(watch, 5 + ALIVE_S + 1, me=4, other=71, dead=5) == []
    assert heard(watch, 50, me=5, other=2, dead=5) == ["other"]  # any change is a move
    assert watch.gone(50) == []
    assert heard(watch, GONE_S + 1, me=9, other=99, dead=5) == ["other"]
    assert watch.gone(GONE_S + 1) == ["dead"]
    assert heard(watch, GONE_S + 2, me=9) == []


def test_progress_from_the_store_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest = store.harvests[0].digest
    log_of(store, harvest).record_failure(Failure(0, ["committed since"], ["w"]))
    log_of(store, harvest).record_failure(Failure(1, ["e"], ["w"]))
    progress = harvest_progress(log_of(store, harvest))
    assert progress.committed == {0, 2}
    assert [failure.unit for failure in progress.failed] == [1]
    assert (progress.drivers, progress.silent) == ([], [])
    alive: dict[str, Any] = {"interval_s": 1.0, "in_flight": [0, 1], "rows_per_second": 10.0}
    log_of(store, harvest).write_driver(Driver("killed", **alive))
    log_of(store, harvest).write_driver(Driver("alive", **alive))

    def sleep(seconds: float) -> None:  # while we sleep, one of them goes on
        log_of(store, harvest).write_driver(Driver("alive", counter=1, **alive))

    monkeypatch.setattr("storage.harvest.progress.time.sleep", sleep)
    progress = harvest_progress(log_of(store, harvest))
    assert [driver.id for driver in progress.drivers] == ["alive"]
    assert progress.silent == ["killed"]
    assert progress.in_flight == {1}
    assert progress.rows_per_second == 10.0
