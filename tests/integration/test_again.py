"""The same bytes whoever harvests: one worker, three workers, a killed worker, a killed driver. Real SIGKILL.

The model computes in bfloat16, where the bits would show any change of batches. The oracle is the run with one worker
that nothing disturbed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.demo.corpus import write_corpus
from storage.commits import committed_units
from storage.places import open_place
from storage.store import open_store
from storage.unitsets import UnitRanges

MODEL = Path(__file__).parents[2] / "jobs" / "demo" / "model"
ROWS, ROWS_PER_UNIT = 80_000, 4096
UNITS = -(-ROWS // ROWS_PER_UNIT)
DEADLINE_S = 120


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "corpus.parquet"
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    spec = write_spec(tmp_path_factory.mktemp("undisturbed"), library)
    granary("harvest", spec)
    return spec.parent / "store"


def write_spec(folder: Path, library: Path, **harvest: Any) -> Path:
    spec = {
        "store": "store",
        "model": {"id": str(MODEL), "dtype": "bfloat16"},
        "corpus": {
            "path": str(library), "labels": ["kind"], "context": 128, "rows": ROWS, "rows_per_unit": ROWS_PER_UNIT,
        },
        "harvest": {"sites": ["resid_post.1", "mlp_in.3"], "workers": 1, "threads_per_worker": 1, **harvest},
    }  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def start(verb: str, spec: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.cli", verb, str(spec)]
    # A group of its own, so that the test can also end the Ray processes that a killed driver leaves behind.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def granary(verb: str, spec: Path) -> str:
    process = start(verb, spec)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out
    return out


def contents(store: Path) -> dict[str, str]:
    """Digest of every file that holds rows: columns, activations, norms, moments; metadata included."""
    files = [
        f for kind in ("corpus", "activations", "norms", "moments") for f in (store / kind).rglob("*") if f.is_file()
    ]
    return {str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def rows_of(store: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(store).items() if not name.endswith("zarr.json")}


def commits(store: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((store / "commits").glob("*/0*/0*.json")):
        yield json.loads(path.read_text())


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same(store: Path, undisturbed: Path) -> None:
    assert rows_of(store) == rows_of(undisturbed)
    (harvest,) = open_store(store).harvests
    assert committed_units(open_place(store), harvest.digest, UnitRanges(ROWS, ROWS_PER_UNIT)) == frozenset(
        range(UNITS)
    )


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
