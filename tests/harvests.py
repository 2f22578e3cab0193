"""Harvests by the command line in processes of their own, for tests that disturb them; a plugin of conftest.py.

The model computes in bfloat16, where the bits would show any change of batches. The oracle is the run with one worker
that nothing disturbed.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.demo.corpus import write_corpus
from storage.backends.place import open_place
from storage.format.units import UnitRanges
from storage.harvest.log import HarvestLog
from storage.store import open_store

MODEL = Path(__file__).parents[1] / "jobs" / "demo" / "model"
ROWS, ROWS_PER_UNIT = 40_000, 2048
UNITS = -(-ROWS // ROWS_PER_UNIT)
DEADLINE_S = 600


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "corpus.parquet"
    write_corpus(path)
    return path


@pytest.fixture(scope="session")
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
    assert HarvestLog(open_place(store), harvest.digest, UnitRanges(ROWS, ROWS_PER_UNIT)).committed() == frozenset(
        range(UNITS)
    )
