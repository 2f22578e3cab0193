"""benchmarks/gpu.sh runs on a machine with torch and transformers alone, and accounts for all that it is asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.plan import STEPS, HarvestCase, full_plan, small_plan
from benchmarks.gpu.results import TESTS, Results
from benchmarks.gpu.suite import NO_PLUGINS, outcome_of
from benchmarks.gpu.worker import COMPILERS, Outcome, Worker

ROOT = Path(__file__).parents[3]
NOT_THERE = {"ray", "zarr", "pyarrow", "obstore", "duckdb", "storage", "workers", "jobs"}
"""What a machine with torch and transformers need not have."""


def run_script(*options: str, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "PYTHONWARNINGS": "default"}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # 30 s of computing, on a machine that others may use
def test_the_script_measures_all_of_it(tmp_path: Path) -> None:
    done = run_script("--small", "--seconds", "550", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["small"]
    assert found["machine"]["torch"]
    tests = found["measurements"].pop(TESTS)
    assert tests["status"] == "measured"
    assert tests["figures"]["passed"] + tests["figures"]["skipped"] >= 19
    assert list(found["measurements"]) == [measurement.case.name for measurement in small_plan()]
    left_out = {name: m["reason"] for name, m in found["measurements"].items() if m["status"] != "measured"}
    on_card = found["machine"]["card"] is not None
    has_compiler = any(map(shutil.which, COMPILERS))
    for name, reason in left_out.items():
        assert (not on_card and "pinned" in reason) or (not has_compiler and "compiler" in reason), name
    table = (tmp_path / "gpu.md").read_text()
    assert all(name in table for name in found["measurements"])
    for name, measurement in found["measurements"].items():
        if name.startswith("harvest") and name not in left_out:
            figures = measurement["figures"]
            assert all(rate > 0 for rate in figures["positions_per_s"].values())
            assert figures["harvest_of_forward"] > 0
            assert (figures["compile_s"] is not None) == measurement["case"]["compiled"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_of_the_rest_is_imported() -> None:
    """Every kind of case, and tests/gpu with their own settings, in one process."""
    code = """
import sys
import pytest
import torch
from benchmarks.gpu.plan import HarvestCase, small_plan
from benchmarks.gpu.worker import Measurer
import benchmarks.gpu.__main__
torch.set_num_threads(1)
measurer, kinds = Measurer(torch.device("cpu"), 0.001), set()
for measurement in small_plan():
    kind = type(measurement.case)
    if kind not in kinds and not getattr(measurement.case, "pinned", False):
        assert measurer.measure(measurement.case)
        kinds.add(kind)
assert len(kinds) == 3
assert pytest.main(["-q", "-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu", "tests/gpu"]) == 0
print("modules", *{name.partition(".")[0] for name in sys.modules})
"""
    environment = {**os.environ, **NO_PLUGINS}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert modules[0] == "modules"
    assert not NOT_THERE & set(modules)


def test_what_no_longer_fits_is_named(tmp_path: Path) -> None:
    done = run_script("--small", "--no-tests", "--seconds", "0", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["measurements"]
    assert len(found) == len(small_plan())
    assert {(m["status"], m["reason"]) for m in found.values()} == {("not run", "no time left")}
    assert "no time left" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_a_process_that_does_not_answer_costs_one_measurement() -> None:
    worker = Worker(1, 0.001)
    pageable, step = small_plan()[1].case, next(m.case for m in small_plan() if m.case.name.startswith("step"))
    try:
        assert worker.start() is None
        late = worker.measure(step, 0.0)
        assert (late.status, late.reason) == ("failed", "no answer within 0 s")
        assert worker.measure(pageable, 100.0).status == "measured"
    finally:
        worker.close()


def test_the_plan_has_what_a_card_is_asked_for() -> None:
    cases = [measurement.case for measurement in full_plan()]
    assert len({case.name for case in cases}) == len(cases)
    assert set(STEPS) <= set(cases)
    harvests = {
        (case.shape.name, case.sites, case.context, case.compiled) for case in cases if isinstance(case, HarvestCase)
    }
    everything = {
        (shape, sites, context, compiled)
        for shape in ("8B", "1B")
        for sites in (1, 4, None)
        for context in (256, 1024, 8192)
        for compiled in (False, True)
    }
    assert everything <= harvests


def test_results_are_there_after_each_measurement(tmp_path: Path) -> None:
    results = Results(tmp_path, {"date": "2026-01-01T00:00:00"})
    case = full_plan()[0].case
    results.add(case.name, case, Outcome("failed", {}, "out of memory: 3 GiB too little", "Traceback"))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["measurements"][case.name]["details"] == "Traceback"
    assert f"- {case.name}: failed: out of memory: 3 GiB too little" in (tmp_path / "gpu.md").read_text()


def test_tests_that_were_stopped_are_counted() -> None:
    said = "test_gpu.py::test_a[x] PASSED  [ 5%]\ntest_gpu.py::test_b FAILED [ 10%]\ntest_gpu.py::test_c "
    found = outcome_of(said, None, 110)
    assert found.status == "failed"
    assert found.reason.startswith("stopped after 110 s")
    assert found.figures == {"passed": 1, "failed": 1, "error": 0, "skipped": 0, "failures": ["test_gpu.py::test_b"]}
