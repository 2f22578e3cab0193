"""What only shows once Ray is up: it is started once, in a process that takes one command after another."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start_harvest, write_corpus
from lab import SITES, TRAIN, Lab, check_message, snapshot
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]

SHELL = """
import contextlib, io, json, sys, traceback
import jobs.progress, ray
from jobs.cli.main import main
jobs.progress.LOG_INTERVAL_S = float("inf")  # a busy machine may take more than a minute
options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init(address="local", num_cpus=1, num_gpus=1, **options, _system_config={"worker_niceness": 0})
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(json.loads(line))
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""
"""Runs commands in a process where Ray is up: one start for all of them. It is told of a GPU that is not there."""

ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def granary() -> Iterator[Callable[..., tuple[Any, str, str]]]:
    """`granary(verb, spec)` gives exit status (or a traceback), stdout and stderr."""
    command, pipe = [sys.executable, "-c", SHELL], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        stdin, stdout = shell.stdin, shell.stdout

        def run(*words: str | Path) -> tuple[Any, str, str]:
            print(json.dumps([str(word) for word in words]), file=stdin, flush=True)
            status, out, err = json.loads(stdout.readline())
            return status, out, err

        yield run


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, "this worker runs on a GPU and torch finds none"),
        (2, "harvest.gpus_per_worker asks for 2 GPU(s) and this Ray cluster of one machine has 1; set it to 0 for CPU"),
    ],
)
def test_gpus_that_are_not_there_are_found_before_anything_is_written(
    lab: Lab, granary: Callable[..., Any], gpus: int, expected: str
) -> None:
    spec = lab.spec({"harvest.gpus_per_worker": gpus})
    before = snapshot(lab.folder)
    status, _, err = granary("harvest", spec)
    assert status == 1
    check_message(err)
    assert expected in err
    assert snapshot(lab.folder) == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_trainer_whose_gpu_torch_does_not_find(stored: Lab, granary: Callable[..., Any]) -> None:
    status, _, err = granary("train", stored.spec({"train": {**TRAIN, "gpus": 1}}))
    assert status == 1
    check_message(err)
    assert "this worker runs on a GPU and torch finds none" in err


def test_documents_that_are_left_out_are_counted(lab: Lab, texts: list[str], granary: Callable[..., Any]) -> None:
    raw: list[bytes | None] = [text.encode() for text in texts]
    raw[3], raw[5], raw[6], raw[7] = "\u00fcber".encode("latin-1"), b"", b" \n", None
    write_corpus(lab.folder / "corpus.parquet", raw)
    spec = lab.spec({"corpus.path": "corpus.parquet"})
    out = lab.run("plan", spec)
    assert "44 documents from 1 file(s)\n" in out
    left_out = [
        "3 documents left out: empty (first: corpus.parquet:5, corpus.parquet:6, corpus.parquet:7)\n",
        "1 document left out: undecodable (first: corpus.parquet:3)\n",
    ]
    assert "".join(f"           {line}" for line in left_out) in out
    assert json.loads(lab.run("plan", spec, "--json"))["left_out"] == {
        "empty": {"count": 3, "first": ["corpus.parquet:5", "corpus.parquet:6", "corpus.parquet:7"]},
        "undecodable": {"count": 1, "first": ["corpus.parquet:3"]},
    }
    assert not lab.store.exists()
    status, out, err = granary("harvest", spec)
    assert (status, err) == (0, "")
    assert "".join(f"  {line}" for line in left_out) in out
    out = lab.run("status", lab.store)
    assert "".join(f"documents {line}" for line in left_out) in out
    assert "4 units" in out
    assert "complete" in out


def test_weights_that_a_worker_cannot_use(lab: Lab, llama: Path, granary: Callable[..., Any]) -> None:
    """Planning reads no weights; the worker says which are nan, in one sentence."""
    folder = Path(shutil.copytree(llama, lab.folder / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, _, err = granary("harvest", lab.spec({"model.id": "model"}))
    assert status == 1
    check_message(err)
    assert err.startswith("granary: a harvester could not begin: model.id: the weights of ")
    assert "are nan or infinite in layers.1.mlp.up_proj.weight, and so would the activations be; download the" in err


def test_training_on_a_store_that_is_not_finished_begins_no_run(
    lab: Lab, llama: Path, corpus: Path, granary: Callable[..., Any]
) -> None:
    """A run that was begun has the name: other settings would then be refused, though nothing was ever trained."""
    start_harvest(lab.store, llama, corpus, SITES).run([0])
    spec = lab.spec({"train": TRAIN})
    before = snapshot(lab.folder)
    status, out, err = granary("train", spec)
    assert (status, out) == (1, "")
    check_message(err)
    assert "3 of the 4 units asked for are not harvested for resid_post.1: 1-3 " in err
    assert snapshot(lab.folder) == before


def test_a_cluster_that_does_not_answer(stored: Lab) -> None:
    """Ray itself tries for minutes. A port that is bound but not listened on refuses at once."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        spec = stored.spec({"train": TRAIN, "cluster.address": address})
        command = [sys.executable, "-m", "jobs.cli", "train", str(spec)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    check_message(done.stderr)
    assert f"cluster.address: no Ray cluster at '{address}'" in done.stderr


def test_rows_are_appended_when_that_is_asked_for(lab: Lab, texts: list[str], granary: Callable[..., Any]) -> None:
    """Through the commands, with workers: refused, appended, and then nothing is left to do."""
    write_corpus(lab.folder / "more.parquet", texts[::-1])
    assert granary("harvest", lab.spec({"corpus.rows": 2500}))[0] == 0
    more = {"corpus.path": [lab.base["corpus"]["path"], "more.parquet"]}
    status, _, err = granary("run", lab.spec(more))
    assert status == 1
    check_message(err)
    assert "`--grow` appends the rows of 1 more entry to the store" in err
    assert "would be appended by `granary harvest --grow`" in lab.run("plan", lab.spec(more))
    status, out, err = granary("harvest", lab.spec(more), "--grow")
    assert (status, err) == (0, "")
    appended = 2 * 3733 - 2500
    assert f"appended {appended:,} rows, now 7,466 rows of " in out
    assert f"harvested {7466 - 2048:,} rows of " in out
    assert "all 8 units of " in granary("harvest", lab.spec(more), "--grow")[1]
    out = lab.run("status", lab.store)
    assert "complete" in out
    assert "segment   3,733 rows of " in out
    assert "grown     from 2,500 rows" in out
    lab.run("verify", lab.store)
