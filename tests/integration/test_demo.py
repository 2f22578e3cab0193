"""`granary demo`, from nothing to the report, and what must be true of it. One run; the tests look at it.

It trains on a third of the rows that people's runs take, in one thread: other tests run beside it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import granary
from jobs.demo.demo import HERE

DEADLINE_S = 1200
OWN_RUNS = ("calm", "killed")
pytestmark = pytest.mark.slow


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "granary-demo"
    folder.mkdir()
    spec = yaml.safe_load((HERE / "demo.yaml").read_text())
    spec["train"] |= {"rows": 1_000_000, "threads": 1}
    spec["harvest"]["threads_per_worker"] = 1
    (folder / "demo.yaml").write_text(yaml.safe_dump(spec))
    out = run("demo", "--folder", str(folder))
    assert "report.html" in out
    return folder


def evaluation(demo: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((demo / "store" / "runs" / name / "evaluation.json").read_text())
    return record


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob("*") if f.is_file()}


@pytest.mark.timeout(DEADLINE_S)
@pytest.mark.parametrize("name", ["anchored", "control"])
def test_the_dictionary_learned_something(demo: Path, name: str) -> None:
    found = evaluation(demo, name)
    assert found["rows"] > 50_000
    assert found["fvu"] < 0.25
    assert found["l0"] == pytest.approx(32, abs=0.5)
    assert found["loss"]["recovered_against_zero"] >= 0.9
    assert found["loss"]["recovered_against_mean"] >= 0.9


def test_anchored_latents_stay_at_their_anchors(demo: Path) -> None:
    groups = evaluation(demo, "anchored")["subpopulations"]
    assert {g["label"] for g in groups} == {"kind", "package"}
    assert min(g["anchor_cosine"] for g in groups) >= 0.9
    assert all(g["rows"] for g in groups)  # each value has held-out rows
    assert all(0 <= g["anchored_auroc"] <= g["best_auroc"] <= 1 for g in groups)
    control = evaluation(demo, "control")["subpopulations"]
    assert [(g["label"], g["value"], g["rows"]) for g in control] == [
        (g["label"], g["value"], g["rows"]) for g in groups
    ]


def test_the_evaluation_is_of_documents_that_were_not_trained_on(demo: Path) -> None:
    store = granary.open_store(demo / "store")
    found = evaluation(demo, "anchored")
    assert found["row_start"] >= store.info.held_out_start
    first = store.documents.column("row_start").to_numpy()
    assert found["row_start"] in first


def test_the_reported_fvu_is_what_the_saved_dictionary_does(demo: Path) -> None:
    store, found = granary.open_store(demo / "store"), evaluation(demo, "anchored")
    dictionary = granary.load_dictionary(demo / "store" / "runs" / "anchored")
    import torch

    x = torch.from_numpy(store.read("resid_post.2", slice(found["row_start"], found["row_stop"])).astype(np.float32))
    y = dictionary.decode(dictionary.encode(x)).double()
    x = x.double()
    fvu = ((x - y).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert fvu == pytest.approx(found["fvu"], rel=1e-4)


def test_a_second_run_does_nothing_and_says_so(demo: Path) -> None:
    before = snapshot(demo / "store")
    started = time.monotonic()
    out = run("run", str(demo / "demo.yaml"))
    assert "nothing to do: every stage of the spec is finished" in out
    assert snapshot(demo / "store") == before
    assert time.monotonic() - started < 60  # no model, no Ray


def test_query_and_status(demo: Path, tmp_path: Path) -> None:
    store = str(demo / "store")
    status = json.loads(run("status", store, "--json"))
    # The test that kills a training adds runs of its own.
    assert [r["run"] for r in status["runs"] if r["run"] not in OWN_RUNS] == ["anchored", "control"]
    lines = run(
        "query", store, "select kind, count(*) as n from documents group by 1 order by 1", "--json"
    ).splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["code", "comment", "docs", "docstring"]
    out = tmp_path / "x.npy"
    sql = "select row from rows join documents using (document) where kind = 'docs' order by row limit 50"
    run("query", store, sql, "--site", "mlp_out.2", "--out", str(out))
    rows = [json.loads(line)["row"] for line in run("query", store, sql, "--json").splitlines()]
    np.testing.assert_array_equal(np.load(out), granary.open_store(store).read("mlp_out.2", rows).astype(np.float32))


def test_training_killed_and_started_again_ends_with_the_same_weights(demo: Path) -> None:
    """SIGKILL of the driver (and with it of the trainer) after a checkpoint; a run with no kill is the oracle."""
    spec = yaml.safe_load((demo / "demo.yaml").read_text())
    train = {"rows": 819_200, "batch_rows": 4096, "checkpoint_every": 20, "threads": 1}
    paths = {}
    for name in OWN_RUNS:
        only = {"name": name, "input": "mlp_in.2", "output": "mlp_out.2", "latents": 512, "anchors": "subpopulations"}
        paths[name] = demo / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump({**spec, "train": {**train, "dictionaries": [only]}}))
    run("train", str(paths["calm"]))
    folder = demo / "store" / "runs" / "killed"
    command = [sys.executable, "-m", "jobs.cli", "train", str(paths["killed"])]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not (folder / "checkpoint.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "dictionary.json").exists()
    run("train", str(paths["killed"]))
    calm = demo / "store" / "runs" / "calm"
    assert (folder / "dictionary.safetensors").read_bytes() == (calm / "dictionary.safetensors").read_bytes()
    steps = [[p["step"] for p in json.loads((f / "curve.json").read_text())["points"]] for f in (folder, calm)]
    assert steps[0] == steps[1]
    assert not (folder / "checkpoint.safetensors").exists()
