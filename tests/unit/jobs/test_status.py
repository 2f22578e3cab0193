"""What `granary status` says of a harvest, from the store alone: units, drivers, failures, rate, padding, rounding."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import start_harvest, write_store
from lab import SITES, Lab

from jobs.cli.main import main
from jobs.status import status_record, status_text
from storage.format.layout import StoreLayout
from storage.format.records import Record, encode, read_record
from storage.format.units import UnitSet
from storage.harvest.commits import Commit, UnitFigures
from storage.harvest.driver_records import Driver
from storage.harvest.failures import Failure
from storage.harvest.history import COMMITS_READ, history_of, read_history
from storage.harvest.log import HarvestLog, log_of
from storage.store import Store, open_store
from workers.harvest.heartbeat import Heartbeat


def commit(unit: int, at: float, writer: str = "a", **figures: Any) -> Commit:
    made = Commit("h", unit, unit * 100, unit * 100 + 100, writer, {}, "0", committed_at=at)
    return replace(made, figures=UnitFigures.from_record({"device": "cpu", **figures})) if figures else made


def rounding(error: float, norm: float) -> Record:
    return {"rounding": {"resid_post.1": {"square_error": error, "square_norm": norm}}}


# ---- history, by hand


def test_rates_of_two_workers() -> None:
    """Each commits a unit of 100 rows every 2 s, a second apart: 100 rows/s together, 50 each."""
    commits = [commit(unit, at=10 + unit, writer="ab"[unit % 2]) for unit in range(10)]
    found = history_of(commits)
    assert found.rows_per_second == pytest.approx(100)
    assert found.rows_per_second_per_worker == pytest.approx(50)


def test_a_night_between_two_runs_does_not_count() -> None:
    before = [commit(unit, at=unit) for unit in range(6)]
    after = [commit(unit, at=100_000 + 2 * unit) for unit in range(6, 12)]
    assert history_of([*before, *after]).rows_per_second == pytest.approx(50)


def test_units_may_be_committed_in_any_order() -> None:
    commits = [commit(unit, at=at) for unit, at in enumerate([5.0, 1.0, 4.0, 2.0, 3.0])]
    assert history_of(commits).rows_per_second == pytest.approx(100)


@pytest.mark.parametrize("commits", [[], [commit(0, 1.0)], [commit(0, 1.0), commit(1, 1.0)]])
def test_too_little_for_a_rate(commits: list[Commit]) -> None:
    found = history_of(commits)
    assert (found.rows_per_second, found.rows_per_second_per_worker, found.padding_share) == (None, None, None)


def test_padding_and_errors_add_up() -> None:
    commits = [
        commit(0, 1.0, positions_run=100, padding=10, **rounding(1.0, 100.0)),
        commit(1, 2.0, positions_run=300, padding=10, **rounding(0.5, 400.0)),
    ]
    found = history_of(commits)
    assert found.padding_share == pytest.approx(20 / 400)
    assert found.relative_errors == {"resid_post.1": pytest.approx(1.5 / 500)}
    assert history_of([commit(0, 1.0, **rounding(0.0, 0.0))]).relative_errors == {"resid_post.1": 0}


def test_the_idle_share_is_the_mean_of_the_commits_that_hold_one() -> None:
    idle = [commit(unit, at=unit, idle_share=share) for unit, share in enumerate([None, 0.02, 0.04])]
    assert history_of([*idle, commit(3, at=3)]).idle_share == pytest.approx(0.03)
    assert history_of(idle[:1]).idle_share is None


def test_a_bounded_number_of_commits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "store", num_rows=4 * 700, rows_per_unit=4, chunk_rows=4, sites=["resid_post.0"])
    (harvest,) = store.harvests
    read: list[int] = []

    read_one = HarvestLog.read

    def counted(log: HarvestLog, unit: int) -> Commit:
        read.append(unit)
        return read_one(log, unit)

    monkeypatch.setattr(HarvestLog, "read", counted)
    committed = log_of(store, harvest).committed()
    assert len(committed) == 700
    found = read_history(log_of(store, harvest), committed)
    assert found.commits == len(read) == len(set(read)) == COMMITS_READ
    assert set(range(700 - COMMITS_READ // 2, 700)) <= set(read)
    assert 0 in read


# ---- the command


@pytest.fixture
def half(tmp_path: Path, llama: Path, corpus: Path) -> Store:
    """Units 0 to 2 of 4."""
    harvesting = start_harvest(tmp_path / "store", llama, corpus, SITES)
    harvesting.run([0, 1, 2])
    return open_store(tmp_path / "store")


def test_figures_are_those_of_the_commits(half: Store) -> None:
    (h,) = status_record(half)["harvests"]
    digest = half.harvests[0].digest
    commits = [log_of(half, digest).read(unit) for unit in range(3)]
    assert (h["units_committed"], h["units"], h["commits_read"]) == (3, 4, 3)
    figures = [c.figures for c in commits if c.figures is not None]
    run, padding = sum(f.positions_run for f in figures), sum(f.padding for f in figures)
    assert h["padding_share"] == pytest.approx(padding / run)
    # Each context is run once, and again where a unit cuts it.
    tokens = half.info.num_context_tokens
    assert 0 < run - padding <= tokens + 2 * 64
    seconds = commits[2].committed_at - commits[0].committed_at
    assert h["rows_per_second"] == pytest.approx(2048 / seconds)
    assert h["seconds_left"] == pytest.approx((half.num_rows - 3072) / h["rows_per_second"])
    assert set(h["rounding"]) == set(SITES)
    assert all(1e-7 < of_site["relative_error"] < 4e-6 for of_site in h["rounding"].values())


def test_idle_gpus_are_told(half: Store) -> None:
    assert "GPUs idle" not in status_text(status_record(half))
    for unit in (0, 1):
        place = log_of(half, half.harvests[0]).commit_place(unit)
        place.write(encode({**read_record(place), "idle_share": 0.03 + 0.01 * unit}))
    record = status_record(half)
    assert record["harvests"][0]["idle_share"] == pytest.approx(0.035)
    assert "% padding; GPUs idle 3.5 % of the time" in status_text(record)


def test_the_rate_of_a_driver_has_no_loading_in_it(half: Store) -> None:
    """60 s of loading, then a unit of 1,000 rows every 10 s."""
    heartbeat = Heartbeat(log_of(half, half.harvests[0]), Driver("me"), UnitSet(4))
    rates = [heartbeat._rate(now, 1000 * max(0, (now - 60) // 10)) for now in range(0, 100, 5)]
    assert rates[:15] == [0] * 15  # nothing yet at 65 s; at 70 s the first unit, from which on is counted
    assert rates[16:] == pytest.approx([100, 1000 / 15, 100, 2000 / 25])


def test_nobody_at_work(half: Store) -> None:
    text = status_text(status_record(half))
    assert "3 of 4 units" in text
    assert "no driver at work; it went at " in text
    assert "left when it goes on: `granary harvest SPEC`" in text
    assert "bfloat16 is off by 2." in text


def test_failed_units_are_named_with_their_errors_until_they_are_committed(
    half: Store, llama: Path, corpus: Path
) -> None:
    digest = half.harvests[0].digest
    for unit in (1, 3):  # of unit 1 another run made something since
        log_of(half, digest).record_failure(Failure(unit, ["ValueError('first')", "OSError('last')"], ["a", "b"]))
    record = status_record(half)
    assert record["harvests"][0]["units_failed"] == [{"unit": 3, "errors": ["ValueError('first')", "OSError('last')"]}]
    assert "unit 3 failed 2 times: OSError('last')" in status_text(record)
    start_harvest(half.path, llama, corpus, SITES).run()
    record = status_record(open_store(half.path))
    assert record["harvests"][0]["units_failed"] == []
    assert " failed " not in status_text(record)


@pytest.fixture
def driver(half: Store) -> Iterator[Driver]:
    """A driver that says again and again that it is at work on unit 3."""
    digest, done = half.harvests[0].digest, threading.Event()
    driver = Driver("host-1-abcd", interval_s=0.2, workers=1, in_flight=[2, 3], rows_per_second=66.1)

    def beat() -> None:
        counter = 0
        while not done.wait(0.1):
            counter += 1
            log_of(half, digest).write_driver(replace(driver, counter=counter))

    log_of(half, digest).write_driver(driver)
    thread = threading.Thread(target=beat)
    thread.start()
    yield driver
    done.set()
    thread.join()


def test_a_driver_at_work_gives_units_in_progress_and_time_left(half: Store, driver: Driver) -> None:
    record = status_record(half)
    (h,) = record["harvests"]
    assert (h["drivers"], h["drivers_silent"]) == (["host-1-abcd"], [])
    assert h["units_in_progress"] == [3]  # unit 2 is committed since its record was written
    assert h["rows_per_second"] == 66.1
    assert h["seconds_left"] == pytest.approx((half.num_rows - 3072) / 66.1)
    assert "1 in progress by 1 driver; 66 rows/s, 10 s left" in status_text(record)


def test_a_driver_that_stands_still(half: Store) -> None:
    log_of(half, half.harvests[0]).write_driver(Driver("host-2-dead", interval_s=0.2, in_flight=[3]))
    record = status_record(half)
    (h,) = record["harvests"]
    assert (h["drivers"], h["drivers_silent"], h["units_in_progress"]) == ([], ["host-2-dead"], [])
    assert "no driver at work; 1 was killed or stands still" in status_text(record)


def test_a_driver_s_record_that_is_damaged_is_a_note(half: Store, capsys: pytest.CaptureFixture[str]) -> None:
    place = StoreLayout(half.root).driver(half.harvests[0].digest, "x")
    place.write(b"{}")
    assert main(["status", str(half.path)]) == 0
    text = capsys.readouterr().out
    assert f"note: the record {place} is damaged: it has no checksum; `granary verify {half.root} --repair`" in text
    assert main(["verify", str(half.path)]) == 1
    assert "it has no checksum" in capsys.readouterr().out
    assert main(["verify", str(half.path), "--repair"]) == 0
    assert status_record(half)["harvests"][0]["drivers_unreadable"] == []


@pytest.mark.parametrize("content", [b"{}", encode({"id": "x", "counter": 1})])
def test_presence_goes_on_beside_a_record_that_cannot_be_read(
    half: Store, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bitmap is written, and drivers see each other."""
    digest, units = half.harvests[0].digest, half.info.units
    StoreLayout(half.root).driver(digest, "x").write(content)
    log = log_of(half, digest)
    with Heartbeat(log, Driver("me"), log.committed()) as heartbeat:
        deadline = time.monotonic() + 60
        while heartbeat.news is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert heartbeat.news is not None
    assert HarvestLog(half.root, digest, units).bitmap() == {0, 1, 2}
    assert "cannot be kept up to date" not in capsys.readouterr().err


def test_a_complete_harvest_of_exact_rows(lab: Lab, llama: Path, corpus: Path) -> None:
    start_harvest(lab.store, llama, corpus, ["resid_post.1", "mlp_in.0@int8"], dtype="float32").run()
    text = lab.run("status", lab.store)
    assert "float32, int8 x 32" in text
    assert "complete" in text
    assert "driver" not in text
    assert "float32 holds exactly what the model computed (resid_post.1)" in text
    assert "the FVU of a reference autoencoder by" in text
    record = json.loads(lab.run("status", lab.store, "--json"))
    assert record["harvests"][0]["seconds_left"] is None


def test_a_harvest_that_has_no_unit_yet(lab: Lab, llama: Path, corpus: Path) -> None:
    start_harvest(lab.store, llama, corpus, SITES)
    text = lab.run("status", lab.store)
    assert "0 of 4 units" in text
    assert "no driver at work; it has no rate yet" in text
    assert "reference" not in text
