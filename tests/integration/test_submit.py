"""Jobs on a real Ray cluster of one node: what a submitted spec stores equals what the same spec stores here, also when
the job was stopped on the way. The cluster wants a token, as Ray's own default is."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import write_corpus

from jobs.cli.main import main
from jobs.spec.spec import load_spec
from jobs.submit.addresses import ADDRESS_VARIABLE, CLUSTER_VARIABLE
from jobs.submit.submit import jobs_text
from storage.store import open_store

ROOT = Path(__file__).parents[2]
UNITS = 64
"""Enough of them that a job can be stopped between its first commit and its last."""
SECRET = "hf_s3cr3t-that-must-not-be-seen"
START_S = 90
"""A cluster, and a job's first commit, take about 10 s each on an idle machine."""

SHELL = """
import contextlib, io, json, sys
from jobs.cli.main import main
import jobs.run, jobs.submit.submit, ray.job_submission
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(json.loads(line))
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""
"""Runs commands as `granary` does, without importing torch for each: a stop must come within the seconds of a job."""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class ClusterOfOne:
    """A head node with two CPUs, and a process that may use it: Ray reads its environment once a process."""

    address: str
    own_address: str
    """Ray's, host:port, as RAY_ADDRESS is inside a job."""
    hub: Path
    """HF_HOME where jobs are submitted, and nowhere else."""
    environment: dict[str, str]
    """The environment of a process that may use the cluster."""
    shell: subprocess.Popen[str]

    def granary(self, *command: str | Path) -> Result:
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        print(json.dumps([str(word) for word in command]), file=self.shell.stdin, flush=True)
        return Result(*json.loads(self.shell.stdout.readline()))


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, but nothing of it that would lead Ray elsewhere. `python` is this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **settings}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(what: str, ready: Callable[[], bool], deadline_s: float = START_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {deadline_s} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterOfOne]:
    token = secrets.token_hex(32)
    gcs, dashboard, agent, client = free_ports(4)
    address = f"http://127.0.0.1:{dashboard}"
    allowed = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_API_SERVER_ADDRESS=address)
    folder = Path(tempfile.mkdtemp(prefix="granary-", dir="/tmp"))  # its sockets' paths must be shorter than 108 bytes
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        f"--ray-client-server-port={client}",
    ]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=allowed, cwd=folder, start_new_session=True)

    def answers() -> bool:
        assert head.poll() is None, (folder / "head.log").read_text()
        request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    try:
        wait_for("cluster", answers)
        pipe = subprocess.PIPE
        here = allowed | {"HF_HOME": str(folder / "hub"), "HF_TOKEN": SECRET}
        shell = subprocess.Popen([sys.executable, "-c", SHELL], cwd=ROOT, env=here, stdin=pipe, stdout=pipe, text=True)
        with shell:
            yield ClusterOfOne(address, f"127.0.0.1:{gcs}", folder / "hub", here, shell)
    finally:
        head.terminate()  # it ends all its children, which die with it in any case
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def write_spec(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], texts: list[str]
) -> Callable[[str], Path]:
    """`write_spec(name)` gives a spec whose store is called that; everything else is the same."""
    folder = tmp_path_factory.mktemp("submit")
    write_corpus(folder / "corpus.parquet", texts * 40)
    model = make_model("llama", num_hidden_layers=8)

    def write(name: str) -> Path:
        spec = {
            "store": name,
            "model": {"id": str(model), "dtype": "float32"},
            "corpus": {
                "path": "corpus.parquet",
                "labels": ["language"],
                "context": 64,
                "rows": UNITS * 1024,
                "rows_per_unit": 1024,
            },
            "harvest": {
                "sites": ["resid_post.{0,7}", "mlp_out.7"],
                "workers": 1,
                "threads_per_worker": 1,
                "batch_tokens": 128,
            },
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        return folder / f"{name}.yaml"

    return write


def stored(spec: Path) -> dict[str, bytes]:
    """Every file of the activations and norms, but for what a killed writer left behind under a hidden name."""
    store = Path(load_spec(spec).store)
    files = [path for kind in ("activations", "norms") for path in (store / kind).rglob("[!.]*") if path.is_file()]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def commits(spec: Path) -> set[str]:
    return {path.name for path in Path(load_spec(spec).store).glob("commits/*/0*/0*.json")}


@pytest.mark.slow
def test_a_job_that_is_stopped_and_submitted_again_stores_what_a_local_harvest_does(
    cluster: ClusterOfOne, write_spec: Callable[[str], Path]
) -> None:
    here, there = write_spec("here"), write_spec("there")
    command = [sys.executable, "-m", "jobs.cli", "harvest", str(here)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(RAY_AUTH_MODE="disabled")) as local:
        first = cluster.granary("submit", there, "--stage", "harvest", "--id", "first")
        assert (first.status, first.out) == (0, "submitted first; see it with: granary logs first\n")
        wait_for("commit of the job", lambda: bool(commits(there)))
        stopped = cluster.granary("stop", "first")
        assert (stopped.status, stopped.out[:13]) == (0, "stopped first")
        assert 0 < len(commits(there)) < UNITS
    assert local.returncode == 0

    second = cluster.granary("submit", there, "--stage", "harvest", "--follow")
    assert second.status == 0, second.out + second.err
    job = second.out.split()[1].rstrip(";")
    assert job.startswith("granary-there-")
    assert "harvested " in second.out
    assert len(commits(there)) == open_store(load_spec(there).store).info.num_units == UNITS
    assert stored(there).keys() == stored(here).keys()
    assert stored(there) == stored(here)
    assert len(stored(there)) > 6 * UNITS  # three sites, of each a chunk and its norms a unit

    found = json.loads(cluster.granary("jobs", "--json").out)
    assert [(j["id"], j["status"], j["stage"]) for j in found] == [
        ("first", "STOPPED", "harvest"),
        (job, "SUCCEEDED", "harvest"),
    ]
    assert {j["store"] for j in found} == {load_spec(there).store}
    assert all(j["started"] < j["ended"] for j in found)
    assert cluster.granary("jobs").out == jobs_text(found) + "\n"
    assert f"planned {UNITS * 1024:,} rows" in cluster.granary("logs", "first").out

    ended = cluster.granary("stop", "first")
    assert (ended.status, ended.out) == (0, "first had already ended: STOPPED\n")
    for refused_command, expected in {
        ("submit", there, "--id", "first"): "the job id first is taken",
        ("logs", "third"): "has no Granary job 'third'",
        ("logs", "third", "--follow"): "has no Granary job 'third'",
        ("stop", "a/b"): "has no Granary job 'a/b'",
    }.items():
        refused = cluster.granary(*refused_command)
        assert (refused.status, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert expected in refused.err


@pytest.mark.slow
def test_variables_that_are_named_reach_the_workers_and_their_values_nothing_else(
    cluster: ClusterOfOne, write_spec: Callable[[str], Path], make_model: Callable[..., Path]
) -> None:
    """A model by its name on the hub, in a cache that only HF_HOME of the submitting process names."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = cluster.hub / "hub" / "models--one--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(make_model("llama", num_hidden_layers=8), cache / "snapshots" / commit)
    spec = write_spec("named")
    raw = yaml.safe_load(spec.read_text())
    raw |= {"model": {"id": "one/tiny", "dtype": "float32"}, "cluster": {"env": ["HF_HOME"]}}
    raw["corpus"]["rows"] = 2048
    spec.write_text(yaml.safe_dump(raw))
    found = cluster.granary("submit", spec, "--stage", "harvest", "--id", "named", "--env", "HF_TOKEN", "--follow")
    assert found.status == 0, found.out + found.err
    assert open_store(load_spec(spec).store).info.num_rows == 2048
    told = [found.out, found.err, cluster.granary("logs", "named").out]
    told += [cluster.granary("jobs", *options).out for options in ((), ("--json",))]
    assert "named" in told[-1]
    assert SECRET not in "".join(told)
    files = [path for path in Path(load_spec(spec).store).rglob("*") if path.is_file()]
    assert files
    assert all(SECRET.encode() not in path.read_bytes() for path in files)
    refused = cluster.granary("submit", spec, "--env", "HF_TOKEN", "--env", "NOT_SET_HERE")
    assert (refused.status, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert "NOT_SET_HERE is not set in the environment here" in refused.err


JOIN = """
import os, sys, ray
from workers.cluster.connect import connected
with connected(sys.argv[1], env=["HF_TOKEN"]):
    print(ray.get(ray.remote(lambda: os.environ.get("HF_TOKEN")).remote()) == os.environ["HF_TOKEN"])
"""


@pytest.mark.slow
def test_variables_that_are_named_reach_a_cluster_that_is_joined(cluster: ClusterOfOne) -> None:
    command = [sys.executable, "-c", JOIN, cluster.own_address]
    result = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"
    assert SECRET not in result.stderr


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_cluster_may_be_named_in_several_ways(cluster: ClusterOfOne) -> None:
    """The dashboard without http://, and Ray's own address, which tells where the dashboard is."""
    expected = cluster.granary("jobs", "--json")
    for written in (cluster.address.removeprefix("http://"), cluster.own_address):
        assert cluster.granary("jobs", "--json", "--address", written) == expected
    assert expected.status == 0


def test_without_the_token_one_sentence_says_what_is_missing(
    cluster: ClusterOfOne, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "set RAY_AUTH_MODE=token" in refusal(capsys, "jobs", "--address", cluster.address)


def test_an_address_with_nothing_behind_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, write_spec: Callable[[str], Path]
) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv(CLUSTER_VARIABLE, "http://127.0.0.1:1")  # Ray would prefer it to the address that is given
    spec = str(write_spec("nowhere"))
    for command in (["submit", spec], ["jobs"], ["logs", "x"], ["logs", "x", "--follow"], ["stop", "x"]):
        assert f"no Ray cluster answers at {address}:" in refusal(capsys, *command, "--address", address)
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    assert f"no Ray cluster answers at {address}:" in refusal(capsys, "jobs")
    assert os.environ[ADDRESS_VARIABLE] == address
    monkeypatch.delenv(ADDRESS_VARIABLE)
    monkeypatch.setenv(CLUSTER_VARIABLE, address.removeprefix("http://"))
    assert f"no Ray cluster answers at {address}:" in refusal(capsys, "jobs")
    assert "not 'head:port'" in refusal(capsys, "jobs", "--address", "head:port")
    assert "not 'a/b'" in refusal(capsys, "submit", spec, "--id", "a/b")
