"""The same bytes whoever harvests: one worker, three workers, a killed worker, a killed driver. Real SIGKILL."""

import os
import signal
from pathlib import Path

import pytest
from harvests import (
    DEADLINE_S,
    ROWS,
    UNITS,
    assert_same,
    commits,
    contents,
    granary,
    rows_of,
    start,
    wait_for,
    write_spec,
)

from storage.store import open_store

pytestmark = pytest.mark.slow  # real harvests that are disturbed, half a minute each


def test_three_workers(tmp_path: Path, library: Path, undisturbed: Path) -> None:
    spec = write_spec(tmp_path, library, workers=3)
    granary("harvest", spec)
    assert len({c["writer"] for c in commits(tmp_path / "store")}) > 1
    assert_same(tmp_path / "store", undisturbed)


def test_a_killed_worker(tmp_path: Path, library: Path, undisturbed: Path) -> None:
    spec = write_spec(tmp_path, library)
    process = start("harvest", spec)
    wait_for(lambda: len(list(commits(tmp_path / "store"))) >= 3, process)
    victim = next(commits(tmp_path / "store"))["writer"]
    os.kill(int(victim.rsplit("-", 2)[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out
    assert "died and is replaced" in out
    writers = {c["writer"] for c in commits(tmp_path / "store")}
    assert len(writers) == 2
    assert_same(tmp_path / "store", undisturbed)
    assert not list((tmp_path / "store").rglob(".*.tmp"))


def test_a_killed_driver(tmp_path: Path, library: Path, undisturbed: Path) -> None:
    spec = write_spec(tmp_path, library)
    store = tmp_path / "store"
    for done in (2, UNITS // 2):
        process = start("harvest", spec)
        wait_for(lambda done=done: len(list(commits(store))) >= done, process)  # type: ignore[misc]
        process.kill()
        process.communicate(timeout=DEADLINE_S)
        os.killpg(process.pid, signal.SIGKILL)
        assert len(list(commits(store))) < UNITS
    written = {c["unit"]: c["writer"] for c in commits(store)}
    out = granary("harvest", spec)
    assert f"{ROWS:,} rows" not in out  # it did the rest, not everything
    assert written.items() <= {c["unit"]: c["writer"] for c in commits(store)}.items()
    assert_same(store, undisturbed)
    before = contents(store)
    assert "are there" in granary("harvest", spec)
    assert contents(store) == before


def test_another_site_later_computes_only_what_is_missing(tmp_path: Path, library: Path, undisturbed: Path) -> None:
    spec = write_spec(tmp_path, library, sites=["mlp_in.3"])
    granary("harvest", spec)
    write_spec(tmp_path, library, sites=["mlp_in.3", "resid_post.1"])
    granary("harvest", spec)
    first, second = open_store(tmp_path / "store").harvests
    assert (list(first.sites), list(second.sites)) == (["mlp_in.3"], ["resid_post.1"])
    names = rows_of(undisturbed)
    mine = rows_of(tmp_path / "store")
    assert {n: d for n, d in mine.items() if not n.startswith("moments")} == {
        n: d for n, d in names.items() if not n.startswith("moments")
    }
