"""A disk that is too small, full, or read-only, at every point where the commands write. Small tmpfs mounts."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import Harvesting, start_harvest
from disks import CannotMount, Disk, mounted
from lab import SITE, SITES, Lab, check_message, snapshot

from jobs.cli.main import main
from storage.errors import StorageError
from storage.format.units import UnitSet
from storage.harvest.log import log_of
from storage.store import Store

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Disk]]:
    """`mount("3m")` gives a disk of that size."""
    with ExitStack() as disks:

        def make(size: str) -> Disk:
            try:
                return disks.enter_context(mounted(tmp_path_factory.mktemp("disk"), size))
            except CannotMount as error:
                pytest.skip(str(error))

        yield make


def on(disk: Disk, lab: Lab) -> Lab:
    """The same spec on another disk."""
    return Lab(disk.path, lab.base, lab.capsys)


ALL_SITES = ["resid_pre.0-2", "resid_mid.0-2", "resid_post.0-2", "mlp_in.0-2", "mlp_out.0-2", "attn_out.0-2"]


def test_a_harvest_that_does_not_fit_is_refused_before_it_begins(lab: Lab, mount: Callable[[str], Disk]) -> None:
    """Nothing is left either: a plan in the store would refuse the fewer rows that the message advises."""
    lab = on(mount("3m"), lab)
    err = lab.refused("harvest", lab.spec({"harvest.sites": ALL_SITES, "harvest.dtype": "float32"}))
    assert f"the disk of {lab.store} is too full: the harvest needs 9.3 MiB and " in err
    assert " are free; make room, ask for fewer rows or sites, or put the store elsewhere" in err


def test_more_sites_that_do_not_fit_leave_those_there_alone(
    lab: Lab, harvested: Store, mount: Callable[[str], Disk]
) -> None:
    disk = mount("32m")
    shutil.copytree(harvested.path, disk.path / "store")
    lab = on(disk, lab)
    spec = lab.spec({"harvest.sites": ["resid_mid.0-2"]})
    disk.fill(leave=100_000)
    assert "the harvest needs 816.0 KiB and " in lab.refused("harvest", spec)
    assert "4 units; 0 rows held out" in lab.run("status", lab.store)


def test_a_plan_on_a_full_disk_leaves_nothing(lab: Lab, mount: Callable[[str], Disk]) -> None:
    lab = on(mount("1m"), lab)
    err = lab.refused("harvest", lab.spec())
    assert f"the store at {lab.store} cannot be written: No space left on device" in err
    assert [path.name for path in lab.folder.iterdir()] == ["spec.yaml"]


UNIT_BYTES = len(SITES) * 1024 * (32 * 2 + 4)


def committed(harvesting: Harvesting) -> UnitSet:
    (job,) = harvesting.jobs
    return log_of(harvesting.store, job.harvest).committed()


def test_a_disk_that_fills_up_in_mid_harvest(
    lab: Lab, llama: Path, corpus: Path, harvested: Store, mount: Callable[[str], Disk]
) -> None:
    """Wherever in a unit the disk is full: no commit, nothing half written, what was committed is there. With room
    again the harvest goes on to the same bytes."""
    disk = mount("32m")
    lab = on(disk, lab)
    harvesting = start_harvest(lab.store, llama, corpus, SITES)
    store = harvesting.store
    harvesting.run([0, 1])
    first = store.read(SITE, slice(0, 2048))
    words = "No space left on device; committed units are safe, start again when there is room"
    for room in range(0, UNIT_BYTES, 24 * 1024):  # full at the first chunk, at the last, and in between
        disk.fill(leave=room)
        with pytest.raises(StorageError, match=f"unit 2 cannot be written to {lab.store}: {words}"):
            harvesting.run([2])
        assert committed(harvesting) == {0, 1}
        assert not list(lab.store.rglob("*.tmp"))
        np.testing.assert_array_equal(store.read(SITE, slice(0, 2048)), first)
        assert "2 of 4 units" in lab.run("status", lab.store)
        disk.empty()
    start_harvest(lab.store, llama, corpus, SITES).run()
    mine, undisturbed = snapshot(lab.store), snapshot(harvested.path)
    assert {n for n in mine if "commits/" not in n} == {n for n in undisturbed if "commits/" not in n}
    kinds = ("corpus/", "activations/", "norms/", "moments/")
    assert {n: d for n, d in mine.items() if n.startswith(kinds)} == {
        n: d for n, d in undisturbed.items() if n.startswith(kinds)
    }


def test_anchors_on_a_full_disk(lab: Lab, harvested: Store, mount: Callable[[str], Disk]) -> None:
    disk = mount("32m")
    for name in ("store", "other"):
        shutil.copytree(harvested.path, disk.path / name)
    lab = on(disk, lab)
    anchors = {"anchors": {"name": "a", "by": "language", "min_rows": 10}}
    lab.run("anchors", lab.spec({**anchors, "store": "other"}))
    spec = lab.spec(anchors)
    attempts = 0
    while True:
        disk.fill(leave=4096)  # each attempt finds room for one file more
        lab.capsys.readouterr()
        status = main(["anchors", str(spec)])
        out, err = lab.capsys.readouterr()
        if status == 0:
            break
        attempts += 1
        assert out == ""
        check_message(err)
        assert "No space left on device" in err
        assert not list(lab.store.rglob("*.tmp"))
        assert "anchors " not in lab.run("status", lab.store)
        disk.empty()
    assert attempts > 4
    assert snapshot(lab.store / "anchors") == snapshot(disk.path / "other" / "anchors")


def test_fetching_to_a_full_disk(stored: Lab, mount: Callable[[str], Disk]) -> None:
    disk = mount("1m")
    disk.fill(leave=8192)
    out = disk.path / "x.npy"
    err = stored.refused("query", stored.store, "select row from rows", "--site", SITE, "--out", out)
    assert err == f"granary: {out} cannot be written: No space left on device\n"
    assert [path.name for path in disk.path.iterdir()] == ["ballast"]


def test_a_disk_that_is_read_only(lab: Lab, harvested: Store, mount: Callable[[str], Disk]) -> None:
    disk = mount("32m")
    shutil.copytree(harvested.path, disk.path / "store")
    lab = on(disk, lab)
    specs = {}
    for name, changes in {
        "new": {"store": "new"},
        "same": {},
        "more": {"harvest.sites": ["resid_mid.0"]},
        "anchored": {"anchors": {"name": "a", "by": "language", "min_rows": 10}},
    }.items():
        specs[name] = lab.spec(changes).rename(disk.path / f"{name}.yaml")
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    assert f"the store at {disk.path / 'new'} cannot be written: Read-only file system" in lab.refused(
        "harvest", specs["new"]
    )
    for verb in ("plan", "harvest"):
        assert "cannot be written: Read-only file system, when" in lab.refused(verb, specs["more"])
    assert "Read-only file system" in lab.refused("anchors", specs["anchored"])
    assert "Read-only file system" in lab.refused("report", lab.store)
    assert "are there" in lab.run("harvest", specs["same"])
    assert "complete" in lab.run("status", lab.store)
    assert "3733" in lab.run("query", lab.store, "select count(*) from rows")
