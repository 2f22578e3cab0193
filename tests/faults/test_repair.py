"""`granary verify --repair` and `--audit`: what can be made again is, to the byte; what is false though consistent is
found by running the model again; the rest is refused and left as it is."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start_harvest, write_store
from lab import SITE, Lab, snapshot
from torch import nn
from whole import SITES

from jobs.cli.main import main
from pipeline.capture.rounding import Rounded
from pipeline.model.describe import ModelInfo
from pipeline.model.load import load_base_model
from pipeline.model.placement import Offload, Placement
from storage.backends.place import Place
from storage.format.records import decode, encode, read_record
from storage.harvest.identity import Computation, HarvestIdentity
from storage.harvest.log import log_of
from storage.harvest.write_unit import UnitBlock, rewrite_unit
from storage.store import Store, open_store
from workers.check.recompute import placement_for
from workers.harvest.harvester import read_groups, unit_block
from workers.tensors import to_torch

INFORMATIVE = ("writer", "started_at", "seconds", "committed_at")
"""Fields of a commit that say who computed it and when."""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def contents(store: Path) -> dict[str, Any]:
    """Every file's content; of commits only what is determined."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        name = str(path.relative_to(store))
        found[name] = path.read_bytes()
        if name.startswith("commits/") and name.split("/")[2].isdecimal():
            found[name] = {k: v for k, v in decode(found[name]).items() if k not in INFORMATIVE}
    return found


@pytest.fixture
def mended(lab: Lab, whole: Store) -> Lab:
    """A store with everything in it, to be damaged."""
    shutil.copytree(whole.path, lab.store)
    return lab


def verify(lab: Lab, *options: str | Path) -> tuple[int, dict[str, Any]]:
    lab.capsys.readouterr()
    status = main(["verify", str(lab.store), "--json", *map(str, options)])
    return status, json.loads(lab.capsys.readouterr().out)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_repair_gives_back_every_byte(mended: Lab, damage: Callable[[Path], None]) -> None:
    before = contents(mended.store)
    store = open_store(mended.store)
    first, second, _ = (harvest.digest for harvest in store.harvests)
    model = store.harvests[0].model
    names = [
        f"activations/{model}/{SITES[0]}/c/1/0",
        f"activations/{model}/{SITES[1]}/c/3/0",
        f"norms/{model}/{SITES[1]}/c/0",
        f"moments/{second}/00000000.parquet",
        f"commits/{first}/000000/00000002.json",  # the bitmap says that it is there
        f"activations/{model}/{SITES[0]}/zarr.json",
        f"norms/{model}/zarr.json",
        "activations/zarr.json",
        "corpus/zarr.json",
        "corpus/token/zarr.json",
    ]
    gone = []
    if damage is not Path.unlink:
        gone = [f"commits/{first}/drivers/host-1-abcd.json", f"failures/{first}/00000001.json"]
        names += [f"commits/{first}/committed.json", *gone]
    for name in names:
        damage(mended.store / name)
    status, report = verify(mended)
    assert status == 1
    assert sorted(fault["object"] for fault in report["faults"]) == sorted(names)
    assert {fault.get("unit") for fault in report["faults"] if "activations" in fault["object"]} >= {1, 3}
    status, report = verify(mended, "--repair")
    assert (status, report["faults_left"], report["refused"]) == (0, 0, [])
    assert contents(mended.store) == {name: content for name, content in before.items() if name not in gone}
    status, report = verify(mended)
    assert (status, report["faults"], report["notes"]) == (0, [], [])


def test_what_verify_says(stored: Lab) -> None:
    store = open_store(stored.store)
    harvest = store.harvests[0]
    row_folder = stored.store / "activations" / harvest.model / SITE / "c"
    flip(row_folder / "1" / "0")
    commit = log_of(store, harvest).commit_place(3).path
    flip(commit)
    swapped = commit.with_name("00000002.json")
    swapped.write_bytes(commit.with_name("00000000.json").read_bytes())
    bitmap = commit.parent.parent / "committed.json"
    bitmap.write_bytes(b"{}")
    assert main(["verify", str(stored.store)]) == 1
    text = stored.capsys.readouterr().out
    assert "expected the commit of unit 3; found it is damaged: " in text
    assert "expected the commit of unit 2; found it is of another unit or harvest" in text
    assert "expected the bitmap of committed units; found it is damaged: it has no checksum" in text
    assert re.search("chunk 1 has the crc32c [0-9a-f]{8}, stored is ([0-9a-f]{8}), committed [0-9a-f]{8}", text)
    assert f"`granary verify {stored.store} --repair` puts right" in text
    assert "STORE" not in text


def test_nothing_is_said_to_be_verified_where_nothing_was_repaired(mended: Lab) -> None:
    flip(mended.store / "corpus" / "token" / "c" / "0")
    assert main(["verify", str(mended.store), "--repair"]) == 1
    text = mended.capsys.readouterr().out
    assert text.endswith("repaired  nothing: 1 fault left\n")
    flip(mended.store / "norms" / open_store(mended.store).harvests[0].model / SITES[1] / "c" / "0")
    assert main(["verify", str(mended.store), "--repair"]) == 1
    assert mended.capsys.readouterr().out.endswith("verified  what was repaired: 1 fault left\n")


def test_a_driver_that_looks_on_reads_committed_rows_all_the_time(mended: Lab) -> None:
    """The commit of a damaged unit is never removed: other rows of its harvest can be read before, and all after."""
    store = open_store(mended.store)
    digest = store.harvests[0].digest
    committed = log_of(store, digest).commit_place(1).read()
    flip(mended.store / "activations" / store.harvests[0].model / SITES[0] / "c" / "1" / "0")
    assert verify(mended, "--repair")[0] == 0
    assert log_of(store, digest).commit_place(1).read() == committed


def test_rows_need_the_model_and_norms_do_not(mended: Lab, tmp_path: Path) -> None:
    before = contents(mended.store)
    store = open_store(mended.store)
    harvest = store.harvests[0]
    forget_model(store.root, harvest.digest)
    harvest_record = contents(mended.store)
    rows = mended.store / "activations" / harvest.model / SITES[0] / "c" / "0" / "0"
    flip(rows)
    cut(mended.store / "norms" / harvest.model / SITES[0] / "c" / "2")
    cut(mended.store / "moments" / harvest.digest / f"{store.info.units.name(3)}.parquet")
    flipped = rows.read_bytes()
    status, report = verify(mended, "--repair")
    assert status == 1
    [refused] = report["refused"]
    assert refused["objects"] == [str(rows.relative_to(mended.store))]
    assert "give --model its folder or name" in refused["reason"]
    assert len(report["repaired"]) == 2
    assert all(text.endswith("from its rows") for text in report["repaired"])
    name = str(rows.relative_to(mended.store))
    assert contents(mended.store) == {**harvest_record, name: flipped}
    assert {**contents(mended.store), name: before[name]} == harvest_record


def forget_model(root: Place, harvest: str) -> None:
    place = root / "commits" / harvest / "harvest.json"
    record = read_record(place)
    place.write(encode({**record, "made_with": {**record["made_with"], "model": "/nowhere/at/all"}}))


def test_another_model_is_refused_and_the_right_one_is_found_where_it_is_now(
    mended: Lab, llama: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    store = open_store(mended.store)
    harvest = store.harvests[0]
    forget_model(store.root, harvest.digest)
    flip(mended.store / "activations" / harvest.model / SITES[0] / "c" / "0" / "0")
    before = snapshot(mended.store)
    other = make_model("llama", seed=7)
    status, report = verify(mended, "--repair", "--model", other)
    assert status == 1
    assert f"{other} has the fingerprint" in report["refused"][0]["reason"]
    assert harvest.identity.fingerprint in report["refused"][0]["reason"]
    assert snapshot(mended.store) == before
    shutil.copytree(llama, tmp_path / "moved")
    status, report = verify(mended, "--repair", "--model", tmp_path / "moved")
    assert (status, report["refused"]) == (0, [])


def test_what_nothing_determines_is_refused_with_advice(mended: Lab) -> None:
    store = open_store(mended.store)
    names = [
        "corpus/token/c/0",
        "corpus/tokenizer/tokenizer.json",
        "corpus/documents/part-00000.parquet",
        f"commits/{store.harvests[1].digest}/harvest.json",
        "anchors/languages/anchors.json",
        "runs/sae/dictionary.safetensors",
        "runs/sae/evaluation.json",
    ]
    for name in names:
        flip(mended.store / name)
    before = snapshot(mended.store)
    status, report = verify(mended, "--repair")
    assert status == 1
    assert report["faults_left"] == len(names)
    advice = {refused["objects"][0]: refused["reason"] for refused in report["refused"]}
    assert advice.keys() == set(names)
    assert "restore it from a copy" in advice["corpus/token/c/0"]
    assert "granary anchors" in advice["anchors/languages/anchors.json"]
    assert "granary train" in advice["runs/sae/dictionary.safetensors"]
    assert "granary evaluate" in advice["runs/sae/evaluation.json"]
    assert snapshot(mended.store) == before


def test_a_harvest_whose_record_is_damaged_keeps_no_other_from_being_repaired(mended: Lab) -> None:
    store = open_store(mended.store)
    first, second, _ = (harvest.digest for harvest in store.harvests)
    driver, moments = f"commits/{first}/drivers/host-1-abcd.json", f"moments/{first}/00000001.parquet"
    lost = f"commits/{second}/harvest.json"
    for names in ([driver], [moments], [f"commits/{first}/committed.json"]):
        before = snapshot(mended.store)
        for name in [*names, *({lost} if names == [driver] else ())]:
            flip(mended.store / name)
        status, report = verify(mended, "--repair")
        assert status == 1
        assert [refused["objects"] for refused in report["refused"]] == [[lost]]
        after = snapshot(mended.store)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        assert changed == ({driver, lost} if names == [driver] else set())


def test_a_store_written_through_python_is_not_computed_again(tmp_path: Path, capsys: Any) -> None:
    store = write_store(tmp_path / "store")
    flip(tmp_path / "store" / "activations" / "made-up" / "mlp_out.0" / "c" / "1" / "0")
    flip(tmp_path / "store" / "moments" / store.harvests[0].digest / "00000002.parquet")
    assert main(["verify", str(tmp_path / "store"), "--repair"]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("rows were written through Python, and no model can compute them again; restore") >= 1
    assert main(["verify", str(tmp_path / "store"), "--audit", "1"]) == 1
    assert "does not say how a model computed it" in capsys.readouterr().err


def test_a_lost_harvest_record_is_written_again_from_its_spec(stored: Lab) -> None:
    before = contents(stored.store)
    (path,) = stored.store.glob("commits/*/harvest.json")
    flip(path)
    status, report = verify(stored, "--repair")
    assert (status, [fault["object"] for fault in report["faults"]]) == (1, [str(path.relative_to(stored.store))])
    assert "remove it and run `granary harvest` on the spec that made it" in report["refused"][0]["reason"]
    path.unlink()
    assert "all 4 units" in stored.run("harvest", stored.spec())
    assert verify(stored)[0] == 0
    name = str(path.relative_to(stored.store))
    differing = {name for name, content in contents(stored.store).items() if before.get(name) != content}
    assert differing <= {name, f"{name.rpartition('/')[0]}/committed.json"}
    assert {**decode(before[name]), "created": 0} == {**decode(path.read_bytes()), "created": 0}


def test_a_damaged_root_record_is_told_and_nothing_else_is_touched(mended: Lab) -> None:
    flip(mended.store / "zarr.json")
    before = snapshot(mended.store)
    status, report = verify(mended, "--repair")
    assert status == 1
    assert [fault["object"] for fault in report["faults"]] == ["zarr.json"]
    assert "nothing else can be checked" in report["notes"][0]
    assert snapshot(mended.store) == before


# ---- audit


def rows_of(store: Store, unit: int) -> dict[str, Rounded]:
    start, stop = store.info.unit_rows(unit)
    harvest = store.harvests[0]
    arrays = {site: harvest.arrays(store.root, store.num_rows, site)["activations"] for site in harvest.sites}
    return {site: Rounded(to_torch(array.read(start, stop))) for site, array in arrays.items()}


def forge(store: Store, unit: int) -> None:
    """Change one row of a unit, and everything that depends on it, as somebody would who knows the format."""
    harvest = store.harvests[0]
    start, stop = store.info.unit_rows(unit)
    rows = rows_of(store, unit)
    rows[SITE].values[17] *= -1
    block: UnitBlock = unit_block(store, read_groups(store, start, stop), rows)
    commit = log_of(store, harvest).read(unit)
    rewrite_unit(store, harvest, unit, block, writer=commit.writer, figures=commit.figures, instead=True)


def test_a_forgery_is_found_by_running_the_model_again_and_by_nothing_else(stored: Lab) -> None:
    before = contents(stored.store)
    store = open_store(stored.store)
    assert verify(stored, "--audit", "4")[0] == 0
    forge(store, 2)
    status, report = verify(stored)
    assert (status, report["faults"]) == (0, [])
    status, report = verify(stored, "--audit", "4")
    assert status == 1
    [fault] = report["faults"]
    assert (fault["object"], fault["unit"]) == (f"activations/{store.harvests[0].model}/{SITE}/c/2/0", 2)
    assert "1 of 1024 rows of unit 2 are others; row 2065 is off by 2 of its norm" in fault["found"]
    assert sorted((a["unit"], a["outcome"]) for a in report["audited"]) == [
        (0, "bit-exact"),
        (1, "bit-exact"),
        (2, "false"),
        (3, "bit-exact"),
    ]
    assert verify(stored, "--audit", "4", "--repair")[0] == 0
    assert contents(stored.store) == before
    assert verify(stored, "--audit", "4")[0] == 0


def test_norms_and_moments_are_audited_too(stored: Lab) -> None:
    store = open_store(stored.store)
    harvest = store.harvests[0]
    start, stop = store.info.unit_rows(3)
    rows = rows_of(store, 3)
    block = unit_block(store, read_groups(store, start, stop), rows)
    key = next(key for key in block.moments if key.label == "language")
    block.moments[key].sum[0] += 1  # type: ignore[index]
    commit = log_of(store, harvest).read(3)
    rewrite_unit(store, harvest, 3, block, writer="forger", figures=commit.figures, instead=True)
    assert verify(stored)[0] == 0
    status, report = verify(stored, "--audit", "4")
    assert status == 1
    assert [fault["object"] for fault in report["faults"]] == [
        f"moments/{harvest.digest}/{store.info.units.name(3)}.parquet"
    ]


def test_where_the_bytes_cannot_be_had_rows_are_compared_within_a_tolerance(stored: Lab) -> None:
    store = open_store(stored.store)
    place = store.root / "commits" / store.harvests[0].digest / "harvest.json"
    record = read_record(place)
    place.write(encode({**record, "made_with": {**record["made_with"], "torch": "1.0"}}))
    status, report = verify(stored, "--audit", "1")
    assert status == 0
    assert report["audited"][0]["outcome"].startswith("within tolerance (torch 1.0 there, ")
    forge(store, 0)
    status, report = verify(stored, "--audit", "4", "--repair")
    assert status == 1  # found, and not overwritten by a machine that is known to be another
    assert "audit it on a machine like the one that made it (torch 1.0 there" in report["refused"][0]["reason"]


def test_a_seed_chooses_the_units(stored: Lab) -> None:
    def chosen(seed: int) -> list[int]:
        return [a["unit"] for a in verify(stored, "--audit", "2", "--seed", str(seed))[1]["audited"]]

    assert chosen(1) == chosen(1)
    assert len({tuple(chosen(seed)) for seed in range(6)}) > 1


def test_a_site_in_two_types_is_audited_and_repaired(lab: Lab, llama: Path, corpus: Path) -> None:
    sites = [SITE, f"{SITE}@int8"]
    start_harvest(lab.store, llama, corpus, sites).run()
    before = contents(lab.store)
    status, report = verify(lab, "--audit", "2")
    assert (status, [a["outcome"] for a in report["audited"]]) == (0, ["bit-exact", "bit-exact"])
    model = open_store(lab.store).harvests[0].model
    for site in sites:
        flip(lab.store / "activations" / model / site / "c" / "1" / "0")
    status, report = verify(lab, "--repair")
    assert (status, report["refused"]) == (0, [])
    assert contents(lab.store) == before


def test_a_spec_says_where_a_large_model_runs(stored: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audited and repaired with most of its weights on disk, as it was harvested."""
    before, loaded = contents(stored.store), []

    def load(info: ModelInfo, **options: Any) -> nn.Module:
        model = load_base_model(info, **options)
        on_disk = [p.device.type == "meta" for p in model.parameters()]
        loaded.append(sum(on_disk) / len(on_disk))
        return model

    monkeypatch.setattr("workers.harvest.harvester.load_base_model", load)
    spec = stored.spec({"harvest.offload": {"folder": "weights", "cpu_memory_gib": 40_000 / 2**30}})
    assert "2 bit-exact" in stored.run("verify", spec, "--audit", "2")
    flip(stored.store / "activations" / open_store(stored.store).harvests[0].model / SITE / "c" / "1" / "0")
    assert "0 faults left" in stored.run("verify", spec, "--repair")
    assert contents(stored.store) == before
    assert len(loaded) == 2
    assert min(loaded) > 0.5


def test_a_model_that_one_device_has_no_room_for(stored: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Placement, *arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB")

    monkeypatch.setattr(Placement, "load", load)
    # The audit reads the store first, and says so: what it prints is no part of the refusal.
    assert main(["verify", str(stored.store), "--audit", "1"]) == 1
    err = stored.capsys.readouterr().err
    assert "CUDA out of memory" in err
    assert "give `granary verify` the spec in place of the store, with harvest.offload or several gpus" in err
    assert main(["verify", str(stored.spec()), "--audit", "1"]) == 1
    assert "in place of the store" not in stored.capsys.readouterr().err


@pytest.mark.parametrize("on_gpu", [True, False])
def test_models_run_on_the_device_of_their_harvest(
    harvested: Store, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    offload = Offload("weights")

    def placed(device: str, compiled: bool, given: Placement | None) -> Placement:
        how = Computation("1", 64, "sdpa", compiled, device, 1)
        identity = HarvestIdentity({"harvest": how.to_record()})
        return placement_for(replace(harvested.harvests[0], identity=identity), given)

    gpu = "cuda" if on_gpu else "cpu"
    assert placed("cuda", False, None) == Placement(gpu)
    assert placed("cuda", False, Placement("auto", offload)) == Placement("auto" if on_gpu else "cpu", offload)
    assert placed("cuda", False, Placement("cpu", offload)) == Placement(gpu, offload)
    assert placed("cuda", True, Placement("auto", offload)) == Placement(gpu)  # compiled, so it was whole
    assert placed("cpu", False, Placement("auto", offload)) == Placement("cpu", offload)
    assert placed("cpu", False, None) == Placement("cpu")


# ---- refusals


def test_bad_input(lab: Lab, make_model: Callable[..., Path], stored: Lab) -> None:
    assert "no store at" in lab.refused("verify", lab.folder / "nothing")
    assert "no store at" in lab.refused("verify", lab.folder / "nothing", "--repair", "--audit", "1")
    store = open_store(stored.store)
    forget_model(store.root, store.harvests[0].digest)
    other = make_model("llama", seed=7)
    err = stored.refused("verify", stored.store, "--audit", "1", "--model", other)
    assert f"{other} has the fingerprint" in err
    assert "give --model its folder or name" in err
    assert "there is no folder" in stored.refused("verify", stored.store, "--audit", "1")


def test_a_spec_names_the_store_and_its_model(stored: Lab) -> None:
    store = open_store(stored.store)
    forget_model(store.root, store.harvests[0].digest)
    text = stored.run("verify", stored.spec(), "--audit", "2")
    assert "0 faults" in text
    assert "2 bit-exact" in text


def test_names_that_are_not_the_store_s_are_noted(mended: Lab) -> None:
    folder = mended.store / "activations" / open_store(mended.store).harvests[0].model / SITES[0] / "c" / "1"
    (folder / ".0.123.abcd.tmp").write_bytes(b"half a chunk")
    (mended.store / "thesis.txt").write_text("mine")
    status, report = verify(mended)
    assert status == 0
    assert any("thesis.txt is not part of the store" in note for note in report["notes"])
    assert any("1 temporary file(s)" in note for note in report["notes"])
