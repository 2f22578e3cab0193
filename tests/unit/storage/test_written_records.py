"""The records of a harvest as they are written: their keys, in order. A store is the same bytes whoever wrote it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import corpus_info, plan_table, save_no_tokenizer

from storage.backends.place import open_place
from storage.errors import StorageError
from storage.format.layout import StoreLayout
from storage.format.records import encode
from storage.harvest.commits import Commit, RoundingCost, UnitFigures
from storage.harvest.driver_records import Driver
from storage.harvest.failures import Failure
from storage.harvest.harvest import Harvest, SiteLayout, declare_harvest, read_harvest
from storage.harvest.identity import Computation, HarvestIdentity
from storage.harvest.log import HarvestLog, log_of
from storage.make.create import create_store

FIGURES = UnitFigures(96, 4, {"resid_post.0": RoundingCost(0.5, 2.0)}, "cpu, 1 threads", 10.0, 2.5, None)
COMMIT = Commit("h", 3, 96, 128, "host-1-ab", {"resid_post.0": {"crc32c": [7, 8], "norms_crc32c": [9]}}, "ff")
COMPUTATION = Computation("1", 8192, "sdpa", False, "cpu", 2)
IDENTITY = HarvestIdentity.of(
    corpus_digest="c", tokenizer_digest="t", fingerprint="f", dtype="float32", rows_per_unit=32, computation=COMPUTATION
).with_sites({"resid_post.0": "int8"})
HARVEST = Harvest.of(IDENTITY, "tiny-0000", {"resid_post.0": SiteLayout(64, "int8", 32)}, {"torch": "2.13.0"})


def test_a_commit() -> None:
    written = replace(COMMIT, figures=FIGURES, committed_at=12.5)
    expected = {
        "harvest": "h",
        "unit": 3,
        "row_start": 96,
        "row_stop": 128,
        "writer": "host-1-ab",
        "sites": {"resid_post.0": {"crc32c": [7, 8], "norms_crc32c": [9]}},
        "moments_sha256": "ff",
        "positions_run": 96,
        "padding": 4,
        "rounding": {"resid_post.0": {"square_error": 0.5, "square_norm": 2.0}},
        "device": "cpu, 1 threads",
        "started_at": 10.0,
        "seconds": 2.5,
        "idle_share": None,
        "committed_at": 12.5,
    }
    assert encode(written.to_record()) == encode(expected)
    assert Commit.from_record(expected) == written


def test_a_commit_that_repair_wrote_has_no_figures() -> None:
    record = replace(COMMIT, committed_at=12.5).to_record()
    assert list(record)[-2:] == ["moments_sha256", "committed_at"]
    assert Commit.from_record(record).figures is None


def test_a_harvest_and_its_groups(tmp_path: Path) -> None:
    root = open_place(tmp_path)
    declare_harvest(root, 100, HARVEST)
    expected = {
        "digest": IDENTITY.digest,
        "model": "tiny-0000",
        "sites": {"resid_post.0": {"d": 64, "dtype": "int8", "chunk_rows": 32}},
        "identity": {
            "corpus_digest": "c",
            "tokenizer_digest": "t",
            "model": {"fingerprint": "f", "dtype": "float32"},
            "rows_per_unit": 32,
            "harvest": {
                "batches": "1",
                "batch_tokens": 8192,
                "attention": "sdpa",
                "compile": False,
                "device": "cpu",
                "threads_per_worker": 2,
            },
            "sites": {"resid_post.0": "int8"},
        },
        "made_with": {"torch": "2.13.0"},
    }
    created, found = read_harvest(root, HARVEST.digest)
    assert found == HARVEST
    layout = StoreLayout(root)
    assert layout.harvest(HARVEST.digest).read() == encode({**expected, "created": created})
    group = layout.group("scales", "tiny-0000") / "zarr.json"
    assert list(_granary_of(group.read())) == ["tokenizer_digest", "model", "made_with", "checksum"]


def _granary_of(content: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(content)["attributes"]["granary"]
    return found


def test_the_digest_of_an_identity_is_as_it_was() -> None:
    """Harvests are named by it: another one would be another harvest."""
    assert IDENTITY.digest == "bf9062701988aa2d"
    blocks = replace(COMPUTATION, attention_in_blocks=False).to_record()
    assert list(blocks)[-1] == "attention_in_blocks"
    assert "attention_in_blocks" not in COMPUTATION.to_record()


def test_failures_and_drivers(tmp_path: Path) -> None:
    table = plan_table(100, num_documents=4)
    store = create_store(tmp_path / "store", table, corpus_info(table, 32), save_no_tokenizer)
    log = log_of(store, "h")
    log.record_failure(Failure(3, ["e"], ["w"], {"torch": "2"}))
    expected = {"harvest": "h", "unit": 3, "errors": ["e"], "writers": ["w"], "made_with": {"torch": "2"}}
    assert log.failure_place(3).read() == encode(expected)
    log.write_driver(Driver("me", counter=2, in_flight=[1]))
    numbers = {"workers": 0, "units_done": 0, "rows_done": 0, "rows_per_second": 0.0}
    driver = {"harvest": "h", "id": "me", "counter": 2, "interval_s": 5.0, **numbers, "in_flight": [1], "set_aside": []}
    assert log.layout.driver("h", "me").read() == encode(driver)


@pytest.mark.parametrize("more", [{"later": 1}, {}])
def test_fields_that_a_newer_version_adds_are_passed_over(more: dict[str, int]) -> None:
    layout = {"d": 64, "dtype": "int8", "chunk_rows": 32, **more}
    assert SiteLayout.from_record(layout) == SiteLayout(64, "int8", 32)
    record = {
        **COMMIT.to_record(),
        "device": "cpu",
        "rounding": {"s": {"square_error": 1.0, "square_norm": 2.0, **more}},
    }
    figures = Commit.from_record({**record, **more}).figures
    assert figures is not None
    assert figures.rounding == {"s": RoundingCost(1.0, 2.0)}


def test_an_identity_of_another_version_is_shown_and_not_run(tmp_path: Path) -> None:
    old = HarvestIdentity({"rows_per_unit": 32, "model": {"fingerprint": "f"}, "harvest": {"device": "cpu"}})
    assert old.computation is None
    assert old.computed == {"dtype": None, "device": "cpu"}


@pytest.mark.parametrize("field", ["unit", "sites", "moments_sha256", "writer"])
def test_a_commit_that_lacks_a_field_is_damaged(tmp_path: Path, field: str) -> None:
    table = plan_table(100, num_documents=4)
    store = create_store(tmp_path / "store", table, corpus_info(table, 32), save_no_tokenizer)
    log = HarvestLog(store.root, "h", store.info.units)
    record = {**COMMIT.to_record(), "row_stop": 100}
    del record[field]
    log.commit_place(3).write(encode(record))
    with pytest.raises(
        StorageError, match=r"is of another unit" if field == "unit" else f"is damaged: it lacks {field}"
    ):
        log.read(3)


@pytest.mark.parametrize("field", ["d", "dtype", "chunk_rows"])
def test_a_layout_that_lacks_a_field_is_damaged(tmp_path: Path, field: str) -> None:
    root = open_place(tmp_path)
    declare_harvest(root, 100, HARVEST)
    record = {**HARVEST.to_record(), "created": 1.0}
    del record["sites"]["resid_post.0"][field]
    StoreLayout(root).harvest(HARVEST.digest).write(encode(record))
    with pytest.raises(StorageError, match=f"is damaged: the layout of a site lacks {field}"):
        read_harvest(root, HARVEST.digest)
