"""Anchors over many rows as Ray tasks: the same bytes as in one process, and refusals in a sentence."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_store
from lab import Lab, snapshot

from storage.results.anchors import anchor_names
from storage.store import Store
from workers.anchors import stage as anchoring
from workers.anchors.stage import make_anchors
from workers.cluster.connect import connected
from workers.cluster.tasks import OnRay
from workers.settings.anchors import AnchorSettings

SITES = ("resid_post.0", "mlp_out.0")


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with connected("local", cpus=2):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("tasks") / "store"
    return write_store(path, num_rows=3000, held_out_start=2976)


@pytest.mark.slow  # test_the_command makes anchors on Ray too
def test_tasks_write_the_same_bytes(store: Store, tmp_path: Path, ray: None) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((3, 5)))
    top = {"directions": str(tmp_path / "v.npy"), "site": SITES[0]}
    sets = [
        {"name": "where", "where": {"de": "language = 'de'", "few": "token < 9"}, "min_rows": 1},
        {"name": "rows", "top": {**top, "rows": 200}},
        {"name": "contexts", "top": {**top, "contexts": 11}},
    ]
    written = []
    for tasks, calls in ((None, 1), (OnRay("making anchors"), 3)):
        for one in sets:
            make_anchors(store, AnchorSettings.model_validate(one), SITES, tasks, calls)
        written.append(snapshot(store.path / "anchors"))
        for name in anchor_names(store):
            (store.path / "anchors" / name / "anchors.json").unlink()
    assert written[0] == written[1]


def test_the_command(stored: Lab, monkeypatch: pytest.MonkeyPatch, ray: None) -> None:
    """Several sets of one spec, on Ray; made once; refused in a line where a task finds what is wrong."""
    monkeypatch.setattr(anchoring, "SMALL_BYTES", 0)
    np.save(stored.folder / "given.npy", np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32))
    sets = [
        {"name": "languages", "by": "language", "min_rows": 10},
        {"name": "early", "where": {"early": "position < 5 and language = 'de'", "even": "year = 1980"}, "min_rows": 9},
        {"name": "strong", "top": {"directions": "early", "site": "mlp_in.0", "contexts": 4}},
        {"name": "given", "vectors": "given.npy", "names": ["north", "south"]},
    ]
    spec = stored.spec({"anchors": sets})
    assert stored.run("anchors", spec).splitlines() == [
        "anchors: 3 means by language made (languages)",
        "anchors: 2 means of conditions made (early)",
        "anchors: 2 means of top contexts made (strong)",
        "anchors: 2 given vectors made (given)",
    ]
    before = snapshot(stored.store)
    assert "made" not in stored.run("anchors", spec)
    assert snapshot(stored.store) == before
    assert "anchors   strong: 2 directions" in stored.run("status", stored.store)
    stored.run("report", stored.store)
    assert stored.run("verify", stored.store)
    failing = {"name": "failing", "where": {"a": "case when row > 2000 then language::int end = 3"}}
    err = stored.refused("anchors", stored.spec({"anchors": failing}))
    assert "cannot be asked of the rows: Conversion Error" in err
    few = {"name": "few", "where": {"a": "row < 3"}}
    assert "a has 3; a subpopulation has at least 1,000" in stored.refused("anchors", stored.spec({"anchors": few}))
    absent = {"name": "absent", "vectors": "absent.npy"}
    assert "no file " in stored.refused("run", stored.spec({"anchors": absent, "store": "new"}))
