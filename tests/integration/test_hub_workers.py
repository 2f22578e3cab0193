"""A harvest of a model on the hub by real workers, whose branch moves while they start. Offline."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import harvest
from harvests import DEADLINE_S, commits, granary, start, wait_for, write_spec
from hub import FakeHub

from storage.store import open_store

pytestmark = pytest.mark.slow  # real harvests, some twenty seconds each

SITE = "resid_post.1"


def spec_of(folder: Path, corpus: Path) -> Path:
    path = write_spec(folder, corpus, workers=3)
    spec = yaml.safe_load(path.read_text())
    spec["model"] = {"id": "a/tiny", "dtype": "float32"}
    spec["corpus"] = {"path": str(corpus), "labels": ["language", "year"], "context": 64, "rows_per_unit": 1024}
    spec["harvest"]["sites"] = [SITE]
    path.write_text(yaml.safe_dump(spec))
    return path


def test_three_workers_load_the_commit_that_the_driver_found(
    hub: FakeHub, make_model: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    commit = hub.add("a/tiny", make_model(seed=0))
    spec, store = spec_of(tmp_path, corpus), tmp_path / "store"
    process = start("harvest", spec)
    wait_for((store / "zarr.json").exists, process)  # it is planned; workers are still to come
    now = hub.add("a/tiny", make_model(seed=1))
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out
    found = open_store(store)
    assert found.harvests[0].made_with["revision"] == commit != now
    assert len(list(commits(store))) == found.info.num_units
    alone = harvest(tmp_path / "alone", make_model(seed=0), corpus, [SITE], holdout=0.05)
    assert (found.read(SITE) == alone.read(SITE)).all()
    # The same spec now means another model: said, and nothing is done.
    again = start("harvest", spec)
    out, _ = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 1
    assert f"main of a/tiny is the commit {now} now" in out
    assert commit in out
    content = yaml.safe_load(spec.read_text())
    spec.write_text(yaml.safe_dump({**content, "model": {**content["model"], "revision": now}}))
    granary("harvest", spec)
    both = open_store(store)
    assert [h.made_with["revision"] for h in both.harvests] == [commit, now]
    assert (both.read(f"{both.harvests[0].model}/{SITE}") == alone.read(SITE)).all()
    assert (both.read(f"{both.harvests[1].model}/{SITE}") != alone.read(SITE)).any()
