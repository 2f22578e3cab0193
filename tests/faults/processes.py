"""Real runs of `granary harvest` that are disturbed: killed, stopped, and deprived of machines. Seeded.

The oracle of every case is the run that nothing disturbed: the same bytes, one commit a unit, `granary verify` clean.
Used by test_processes.py (a short sample) and by campaign.py (all of it: `make faults`).
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from disks import mounted

from storage.harvest.log import log_of
from storage.store import open_store

MODEL = Path(__file__).parents[2] / "jobs" / "demo" / "model"
ROWS, ROWS_PER_UNIT = 60_000, 2048
UNITS = -(-ROWS // ROWS_PER_UNIT)
DEADLINE_S = 600
HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
"""Arguments of a cluster's head node. Ray starts workers at niceness 15, where whatever else runs here starves them."""
QUICK = {"hang_s": 20}
"""Settings of the cluster section that make a hang known soon, but not where other processes want the CPU; nothing here
changes the bytes."""
KINDS = ("corpus", "activations", "norms", "moments")


def write_spec(folder: Path, corpus: Path, /, **sections: Any) -> Path:
    """A spec of two sites of the demo model, computed in bfloat16, where the bits would show any change of batches."""
    spec: dict[str, Any] = {
        "store": "store",
        "model": {"id": str(MODEL), "dtype": "bfloat16"},
        "corpus": {
            "path": str(corpus), "labels": ["kind"], "context": 128, "rows": ROWS, "rows_per_unit": ROWS_PER_UNIT,
        },
        "harvest": {"sites": ["resid_post.1", "mlp_in.3"], "workers": 2, "threads_per_worker": 1},
    }  # fmt: skip
    for section, values in sections.items():
        spec[section] = {**spec.get(section, {}), **values} if isinstance(values, dict) else values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@dataclass(frozen=True)
class Run:
    """A command in a session of its own, by which its Ray processes are found: their groups are their own."""

    process: "subprocess.Popen[str]"
    log: Path

    @classmethod
    def start(cls, *command: str | Path, environment: dict[str, str] | None = None) -> "Run":
        folder = Path(command[-1]).parent
        log = folder / f"log-{time.monotonic_ns()}.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *map(str, command)],
                stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        return cls(process, log)

    def wait(self) -> str:
        """Wait for the end, which must be a success; return what was printed."""
        assert self.process.wait(DEADLINE_S) == 0, self.log.read_text()
        return self.log.read_text()

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def harvesters(self) -> list[psutil.Process]:
        """The processes of the harvester actors."""
        return [p for p in self.group() if _name(p).startswith("ray::Harvester")]

    def group(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
            except ProcessLookupError:
                continue
        return found

    def end(self) -> None:
        """SIGKILL whatever is left of the session."""
        for process in self.group():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(DEADLINE_S)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def until(condition: Callable[[], object], run: Run | None = None) -> bool:
    """Wait for a condition; return whether it came true before the run was over."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if run is not None and run.is_over:
            return False
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)
    return True


# ---- what is done to a run; each yields whenever it was done, so that it can be counted though the run fails later


def kill_harvesters(spec: Path, seed: int, times: int) -> Iterator[None]:
    """SIGKILL a random harvester at random moments, the loading of the model included."""
    rng, run, killed = random.Random(seed), Run.start("harvest", spec), 0
    try:
        while killed < times and until(run.harvesters, run):
            time.sleep(rng.uniform(0, 2.0))
            if alive := run.harvesters():
                rng.choice(alive).kill()
                killed += 1
                yield
        run.wait()
    finally:
        run.end()


def kill_driver(spec: Path, seed: int, times: int) -> Iterator[None]:
    """SIGKILL the driver at random moments and start it again at once: its harvesters may still be at work."""
    rng, killed = random.Random(seed), 0
    runs = [Run.start("harvest", spec)]
    try:
        while killed < times:
            time.sleep(rng.uniform(0, 12.0))
            if runs[-1].is_over:
                break
            runs[-1].process.kill()
            killed += 1
            yield
            runs.append(Run.start("harvest", spec))
        runs[-1].wait()
    finally:
        for run in runs:
            run.end()


def stop_and_continue(spec: Path, seed: int, times: int) -> Iterator[None]:
    """SIGSTOP a random harvester, which hangs, and SIGCONT it later, if it is still there: a zombie."""
    rng, run, stopped = random.Random(seed), Run.start("harvest", spec), 0
    asleep: list[tuple[float, psutil.Process]] = []
    try:
        started = time.monotonic()
        while not run.is_over:
            now = time.monotonic()
            for wake, process in [item for item in asleep if item[0] <= now]:
                asleep.remove((wake, process))
                if process.is_running():
                    process.resume()
            alive = [p for p in run.harvesters() if p.status() != psutil.STATUS_STOPPED]
            if stopped < times and alive and len(list(commits(spec))) > 1 and not asleep:
                victim = rng.choice(alive)
                victim.suspend()
                stopped += 1
                asleep.append((now + rng.uniform(0, 25), victim))
                yield
            assert now - started < DEADLINE_S, run.log.read_text()
            time.sleep(rng.uniform(0.02, 0.5))
        run.wait()
    finally:
        for _, process in asleep:
            if process.is_running():
                process.resume()
        run.end()


def lose_nodes(spec_of: Callable[[str], Path], seed: int, times: int) -> Iterator[None]:
    """Take whole Ray nodes away from a running harvest, ungracefully, and give new ones."""
    from ray.cluster_utils import Cluster

    rng, lost = random.Random(seed), 0
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    spec = spec_of(cluster.address)
    run = Run.start("harvest", spec)
    try:
        until(lambda: len(list(commits(spec))) > 1, run)
        while lost < times and not run.is_over:
            time.sleep(rng.uniform(0, 3))
            cluster.remove_node(nodes.pop(rng.randrange(len(nodes))), allow_graceful=False)
            lost += 1
            yield
            nodes.append(cluster.add_node(num_cpus=1))
        run.wait()
    finally:
        run.end()
        cluster.shutdown()


def fill_disk(spec: Path, seed: int, times: int) -> Iterator[None]:
    """Fill the store's disk, which is a small one of its own, until the run has ended; make room and start it again.
    The store lies beside the spec afterwards. Raises CannotMount."""
    rng, filled = random.Random(seed), 0
    with mounted(spec.parent / "disk", "256m") as disk:
        store = disk.path / "store"
        spec.write_text(yaml.safe_dump({**yaml.safe_load(spec.read_text()), "store": str(store)}))
        runs = [Run.start("harvest", spec)]
        try:
            while filled < times:
                enough = len(_commits(store)) + rng.randint(1, 5)
                if not until(lambda enough=enough: len(_commits(store)) >= enough, runs[-1]):
                    break
                disk.fill(leave=rng.randrange(300_000))
                if runs[-1].process.wait(DEADLINE_S) == 0:
                    break  # it had written all it needed
                log = runs[-1].log.read_text()
                assert "No space left on device; committed units are safe, start again when there is room" in log, log
                filled += 1
                yield
                disk.empty()
                runs.append(Run.start("harvest", spec))
            runs[-1].wait()
        finally:
            for run in runs:
                run.end()
        shutil.copytree(store, spec.parent / "store")


# ---- the oracle


def commits(spec: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in _commits(spec.parent / "store")]


def _commits(store: Path) -> list[Path]:
    return list((store / "commits").rglob("0*.json"))


def rows_of(store: Path) -> dict[str, str]:
    """Digest of every file that holds rows."""
    files = [f for kind in KINDS for f in (store / kind).rglob("*") if f.is_file() and f.name != "zarr.json"]
    return {str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def check_same(store: Path, undisturbed: Path) -> None:
    """Raise AssertionError unless a store has the bytes of the undisturbed one, each unit committed once, all sound."""
    mine, theirs = rows_of(store), rows_of(undisturbed)
    assert mine == theirs, sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))[:10]
    opened = open_store(store)
    (harvest,) = opened.harvests
    assert sorted(log_of(opened, harvest).committed()) == list(range(UNITS))
    units = [json.loads(p.read_text())["unit"] for p in (store / "commits" / harvest.digest).rglob("0*.json")]
    assert sorted(units) == list(range(UNITS))
    verified = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "verify", str(store)], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
