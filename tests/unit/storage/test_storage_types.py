"""Stores of every storage type, through the real harvester: what is read, what it costs, and one site as two types."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import harvest, start_harvest
from lab import Lab
from safetensors.numpy import load_file

from pipeline.sites import STORED_TYPES
from storage.errors import CorruptChunk, StorageError, StoreMismatch
from storage.harvest.log import log_of
from storage.harvest.moments import MomentKey
from storage.read.moments import merged_moments
from storage.sql.query import fetch
from storage.store import Store, open_store
from storage.verify.findings import Fault
from storage.verify.verify import verify

SITE = "resid_post.1"
SITES = [SITE, "mlp_in.0"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> dict[str, Store]:
    """The same rows, computed in float32, stored as every type."""
    folder = tmp_path_factory.mktemp("types")
    return {stored: harvest(folder / stored, llama, corpus, SITES, dtype=stored) for stored in STORED_TYPES}


@pytest.fixture(scope="module")
def exact(stores: dict[str, Store]) -> np.ndarray:
    """What the model computed, float32."""
    return stores["float32"].read(SITE)


def quantised(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(values).max(1) / np.float32(127)
    return np.rint(values / scales[:, None]).astype(np.int8), scales


def test_int8_is_read_as_float32_and_raw(stores: dict[str, Store], exact: np.ndarray) -> None:
    store = stores["int8"]
    whole, scales = quantised(exact)
    values, stored_scales = store.read_stored(SITE)
    assert values.dtype == np.int8
    assert stored_scales is not None
    np.testing.assert_array_equal(values, whole)
    np.testing.assert_array_equal(stored_scales, scales)
    read = store.read(SITE)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, whole.astype(np.float32) * scales[:, None])


@pytest.mark.parametrize("rows", [slice(1000, 1100), slice(0, 0), [3700, 3, 1030, 3], []])
def test_any_rows_of_int8(stores: dict[str, Store], rows: slice | list[int]) -> None:
    store = stores["int8"]
    whole = store.read(SITE)
    index = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
    found = store.read(SITE, rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, whole[index])
    values, scales = store.read_stored(SITE, rows)
    assert scales is not None
    np.testing.assert_array_equal(found, values * scales[:, None])


def test_other_types_have_no_scales(stores: dict[str, Store]) -> None:
    values, scales = stores["float16"].read_stored(SITE, [0, 5])
    assert (values.dtype, scales) == (np.float16, None)
    assert not (stores["float16"].path / "scales").exists()
    with pytest.raises(StorageError, match=r"resid_post\.1 has no scales: it is stored as float16"):
        stores["float16"].array(SITE, "scales")


@pytest.mark.parametrize("stored", STORED_TYPES)
def test_norms_and_moments_are_of_what_is_read(stores: dict[str, Store], stored: str) -> None:
    store = stores[stored]
    wide = store.read(SITE).astype(np.float64)
    np.testing.assert_allclose(store.norms(SITE), np.linalg.norm(wide, axis=1), rtol=1e-5)
    moments = merged_moments(store, SITE, range(store.info.num_units))[MomentKey(SITE)]
    np.testing.assert_allclose(moments.sum, wide.sum(0), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(moments.sum_squares, (wide**2).sum(0), rtol=1e-5)


@pytest.mark.parametrize("stored", STORED_TYPES)
def test_commits_say_what_rounding_cost(stores: dict[str, Store], exact: np.ndarray, stored: str) -> None:
    store = stores[stored]
    (found,) = store.harvests
    parts = [log_of(store, found).read(u).figures.rounding[SITE] for u in range(store.info.num_units)]
    wide = store.read(SITE).astype(np.float64)
    error = ((exact.astype(np.float64) - wide) ** 2).sum()
    assert sum(p.square_error for p in parts) == pytest.approx(error, rel=1e-4)
    assert sum(p.square_norm for p in parts) == pytest.approx((wide**2).sum(), rel=1e-5)
    relative = error / (wide**2).sum()
    assert {"float32": 0, "bfloat16": 1e-7, "float16": 1e-9, "int8": 1e-6}[stored] <= relative
    assert relative <= {"float32": 0, "bfloat16": 4e-6, "float16": 1e-7, "int8": 1e-3}[stored]


def test_rounding_costs_nothing_where_the_model_computes_in_the_stored_type(
    tmp_path: Path, llama: Path, corpus: Path
) -> None:
    store = harvest(tmp_path / "store", llama, corpus, [SITE], dtype="bfloat16", model_dtype="bfloat16")
    (found,) = store.harvests
    assert log_of(store, found).read(0).figures.rounding[SITE].square_error == 0


@pytest.mark.parametrize("batch_rows", [64, 777])
def test_streams_give_int8_as_float32(stores: dict[str, Store], batch_rows: int) -> None:
    """The same order as of every other type, across the ends of pools."""
    store = stores["int8"]
    whole = store.read(SITE)
    others = stores["float32"].stream(SITES, batch_rows=batch_rows, seed=3, start_step=2, steps=10)
    for batch, other in zip(
        store.stream(SITES, batch_rows=batch_rows, seed=3, start_step=2, steps=10), others, strict=True
    ):
        assert set(batch) == {"row", *SITES}
        np.testing.assert_array_equal(batch["row"], other["row"])
        assert batch[SITE].dtype == np.float32
        np.testing.assert_array_equal(batch[SITE], whole[batch["row"]])


def test_zarr_opens_int8_and_its_scales(stores: dict[str, Store], exact: np.ndarray) -> None:
    store = stores["int8"]
    group = zarr.open_group(store.path, mode="r")
    model = store.harvests[0].model
    values, scales = group[f"activations/{model}/{SITE}"], group[f"scales/{model}/{SITE}"]
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    assert scales.metadata.dimension_names == ("row",)
    np.testing.assert_array_equal(values[:].astype(np.float32) * scales[:][:, None], store.read(SITE))


def test_every_chunk_of_scales_is_in_its_commit(stores: dict[str, Store]) -> None:
    store = stores["int8"]
    (found,) = store.harvests
    for unit in range(store.info.num_units):
        checksums = log_of(store, found).read(unit).sites[SITE]["scales_crc32c"]
        assert checksums == [store.array(SITE, "scales").read_checksum(unit)]


def test_verify_checks_int8_and_its_scales(stores: dict[str, Store], tmp_path: Path) -> None:
    store = open_store(shutil.copytree(stores["int8"].path, tmp_path / "store"))
    assert list(verify(store.root)) == []
    for kind, unit in (("scales", 2), ("activations", 0)):
        path = store.array(SITE, kind).object_place(unit).path
        content = path.read_bytes()
        path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        faults = [finding.place.path for finding in verify(store.root) if isinstance(finding, Fault)]
        assert path in faults
        path.write_bytes(content)


def test_damaged_scales_are_named(tmp_path: Path, llama: Path, corpus: Path) -> None:
    store = harvest(tmp_path / "store", llama, corpus, [SITE], dtype="int8")
    path = store.array(SITE, "scales").object_place(1).path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptChunk, match=r"chunk 1 of scales/.*/resid_post\.1 .* does not match its crc32c"):
        open_store(store.path).read(SITE, [1024])
    assert len(store.read(SITE, [0])) == 1


@pytest.mark.parametrize("stored", STORED_TYPES)
def test_bytes_of_a_row(stores: dict[str, Store], stored: str) -> None:
    (found,) = stores[stored].harvests
    width = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}[stored] * 32
    assert found.sites[SITE].row_bytes == width + (8 if stored == "int8" else 4)


def test_fetched_int8_is_float32(stores: dict[str, Store], tmp_path: Path) -> None:
    store = stores["int8"]
    table = store.sql("select row from rows where position = 1").to_arrow_table()
    fetch(store, table, SITE, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(
        load_file(tmp_path / "x.safetensors")["activations"], store.read(SITE, table.column("row").to_numpy())
    )


# ---- one site as several types


def test_a_site_is_stored_again_as_another_type_beside_the_first(
    tmp_path: Path, llama: Path, corpus: Path, stores: dict[str, Store]
) -> None:
    store = harvest(tmp_path / "store", llama, corpus, [SITE])
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("c/**/*") if p.is_file()}
    again = start_harvest(store.path, llama, corpus, [SITE, f"{SITE}@int8", "mlp_in.0@float16"])
    assert [list(job.harvest.sites) for job in again.jobs] == [[SITE], [f"{SITE}@int8", "mlp_in.0@float16"]]
    assert [len(job.units) for job in again.jobs] == [0, 4]
    again.run()
    store = open_store(store.path)
    assert store.sites == [SITE, f"{SITE}@int8", "mlp_in.0@float16"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    for stored in ("bfloat16", "int8"):
        name = SITE if stored == "bfloat16" else f"{SITE}@{stored}"
        np.testing.assert_array_equal(store.read(name), stores[stored].read(SITE))
    np.testing.assert_array_equal(store.read("mlp_in.0@float16"), stores["float16"].read("mlp_in.0"))
    aligned = next(iter(store.stream([SITE, f"{SITE}@int8"], batch_rows=50, steps=1)))
    np.testing.assert_array_equal(aligned[f"{SITE}@int8"], stores["int8"].read(SITE, aligned["row"]))
    # Whatever the rest of a later spec is stored as, these sites are there.
    for stored in ("bfloat16", "float32"):
        assert not start_harvest(store.path, llama, corpus, [f"{SITE}@int8"], dtype=stored).jobs[0].units
    assert [s for s, _ in store.sql("select site, dtype from sites where dtype = 'int8'").fetchall()] == [
        f"{SITE}@int8"
    ]


def test_another_type_under_the_same_name_is_refused_with_the_way_out(
    stores: dict[str, Store], llama: Path, corpus: Path
) -> None:
    with pytest.raises(StoreMismatch) as refusal:
        start_harvest(stores["bfloat16"].path, llama, corpus, SITES, dtype="int8")
    message = str(refusal.value)
    assert message.count("harvest.dtype: 'bfloat16' in the store, 'int8' in the spec") == 1
    assert message.endswith("a site is stored a second time, as another type, under a name like resid_post.1@int8")


@pytest.mark.slow
def test_a_dictionary_is_trained_and_evaluated_on_int8(lab: Lab) -> None:
    dictionary = {"name": "sae", "input": f"{SITE}@int8", "latents": 64, "activation": {"k": 4}}
    spec = lab.spec(
        {
            "harvest.sites": [f"{SITE}@int8"],
            "corpus.holdout": 0.2,
            "anchors": {"name": "languages", "by": "language", "min_rows": 10},
            "train": {"rows": 8192, "batch_rows": 512, "threads": 1, "dictionaries": [dictionary]},
        }
    )
    lab.run("run", spec)
    store = open_store(lab.store)
    evaluation = json.loads((store.path / "runs" / "sae" / "evaluation.json").read_text())
    assert 0 < evaluation["fvu"] < 1
    assert "resid_post.1@int8" in lab.run("status", lab.store)
    lab.run("report", lab.store)
    assert f"{SITE}@int8" in (lab.store / "report.html").read_text()


# ---- refusals


@pytest.mark.parametrize(
    ("harvest", "message"),
    [
        ({"sites": ["resid_post.1@int4"]}, "the type to store it as, one of bfloat16, float16, float32, int8"),
        ({"sites": ["resid_post.1@"]}, "the type to store it as, one of bfloat16, float16, float32, int8"),
        ({"sites": ["resid_post.1", "resid_post.1@bfloat16"]}, "would be stored as bfloat16 twice"),
        ({"sites": SITES, "dtype": "int4"}, "harvest.dtype must be 'bfloat16', 'float16', 'float32' or 'int8', not"),
        ({"sites": ["resid_post.7@int8"]}, "resid_post.7@int8 is not in"),
    ],
)
def test_bad_types_are_refused(lab: Lab, no_ray: None, harvest: dict[str, object], message: str) -> None:
    spec = lab.spec({f"harvest.{key}": value for key, value in harvest.items()})
    assert message in lab.refused("harvest", spec)


def test_float16_that_overflows_is_refused(tmp_path: Path, llama: Path, corpus: Path) -> None:
    harvesting = start_harvest(tmp_path / "store", llama, corpus, [SITE], dtype="float16")
    with torch.no_grad():
        embedding = harvesting.harvesters[0]._runner.model.get_input_embeddings()
        embedding.weight *= 1e6
    with pytest.raises(Exception, match="not a finite float16"):
        harvesting.run([0])
