"""What `granary plan` says, held against the harvest that follows; what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import start_harvest
from lab import SITES, TRAIN, Lab
from s3 import FaultyS3

from jobs.plan.plan import PlanOptions, plan_record
from jobs.plan.text import plan_text
from jobs.spec.spec import load_spec
from storage.backends.place import Place, open_place
from storage.harvest.harvest import Harvest
from storage.store import open_store

INT8 = "resid_post.1@int8"


def objects_of(place: Place, harvest: Harvest) -> dict[str, int]:
    """Name -> bytes of the objects that a harvest writes unit by unit: arrays' chunks or shards, moments, commits."""
    found = {}
    for kind in ("activations", "norms", "scales"):
        for site in harvest.sites:
            chunks = place / kind / harvest.model / site / "c"
            for name in chunks.names():
                keys = [chunks / name / "0"] if kind == "activations" else [chunks / name]
                found |= {str(key): len(key.read()) for key in keys}
    for kind in ("moments", "commits"):
        blocks = place / kind / harvest.digest
        parts = [blocks] if kind == "moments" else [blocks / name for name in blocks.names() if name.isdecimal()]
        found |= {f"{part}/{name}": 0 for part in parts for name in part.names() if name[:8].isdecimal()}
    return found


@pytest.mark.parametrize("where", ["disk", "objects"])
def test_plan_foretells_bytes_and_objects(lab: Lab, llama: Path, corpus: Path, bucket: str, where: str) -> None:
    store = str(lab.store) if where == "disk" else f"{bucket}/acts"
    changes = {"harvest.sites": [*SITES, INT8, "mlp_in.0@float32"], "store": store}
    record = json.loads(lab.run("plan", lab.spec(changes), "--json"))
    harvesting = start_harvest(store, llama, corpus, changes["harvest.sites"])
    harvesting.run()
    (harvest,) = harvesting.store.harvests
    written = objects_of(open_place(store), harvest)
    assert record["objects"] == len(written)
    assert record["bytes"] == sum(written.values())
    of_int8 = [size for name, size in written.items() if f"/{INT8}/" in name]
    assert (record["sites"][INT8]["bytes"], record["sites"][INT8]["objects"]) == (sum(of_int8), len(of_int8))
    assert record["is_local"] == (where == "disk")


def test_plan_foretells_requests(
    lab: Lab, llama: Path, corpus: Path, s3: Any, faulty_s3: Callable[..., FaultyS3]
) -> None:
    """Counted by a proxy before a real S3 server: what units and passes of training ask."""
    store = f"{s3.make_bucket()}/acts"
    sites = ["resid_post.1", INT8]
    record = json.loads(lab.run("plan", lab.spec({"store": store, "harvest.sites": sites}), "--json"))
    proxy = faulty_s3(rate=0.0)
    harvesting = start_harvest(store, llama, corpus, sites)

    def requests(work: Callable[[], Any]) -> int:
        before = proxy.counts()["forwarded"]
        work()
        return proxy.counts()["forwarded"] - before

    planned = record["requests"]
    assert record["units"] == 4
    requests(lambda: harvesting.run([0]))  # opens the arrays and reads their metadata, once
    found = requests(lambda: harvesting.run([1, 2, 3]))
    per_unit = (planned["put"] + planned["get"]) // 4
    assert found == planned["put"] + planned["get"] - per_unit
    opened = requests(lambda: open_store(store).stream(sites, batch_rows=256))
    # The rows are one pool of the stream, which is read whole, and nothing beyond.
    one_pass = requests(lambda: list(open_store(store).stream(sites, batch_rows=256, steps=2)))
    assert one_pass - opened == record["requests_per_pass"]["get"]


def test_measuring_runs_the_model_and_writes_nothing(lab: Lab) -> None:
    spec = lab.spec({"harvest.sites": ["resid_post.1", INT8]})
    before = sorted(lab.folder.rglob("*"))
    record = json.loads(lab.run("plan", spec, "--measure", "0.2", "--json"))
    assert sorted(lab.folder.rglob("*")) == before
    assert record["measured_rows"] == 3733  # the whole corpus is less than a sample
    assert record["rows_per_second_per_worker"] > 100
    assert record["worker_hours"] == pytest.approx(3733 / record["rows_per_second_per_worker"] / 3600)
    for site in ("resid_post.1", INT8):
        errors = record["sites"][site]["relative_error"]
        assert errors["float32"] == 0 < errors["float16"] < errors["bfloat16"] < errors["int8"] < 1e-3
    text = lab.run("plan", spec, "--measure", "0.1")
    assert "measured here on 3,733 rows" in text
    assert "resid_post.1@int8 stored would be off" in text


def test_what_is_measured_is_what_the_harvest_then_commits(lab: Lab, llama: Path, corpus: Path) -> None:
    record = json.loads(lab.run("plan", lab.spec({"harvest.sites": [INT8]}), "--measure", "0.1", "--json"))
    start_harvest(lab.store, llama, corpus, [INT8]).run()
    status = json.loads(lab.run("status", lab.store, "--json"))
    stored = status["harvests"][0]["rounding"][INT8]["relative_error"]
    assert stored == pytest.approx(record["sites"][INT8]["relative_error"]["int8"], rel=1e-3)


def test_a_given_rate_gives_hours_and_money(lab: Lab) -> None:
    prices = lab.folder / "prices.yaml"
    text = (Path(__file__).parents[3] / "jobs" / "plan" / "prices.yaml").read_text()
    prices.write_text(text.replace("cpu_hour: 0.05", "cpu_hour: 36.00").replace("USD", "CHF"))
    changes = {"harvest.workers": 2, "train": {**TRAIN, "rows": 4 * 3733}}
    record = json.loads(lab.run("plan", lab.spec(changes), "--rows-per-second", "10", "--prices", prices, "--json"))
    assert record["worker_hours"] == pytest.approx(3733 / 10 / 3600)
    assert record["hours"] == pytest.approx(record["worker_hours"] / 2)
    assert record["cost"]["compute"] == pytest.approx(3.733)  # 373.3 s of one core at a hundredth a second
    assert record["cost"]["rerun"] == pytest.approx(3.733)
    assert record["passes"] == 4
    assert record["break_even_passes"] == pytest.approx(1, abs=0.01)
    assert record["break_even_months"] == pytest.approx(3 * 3.733 / record["cost"]["month"])
    text = lab.run("plan", lab.spec(changes), "--rows-per-second", "10", "--prices", prices)
    assert "3 min 07 s for 2 workers at 10 rows/s a worker (given)" in text
    assert "3.73 CHF to run the model" in text
    assert "storing is cheaper from 2 passes on" in text
    assert f"({prices})" in text


def test_without_a_rate_it_says_how_to_get_one(lab: Lab) -> None:
    text = lab.run("plan", lab.spec())
    assert "time       unknown: give --measure" in text
    assert "an unknown sum to run the model" in text
    assert "instead of storing" not in text
    assert "bfloat16 on the reference model: off by" in text


def test_a_store_that_is_there_gives_its_rate_and_what_is_left(
    lab: Lab, llama: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_corpus = json.loads(lab.run("plan", lab.spec(), "--json"))
    monkeypatch.setattr("jobs.plan.plan.plan_rows", None)  # what the store says is not counted again
    start_harvest(lab.store, llama, corpus, SITES).run([0, 1, 2])
    record = json.loads(lab.run("plan", lab.spec(), "--json"))
    assert (record["exists"], record["units_done"], record["units"]) == (True, 3, 4)
    for said in ("rows", "documents", "contexts", "left_out", "bytes", "objects"):
        assert record[said] == of_corpus[said]
    assert record["rate_from"].startswith("of the units in the store")
    assert record["worker_hours"] == pytest.approx((3733 - 3 * 1024) / record["rows_per_second_per_worker"] / 3600)
    start_harvest(lab.store, llama, corpus, SITES).run()
    record = json.loads(lab.run("plan", lab.spec(), "--json"))
    assert (record["units_done"], record["worker_hours"], record["cost"]["compute"]) == (4, 0, 0)
    assert "nothing is left to run" in plan_text(record)
    assert "(exists; 4 of 4 units have all that the spec asks for)" in plan_text(record)
    more = json.loads(lab.run("plan", lab.spec({"harvest.sites": [*SITES, INT8]}), "--json"))
    assert (more["units_done"], more["units_left"], more["rows_left"]) == (0, 4, 3733)
    assert "(exists; 0 of 4 units have all that the spec asks for; 4 units of 3,733 rows left to run)" in plan_text(
        more
    )
    assert more["worker_hours"] == pytest.approx(3733 / more["rows_per_second_per_worker"] / 3600)


def test_units_that_several_harvests_have_are_not_counted_twice(lab: Lab, llama: Path, corpus: Path) -> None:
    start_harvest(lab.store, llama, corpus, SITES[:1]).run()
    start_harvest(lab.store, llama, corpus, SITES[1:]).run([0, 1])
    record = json.loads(lab.run("plan", lab.spec(), "--json"))
    assert (record["units_done"], record["units_left"], record["rows_left"]) == (2, 2, 3733 - 2048)


def test_small_spans_and_rough_rates_are_called_so(lab: Lab, llama: Path, corpus: Path) -> None:
    start_harvest(lab.store, llama, corpus, SITES).run([0, 1, 2])
    record = json.loads(lab.run("plan", lab.spec(), "--json"))
    rough = record["rows_per_second_per_worker"] > 1024
    assert ("of under a second each: a rough guess" in plan_text(record)) == rough
    for months, span in [(1e-9, "1 s"), (0.01, "7 h 18 min"), (0.5, "15 days"), (2.04, "2.0 months")]:
        text = plan_text({**record, "break_even_months": months, "hours": 1e-5})
        assert f"it is, if kept for less than {span}" in text
        assert "time       under a second for 1 worker" in text


def test_training_reads_only_the_sites_it_names(lab: Lab) -> None:
    all_sites = plan_record(load_spec(lab.spec()))
    one_site = plan_record(load_spec(lab.spec({"train": TRAIN})))
    assert 3 * one_site["requests_per_pass"]["get"] == all_sites["requests_per_pass"]["get"]
    assert (all_sites["passes"], one_site["passes"]) == (1, 2048 / 3733)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows-per-second", "0"], "--rows-per-second takes a number above 0, not 0"),
        (["--rows-per-second", "-5"], "--rows-per-second takes a number above 0, not -5"),
        (["--rows-per-second", "nan"], "--rows-per-second takes a number above 0, not nan"),
        (["--measure", "inf"], "--measure takes a number above 0, not inf"),
        (["--prices", "nowhere.yaml"], "the prices nowhere.yaml cannot be read: No such file or directory"),
    ],
)
def test_bad_options_are_refused(lab: Lab, no_ray: None, options: list[str], message: str) -> None:
    assert message in lab.refused("plan", lab.spec(), *options)


def test_measuring_for_gpus_needs_them(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    err = lab.refused("plan", lab.spec({"harvest.gpus_per_worker": 2}), "--measure", "1")
    assert "asks for 2 GPU(s) a worker where this machine has 0" in err
    assert "--rows-per-second" in err


def test_options_are_checked_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="--measure"):
        PlanOptions(measure_s=-1)
