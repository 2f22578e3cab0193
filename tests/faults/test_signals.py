"""Signals to real commands: every stage ends with the signal's exit status and one sentence, and goes on afterwards.

Ray is up in one process that takes one command after another, as its start costs more than all that is tested. Where a
stage would be over before a signal comes, its work in Ray's workers is replaced by a function that says it has begun
and waits; what the driver does is the product's.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import harvest
from lab import Lab, snapshot
from safetensors.numpy import load

from storage.results.runs import open_run
from storage.store import Store, open_store
from workers.settings.experiment import TrainSettings
from workers.train import trainer as trainer_module
from workers.train.plan import plan_training
from workers.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
SITES = ["resid_post.1", "mlp_in.0"]
DEADLINE_S = 600
SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
STEPS = 10**6
"""More than any test has the time for."""
DICTIONARY = {"name": "sae", "input": SITES[0], "latents": 64, "activation": {"kind": "batch_topk", "k": 4}}
TRAIN = {"rows": 256 * STEPS, "batch_rows": 256, "checkpoint_every": 20, "threads": 1, "dictionaries": [DICTIONARY]}

SHELL = """
import contextlib, io, json, signal, sys, time, traceback
from pathlib import Path
from jobs.cli.main import main
from workers.cluster.connect import connected
import ray, workers.anchors.stage, workers.bench.cells, workers.plan.stage, workers.stages, workers.cluster.tasks

BEGUN = Path(sys.argv[1])

def wait_for_ever(*arguments, **options):
    BEGUN.touch()
    while True:
        time.sleep(0.1)

class DeafTrainer:
    def __init__(self, plan):
        self.asked = 0
    def train(self):
        while True:
            time.sleep(0.1)
    def progress(self):
        from workers.train.trainer import Progress
        self.asked += 1
        if self.asked > 1:  # the driver has heard the first answer
            BEGUN.touch()
        return Progress(0, 1, {})
    def stop(self):
        pass

def stream_for_ever(*arguments):
    yield wait_for_ever()

CHANGED = (workers.anchors.stage, workers.bench.cells, workers.plan.stage, workers.stages, workers.cluster.tasks)
calm = {module: dict(vars(module)) for module in CHANGED}
with connected("local", cpus=2):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "Ray's own handler ends the process with a dump"
    for line in sys.stdin:
        command, hold = json.loads(line)
        if hold:
            workers.anchors.stage.SMALL_BYTES = workers.plan.source.SMALL_BYTES = 0
            workers.cluster.tasks._single_threaded = wait_for_ever
            workers.cluster.tasks._single_threaded_stream = stream_for_ever
            workers.stages.evaluate_remotely = ray.remote(wait_for_ever)
            workers.stages.TrainerActor = ray.remote(max_restarts=0, max_concurrency=2)(DeafTrainer)
            workers.bench.cells._run = wait_for_ever
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                status = main(command)
            except BaseException:
                status = traceback.format_exc()
        for module, names in calm.items():
            vars(module).update(names)
        print(json.dumps([status, out.getvalue()]), flush=True)
"""


@dataclass
class Shell:
    """The process that takes commands. One is started, may be sent signals, and ends."""

    process: "subprocess.Popen[str]"
    begun: Path
    """A file that is there once the work has begun in a worker."""
    log: Path
    """What the commands print on stderr."""
    _read: int = 0

    def start(self, *command: str | Path, hold: bool = False) -> None:
        assert self.process.stdin is not None
        self.begun.unlink(missing_ok=True)
        self._read = len(self.log.read_text())
        print(json.dumps([[str(word) for word in command], hold]), file=self.process.stdin, flush=True)

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    @property
    def err(self) -> str:
        return self.log.read_text()[self._read :]

    def ended(self) -> tuple[Any, str, str]:
        """Exit status (or a traceback), stdout and stderr of the command."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        status, out = json.loads(line)
        return status, out, self.err

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("shell")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    log, pipe = folder / "log.txt", subprocess.PIPE
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", SHELL, str(folder / "begun")],
            cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=stderr, text=True, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield Shell(process, folder / "begun", log)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(DEADLINE_S)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> Store:
    """A store with a dictionary `short` that is trained. Not to be written to."""
    store = harvest(tmp_path_factory.mktemp("signals") / "store", llama, corpus, SITES, holdout=0.25)
    short = {**TRAIN, "rows": 2048, "dictionaries": [{**DICTIONARY, "name": "short"}]}
    Trainer(plan_training(store, TrainSettings.model_validate(short))).train()
    return store


@pytest.fixture
def spec(lab: Lab, made: Store) -> Path:
    shutil.copytree(made.path, lab.store)
    return lab.spec({"corpus.holdout": 0.25, "harvest.sites": SITES, "train": TRAIN})


def checkpoint_of(spec: Path) -> Path:
    return spec.parent / "store" / "runs" / "sae" / "checkpoint.safetensors"


def trained_to(step: int, train: dict[str, Any], store: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Train in this process, from the checkpoint if there is one, and stop at a step; return the checkpoint."""
    trainer = Trainer(plan_training(open_store(store), TrainSettings.model_validate(train)))
    one_step = trainer_module._Member.step

    def count(member: Any, *arguments: Any, **options: Any) -> None:
        one_step(member, *arguments, **options)
        if member.trainer.step_number == step:
            trainer.stop()

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module._Member, "step", count)
        assert trainer.train() == step
    found = open_run(open_store(store), "sae").read_checkpoint()
    assert found is not None
    return found


# ---- training


@pytest.mark.parametrize("signum", SIGNALS)
def test_training_writes_a_checkpoint_at_its_step(
    spec: Path, made: Store, shell: Shell, signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of a run which nothing stopped, and the run that goes on from it stays bit-identical."""
    shell.start("train", spec)
    shell.wait_for(lambda: checkpoint_of(spec).exists())
    shell.send(signum)
    status, _, err = shell.ended()
    assert status == 128 + signum, err
    asked, told = err.splitlines()
    assert asked.startswith(f"{signum.name}: training ends with a checkpoint of the step it is at, within 20 s (once ")
    step = int(load(checkpoint_of(spec).read_bytes())["step"])
    assert told == (
        f"granary: stopped by {signum.name}: training has a checkpoint of step {step:,} of {STEPS:,}, and the same "
        "command goes on from it"
    )
    curve = open_run(open_store(spec.parent / "store"), "sae").curve()
    assert curve[-1]["step"] < step
    shutil.copytree(made.path, tmp_path / "calm")
    assert trained_to(step, TRAIN, tmp_path / "calm", monkeypatch) == checkpoint_of(spec).read_bytes()
    further = [trained_to(step + 7, TRAIN, store, monkeypatch) for store in (tmp_path / "calm", spec.parent / "store")]
    shutil.rmtree(tmp_path / "calm" / "runs" / "sae")
    assert further == 2 * [trained_to(step + 7, TRAIN, tmp_path / "calm", monkeypatch)]


def test_a_second_signal_does_not_wait_for_the_checkpoint(lab: Lab, made: Store, shell: Shell) -> None:
    shutil.copytree(made.path, lab.store)
    changes = {"corpus.holdout": 0.25, "harvest.sites": SITES, "train": TRAIN, "cluster": {"grace_s": 10 * DEADLINE_S}}
    shell.start("train", lab.spec(changes), hold=True)
    shell.wait_for(shell.begun.exists)
    shell.send(signal.SIGTERM)
    shell.wait_for(lambda: "SIGTERM: training ends with a checkpoint" in shell.err)
    shell.send(signal.SIGINT)
    status, _, err = shell.ended()
    assert status == 143
    assert err.splitlines()[1:] == [
        "SIGINT: stopping at once",
        "granary: stopped by SIGTERM: training is cut off in the middle of a step; the same command goes on from the "
        "last checkpoint",
    ]


@pytest.mark.slow
def test_the_process_itself(spec: Path) -> None:
    """With a Ray of its own, and Ctrl-C as a terminal sends it: to the whole group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "train", str(spec)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not checkpoint_of(spec).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "granary: stopped by SIGINT: training has a checkpoint of step " in out
    assert "Traceback" not in out
    assert "***" not in out  # the head of a dump


# ---- stages that have nothing to save


def stopped(shell: Shell, signum: signal.Signals, doing: str, *command: str | Path) -> None:
    shell.start(*command, hold=True)
    shell.wait_for(shell.begun.exists)
    shell.send(signum)
    status, _, err = shell.ended()
    assert status == 128 + signum, err
    goes_on = "what is committed stays, and the same command goes on from there"
    assert err == f"granary: stopped by {signum.name} while {doing}; {goes_on}\n"


@pytest.mark.parametrize("verb", ["harvest", "plan"])
@pytest.mark.parametrize("signum", SIGNALS)
def test_planning(lab: Lab, shell: Shell, verb: str, signum: signal.Signals) -> None:
    spec = lab.spec()
    before = snapshot(lab.folder)
    stopped(shell, signum, "planning", verb, spec)
    assert snapshot(lab.folder) == before


@pytest.mark.parametrize("signum", SIGNALS)
def test_anchors(lab: Lab, made: Store, shell: Shell, signum: signal.Signals) -> None:
    shutil.copytree(made.path, lab.store)
    anchors = {"name": "few", "where": {"German": "language = 'de'"}, "min_rows": 10}
    spec = lab.spec({"corpus.holdout": 0.25, "harvest.sites": SITES, "anchors": anchors})
    before = snapshot(lab.folder)
    stopped(shell, signum, "making anchors", "anchors", spec)
    assert snapshot(lab.folder) == before
    shell.start("anchors", spec)
    status, out, _ = shell.ended()
    assert (status, out) == (0, "anchors: 1 means of conditions made (few)\n")


@pytest.mark.slow  # test_training_writes_a_checkpoint_at_its_step stops a stage in the same way
@pytest.mark.parametrize("signum", SIGNALS)
def test_evaluation(lab: Lab, made: Store, shell: Shell, signum: signal.Signals) -> None:
    shutil.copytree(made.path, lab.store)
    short = {**TRAIN, "rows": 2048, "dictionaries": [{**DICTIONARY, "name": "short"}]}
    spec = lab.spec({"corpus.holdout": 0.25, "harvest.sites": SITES, "train": short, "evaluate.contexts": 4})
    before = snapshot(lab.folder)
    stopped(shell, signum, "evaluating short", "evaluate", spec)
    assert snapshot(lab.folder) == before
    if signum == signal.SIGTERM:  # once is enough, as it takes a worker's start
        shell.start("evaluate", spec)
        status, out, err = shell.ended()
        assert status == 0, err
        assert out.startswith("evaluated short on ")


def test_the_bench(tmp_path: Path, shell: Shell) -> None:
    command = ["bench", "lrb", "--method", "topk", "--arm", "plain", "--seeds", "1", "--out", tmp_path / "bench"]
    stopped(shell, signal.SIGTERM, "running cells of the bench", *command)
    assert not list((tmp_path / "bench" / "cells").iterdir())


# ---- every step, without a process


def test_training_may_stop_at_any_step(made: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at each step in turn and gone on with, to the end: the same files as without a stop."""
    settings = {**TRAIN, "rows": 8 * 256, "checkpoint_every": 3}
    ended = []
    for stops in ((), range(1, 8), (1, 6), (3,)):
        store = open_store(shutil.copytree(made.path, tmp_path / f"store-{len(ended)}"))
        for step in stops:
            trained_to(step, settings, store.path, monkeypatch)
        assert Trainer(plan_training(store, TrainSettings.model_validate(settings))).train() == 8
        run = store.path / "runs" / "sae"
        ended.append({name: (run / name).read_bytes() for name in ("dictionary.safetensors", "dictionary.json")})
        assert [point["step"] for point in open_run(store, "sae").curve()] == list(range(8))
        assert not (run / "checkpoint.safetensors").exists()
    assert all(files == ended[0] for files in ended)
