"""The real commands on an S3 server: a store there holds the rows of a local one, bit for bit, whoever was killed; and
neither the store nor anything that is printed or logged holds the keys."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lab import DICTIONARY
from objects import objects_of
from processes import Run, write_spec
from s3 import SECRET, S3Server

from jobs.cli.main import main
from storage.backends.place import open_place
from storage.store import Store, open_store

ROWS, ROWS_PER_UNIT = 24_000, 2048
SITES = ["resid_post.1", "mlp_in.3"]


def spec_at(folder: Path, library: Path, store: str, **sections: Any) -> Path:
    corpus = {"rows": ROWS, "rows_per_unit": ROWS_PER_UNIT, "holdout": 0.2}
    model = {"dtype": "float32"}  # bits are compared with those of the same batches: bfloat16 would show no more
    return write_spec(folder, library, store=store, corpus=corpus, model=model, **sections)


@pytest.fixture(scope="module")
def environment(s3_server: S3Server) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Store:
    spec = spec_at(tmp_path_factory.mktemp("local"), library, "store")
    Run.start("harvest", spec).wait()
    return open_store(spec.parent / "store")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, library: Path, s3_server: S3Server, environment: None) -> Path:
    """The spec of a store on S3 of which every stage was run; `run` has printed into log-*.txt beside it."""
    spec = spec_at(
        tmp_path_factory.mktemp("whole"),
        library,
        f"{s3_server.make_bucket()}/acts",
        anchors={"name": "kinds", "by": "kind", "min_rows": 100},
        train={"rows": 8192, "batch_rows": 1024, "threads": 1, "dictionaries": [{**DICTIONARY, "anchors": "kinds"}]},
        evaluate={"rows": 1024, "contexts": 8},
    )
    Run.start("run", spec).wait()
    return spec


def url_of(spec: Path) -> str:
    return str(yaml.safe_load(spec.read_text())["store"])


def assert_same_rows(store: Store, local: Store) -> None:
    assert store.info.corpus_digest == local.info.corpus_digest
    assert store.sites == local.sites == SITES
    for name, column in local.columns(0, local.num_rows).items():
        np.testing.assert_array_equal(store.columns(0, store.num_rows, [name])[name], column)
    for site in SITES:
        assert store.read(site).tobytes() == local.read(site).tobytes()
        assert store.norms(site).tobytes() == local.norms(site).tobytes()
    mine, theirs = (objects_of(place.root / "moments") for place in (store, local))
    assert mine == theirs
    assert store.documents.equals(local.documents)


@pytest.mark.slow
def test_the_rows_are_those_of_a_local_store(whole: Path, local: Store) -> None:
    store = open_store(url_of(whole))
    assert_same_rows(store, local)
    layout = store.array(SITES[0])
    assert layout.shard_rows == ROWS_PER_UNIT
    assert (layout.path / "c").names() == [str(unit) for unit in sorted(map(str, range(store.info.num_units)))]


def test_every_stage_left_its_results(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = url_of(whole)
    assert main(["status", url]) == 0
    out = capsys.readouterr().out
    assert "complete" in out
    assert "anchors   kinds: 4 directions" in out
    assert re.search(r"run       sae: trained; FVU 0\.\d+", out)
    assert main(["query", url, "select count(*) as n from rows", "--json"]) == 0
    assert capsys.readouterr().out == '{"n": 24000}\n'
    rows = whole.parent / "rows.npy"
    query = "select row from rows where position = 1"
    assert main(["query", url, query, "--site", SITES[0], "--out", str(rows)]) == 0
    assert len(np.load(rows)) > 100
    assert main(["report", url]) == 0
    assert main(["plan", str(whole)]) == 0
    assert b"<html" in (open_place(url) / "report.html").read()


@pytest.mark.slow
def test_running_again_does_nothing(whole: Path) -> None:
    before = {k: v for k, v in objects_of(open_place(url_of(whole))).items() if not k.startswith(("report", "drivers"))}
    log = Run.start("run", whole).wait()
    assert "nothing to do: every stage of the spec is finished" in log
    after = {k: v for k, v in objects_of(open_place(url_of(whole))).items() if not k.startswith(("report", "drivers"))}
    assert after == before


@pytest.mark.slow
def test_a_killed_driver(tmp_path: Path, library: Path, local: Store, whole: Path, s3_server: S3Server) -> None:
    """With all of its actors, while it harvests; the next one goes on from the commits."""
    spec = spec_at(tmp_path, library, f"{s3_server.make_bucket()}/acts")
    place, run = open_place(url_of(spec)), Run.start("harvest", spec)
    try:
        deadline = time.monotonic() + 600
        while not any(re.fullmatch(r"\w+/\d+/[\d-]+\.json", name) for name in objects_of(place / "commits")):
            assert not run.is_over, run.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(run.process.pid, signal.SIGKILL)
        run.end()
    assert "committed" not in run.log.read_text()
    Run.start("harvest", spec).wait()
    assert_same_rows(open_store(url_of(spec)), local)


def test_the_keys_are_nowhere(whole: Path) -> None:
    """Neither in the store, nor in what was printed, nor in the logs that Ray's processes wrote."""
    secret = SECRET.encode()
    objects = objects_of(open_place(url_of(whole)))
    assert len(objects) > 50
    assert [name for name, content in objects.items() if secret in content] == []
    logs = [file for folder in (whole.parent, *ray_logs()) for file in folder.rglob("*") if file.is_file()]
    assert len(logs) > 10
    assert [str(file) for file in logs if secret in file.read_bytes()] == []


def ray_logs() -> list[Path]:
    """The folders of all Ray sessions of this machine: others may have begun since."""
    return list(Path("/tmp/ray").glob("session_2*/logs"))
