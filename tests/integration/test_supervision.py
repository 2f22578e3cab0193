"""Harvesters that hang, units that fail, drivers that are told to stop or are not alone, clusters that grow. Real
processes, real signals; the oracle is the run that nothing disturbed."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import sentence
from conftest import write_corpus as write_texts
from harvests import DEADLINE_S, UNITS, assert_same, commits, granary, rows_of, start, wait_for, write_spec
from processes import HEAD
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from storage.harvest.log import HarvestLog, log_of
from storage.store import open_store

pytestmark = pytest.mark.slow  # real harvests that are disturbed, half a minute each

SLOW_UNITS = 40


def spec_with(folder: Path, library: Path, sections: dict[str, dict[str, Any]] | None = None, **harvest: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = write_spec(folder, library, **harvest)
    spec = yaml.safe_load(path.read_text())
    for section, values in (sections or {}).items():
        spec[section] = {**spec.get(section, {}), **values}
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[str, dict[str, Any]]:
    """Sections that make a harvest last: 40 units of about a second each, so that things can happen meanwhile."""
    model = make_model(hidden_size=384, intermediate_size=1024, num_hidden_layers=9, head_dim=96)
    return {
        "model": {"id": str(model), "dtype": "float32"},
        "corpus": {"rows": SLOW_UNITS * 1024, "rows_per_unit": 1024},
        "harvest": {"sites": ["resid_post.8"]},
    }


@pytest.fixture(scope="module")
def slow_undisturbed(tmp_path_factory: pytest.TempPathFactory, library: Path, slow: dict[str, dict[str, Any]]) -> Path:
    spec = spec_with(tmp_path_factory.mktemp("slow"), library, slow, workers=2)
    granary("harvest", spec)
    return spec.parent / "store"


def plan(spec: Path) -> None:
    """Plan the store of a spec and harvest nothing."""
    content = yaml.safe_load(spec.read_text())
    planning = spec.with_name("plan.yaml")
    planning.write_text(yaml.safe_dump({**content, "cluster": {"address": "127.0.0.1:1"}}))
    assert "no Ray cluster at" in ended(start("harvest", planning), 1)


def writers(store: Path) -> set[str]:
    return {commit["writer"] for commit in commits(store)}


def pid_of(writer: str) -> int:
    return int(writer.rsplit("-", 2)[1])


def drivers(store: Path) -> list[Path]:
    return list(store.glob("commits/*/drivers/*.json"))


def ended(process: "subprocess.Popen[str]", status: int) -> str:
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status, out
    return out


def test_units_of_a_stopped_worker_go_to_others_and_it_comes_back_as_a_zombie(
    tmp_path: Path, library: Path, undisturbed: Path
) -> None:
    spec = spec_with(tmp_path, library, {"cluster": {"hang_s": 15}})  # a busy machine may be silent for seconds
    store = tmp_path / "store"
    process = start("harvest", spec)
    wait_for(lambda: len(list(commits(store))) >= 3, process)
    (victim,) = writers(store)
    os.kill(pid_of(victim), signal.SIGSTOP)
    before = len(list(commits(store)))
    wait_for(lambda: len(list(commits(store))) > before + 2, process)  # another has taken over
    with suppress(ProcessLookupError):  # it was killed, although it could not hear that it should go
        os.kill(pid_of(victim), signal.SIGCONT)
    out = ended(process, 0)
    assert f"a harvester hangs ({victim} has not answered for " in out
    assert "is replaced; its units go to others" in out
    assert len(writers(store)) == 2
    assert not drivers(store)
    assert_same(store, undisturbed)


def test_a_unit_that_fails_is_set_aside_and_named_and_the_rest_goes_on(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """One text has a token whose activations are more than float16 holds."""
    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    rare = AutoTokenizer.from_pretrained(model).encode("\u2602", add_special_tokens=False)[1]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][rare] *= 1e7
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rng = random.Random(0)
    texts = [sentence(rng, 60) + (" \u2602" if number == 40 else "") for number in range(80)]
    corpus = write_texts(tmp_path / "corpus.parquet", texts)
    sections = {
        "model": {"id": str(model), "dtype": "float32"},
        "corpus": {"path": str(corpus), "labels": ["language"], "rows": None, "rows_per_unit": 1024},
        "harvest": {"sites": ["resid_post.1"], "dtype": "float16"},
    }
    spec, store = spec_with(tmp_path, corpus, sections), tmp_path / "store"
    out = ended(start("harvest", spec), 1)
    (harvest,), root = open_store(store).harvests, open_store(store).root
    units = open_store(store).info.units
    (bad,) = HarvestLog(root, harvest.digest, units).failed()
    assert out.count(f"unit {bad} failed (NotFinite: resid_post.1: row ") == 3
    assert f"unit {bad} is set aside after 3 attempts; the last: NotFinite: resid_post.1: row " in out
    assert f"granary: 1 units were set aside and the rest is harvested: {bad}; unit {bad} failed with" in out
    assert HarvestLog(root, harvest.digest, units).committed() == frozenset(range(units.total)) - {bad}
    failure = HarvestLog(root, harvest.digest, units).failure(bad)
    assert len(failure.errors) == len(failure.writers) == 3
    assert "torch" in failure.made_with


def test_sigterm_then_a_damaged_table_then_the_rest(tmp_path: Path, library: Path, undisturbed: Path) -> None:
    """SIGTERM lets units in flight finish. Where every unit fails it is not the units, and the run ends. What was set
    aside is tried again, and forgotten once it is committed."""
    spec, store = write_spec(tmp_path, library), tmp_path / "store"
    process = start("harvest", spec)
    wait_for(lambda: len(list(commits(store))) >= 2, process)
    process.terminate()
    out = ended(process, 143)
    assert "SIGTERM: no more units are handed out; those in flight have 20 s (once more: at once)\n" in out
    done = len(list(commits(store)))
    assert f"granary: stopped by SIGTERM: {done} units were finished in this run, 0 in flight are abandoned; " in out
    assert done < UNITS - 5
    assert not drivers(store)
    assert not list(store.rglob("*.tmp"))

    chunk = store / "corpus" / "position" / "c" / "0"
    sound = chunk.read_bytes()
    chunk.write_bytes(sound[:1000] + b"?" + sound[1001:])
    out = ended(start("harvest", spec), 1)
    assert out.count("a harvester failed at 2 units one after the other and is replaced (") == 3
    assert (
        "granary: 3 harvesters one after the other failed at every unit they began and none was finished, so it is not "
        "the units; the last: CorruptChunk: chunk 0 of " in out
    )
    opened = open_store(store)
    (harvest,), root, units = opened.harvests, opened.root, opened.info.units
    assert HarvestLog(root, harvest.digest, units).failed() == []
    assert len(list(commits(store))) == done

    chunk.write_bytes(sound)
    granary("harvest", spec)
    assert HarvestLog(root, harvest.digest, units).failed() == []
    assert_same(store, undisturbed)


def test_workers_that_ray_kills_for_memory(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    out = ended(start("harvest", write_spec(tmp_path, library)), 1)
    assert "Traceback" not in out
    assert "a harvester died and is replaced; its units go to another (" in out
    assert "harvesters died one after the other before they held the model (out of memory?)" in out


def test_a_second_signal_does_not_wait(tmp_path: Path, library: Path) -> None:
    spec, store = spec_with(tmp_path, library, {"cluster": {"grace_s": 100}}), tmp_path / "store"
    process = start("harvest", spec)
    wait_for(lambda: len(list(commits(store))) >= 1, process)
    (worker,) = writers(store)
    os.kill(pid_of(worker), signal.SIGSTOP)  # its units will not finish
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "granary: stopped by SIGINT: " in ended(process, 130)
    assert time.monotonic() - asked < 30


def test_two_drivers_at_once_share_the_units(
    tmp_path: Path, library: Path, slow: dict[str, dict[str, Any]], slow_undisturbed: Path
) -> None:
    spec, store = spec_with(tmp_path, library, slow), tmp_path / "store"
    plan(spec)
    processes = [start("harvest", spec), start("harvest", spec)]
    outs = [ended(process, 0) for process in processes]
    for out in outs:
        assert "another driver is at work on this harvest (" in out
        assert "; others committed " in out
    done = [int(line.split()[1].replace(",", "")) for out in outs for line in out.splitlines() if "harvested" in line]
    rows = SLOW_UNITS * 1024
    assert len(done) == len(writers(store)) == 2
    assert min(done) > rows // 10
    assert sum(done) == rows  # what both computed counts for the one whose commit was first
    assert sorted(commit["unit"] for commit in commits(store)) == list(range(SLOW_UNITS))
    assert not drivers(store)
    (harvest,) = open_store(store).harvests
    opened = open_store(store)
    assert log_of(opened, harvest).bitmap().is_full
    assert rows_of(store) == rows_of(slow_undisturbed)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes, of which one has no room, in this process's children."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=HEAD)
    yield made
    made.shutdown()


def worker_elsewhere(store: Path, node: Any) -> psutil.Process:
    """The living worker that is not one of the node's processes."""
    of_node = {p.pid for p in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)}
    (found,) = (pid for pid in map(pid_of, writers(store)) if psutil.pid_exists(pid) and pid not in of_node)
    return psutil.Process(found)


def test_workers_come_and_go_with_the_nodes(
    tmp_path: Path, library: Path, slow: dict[str, dict[str, Any]], slow_undisturbed: Path, cluster: Any
) -> None:
    """It begins without room, grows as nodes come, loses a worker that is told to go, and a node with its worker. The
    worker that is left stands still until the lost one's place is taken, or it might be done before anyone notices."""
    sections = {**slow, "cluster": {"address": cluster.address}}
    spec, store = spec_with(tmp_path, library, sections, workers="auto"), tmp_path / "store"
    process = start("harvest", spec)
    wait_for(lambda: len(drivers(store)) == 1, process)
    assert not writers(store)
    first = cluster.add_node(num_cpus=1)
    wait_for(lambda: len(writers(store)) == 1, process)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: len(writers(store)) == 2, process)
    gone = next(commits(store))["writer"]
    other = psutil.Process(pid_of((writers(store) - {gone}).pop()))
    other.suspend()
    os.kill(pid_of(gone), signal.SIGTERM)
    wait_for(lambda: len(writers(store)) == 3, process)
    other.resume()
    left = worker_elsewhere(store, first)
    left.suspend()
    cluster.remove_node(first, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: len(writers(store)) == 4, process)
    left.resume()
    out = ended(process, 0)
    died = [line for line in out.splitlines() if "a harvester died and is replaced; its units go to another (" in line]
    assert len(died) >= 2
    assert "SIGTERM" in died[0]
    assert rows_of(store) == rows_of(slow_undisturbed)


def test_too_few_workers_for_long_end_the_run(
    tmp_path: Path, library: Path, slow: dict[str, dict[str, Any]], cluster: Any
) -> None:
    cluster.add_node(num_cpus=1)
    sections = {**slow, "cluster": {"address": cluster.address, "wait_s": 1}}
    spec = spec_with(tmp_path, library, sections, workers="2-4")
    out = ended(start("harvest", spec), 1)
    # None, where the one worker was not up within that second.
    assert re.search(r"granary: for 1 s the cluster had room for [01] workers of ", out)
    assert "harvest.workers asks for at least 2; what is committed stays" in out
