"""Running tests/gpu in a process of its own, on a machine that may lack what the other tests need, or pytest."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.worker import Outcome

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu", "tests/gpu"]
"""With a configuration of their own: the project's asks for plugins, and tests/conftest.py for all of the product."""
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
"""Those of other packages, which import them: zarr's brings zarr and, through it, storage. Nor options for them."""
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def run_tests(log: Path, seconds: float) -> Outcome:
    """Run tests/gpu for at most `seconds`; what pytest prints goes to `log`."""
    if find_spec("pytest") is None:
        return Outcome("not run", {}, "pytest is not installed here")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **NO_PLUGINS, "PYTHONPATH": paths}
    ended: int | None = None
    with log.open("w") as output, suppress(subprocess.TimeoutExpired):
        ended = subprocess.run(
            [sys.executable, *COMMAND], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            timeout=seconds, check=False,
        ).returncode  # fmt: skip
    return outcome_of(log.read_text(errors="replace"), ended, seconds)


def outcome_of(said: str, exit_status: int | None, seconds: float) -> Outcome:
    """Read pytest's words, with one line for each test. `exit_status`: None where it was stopped."""
    counts = {name.lower(): len(re.findall(rf"^\S+::.* {name}\b", said, re.MULTILINE)) for name in OUTCOMES}
    failed = re.findall(r"^(\S+::\S+.*) (?:FAILED|ERROR)\b", said, re.MULTILINE)
    figures: dict[str, Any] = {**counts, "failures": failed}
    end = said[-8000:]
    if exit_status is None:
        return Outcome("failed", figures, f"stopped after {seconds:.0f} s; the tests that ended are counted", end)
    if exit_status != 0:
        return Outcome("failed", figures, f"pytest ended with exit status {exit_status}", end)
    return Outcome("measured", figures)
