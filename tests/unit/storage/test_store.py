"""A store gives what was written and committed, says exactly why when it cannot, and is made whole or not at all."""

import contextlib
import errno
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import corpus_info, harvest, plan_table, save_no_tokenizer, start_harvest, stored_rows, write_store
from hypothesis import given
from hypothesis import strategies as st

from storage.backends.local import create_file
from storage.errors import CorruptChunk, NotAStore, StorageError, StoreMismatch, UncommittedRows
from storage.format.records import encode_zarr, read_record
from storage.harvest.log import log_of
from storage.harvest.moments import MomentKey, Moments, read_unit_moments
from storage.make.create import create_store
from storage.read.moments import merged_moments, training_units
from storage.store import Store, open_store

SITE = "resid_post.0"
ROWS = 203


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """203 rows in chunks of 8 and units of 32, all committed. Not to be written to."""
    return write_store(tmp_path_factory.mktemp("made") / "store", num_rows=ROWS)


@pytest.fixture(scope="module")
def direct(made: Store) -> np.ndarray:
    return stored_rows(made, SITE)


@pytest.fixture
def gaps(tmp_path: Path) -> Store:
    """The same table, with commits of the units 0, 2 and 6 (of 0 to 6) only."""
    return write_store(tmp_path / "gaps", num_rows=ROWS, units=[0, 2, 6])


# ---- reading

bound = st.none() | st.integers(-2 * ROWS, 2 * ROWS)


@given(st.builds(slice, bound, bound, st.none() | st.integers(-50, 50).filter(bool)))
def test_slices(made: Store, direct: np.ndarray, rows: slice) -> None:
    np.testing.assert_array_equal(made.read(SITE, rows), direct[rows])


@given(st.lists(st.integers(0, ROWS - 1), max_size=60))
def test_integers_in_any_order_with_repeats(made: Store, direct: np.ndarray, rows: list[int]) -> None:
    expected = direct[np.asarray(rows, dtype=np.int64)]
    np.testing.assert_array_equal(made.read(SITE, rows), expected)
    np.testing.assert_array_equal(made.read(SITE, np.asarray(rows, dtype=np.int32)), expected)


@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
def test_masks(made: Store, direct: np.ndarray, mask: list[bool]) -> None:
    np.testing.assert_array_equal(made.read(SITE, np.asarray(mask)), direct[mask])


def test_all_rows_in_the_stored_dtype(made: Store, direct: np.ndarray) -> None:
    stored = made.read(SITE)
    assert stored.dtype.name == "bfloat16"
    np.testing.assert_array_equal(stored, direct)


def test_norms_take_the_same_rows(made: Store) -> None:
    rows = [7, 7, 200, 0]
    np.testing.assert_array_equal(made.norms(SITE, rows), made.norms(SITE)[rows])


@pytest.mark.parametrize("rows", [[ROWS], [0, -1], np.asarray([5, 10**12])])
def test_rows_out_of_range(made: Store, rows: Any) -> None:
    with pytest.raises(IndexError, match=f"rows run from 0 to {ROWS - 1}"):
        made.read(SITE, rows)


@pytest.mark.parametrize("rows", [[0.5], [[1, 2]], np.ones(ROWS - 1, dtype=bool), ["a"], 5])
def test_rows_of_a_wrong_kind(made: Store, rows: Any) -> None:
    with pytest.raises(IndexError):
        made.read(SITE, rows)


def test_a_site_that_is_not_there_names_those_that_are(made: Store) -> None:
    with pytest.raises(StorageError, match=r"resid_post\.9 is not in the store; it has .*mlp_out\.0"):
        made.read("resid_post.9")


def test_uncommitted_units_are_named(gaps: Store) -> None:
    with pytest.raises(UncommittedRows, match=r"5 of the 7|4 of the 7"):
        gaps.read(SITE)
    with pytest.raises(UncommittedRows, match=r"not harvested for resid_post\.0: 1, 3-5 "):
        gaps.read(SITE)
    with pytest.raises(UncommittedRows, match=r": 1 \(units are 32 rows\)"):
        gaps.read(SITE, slice(31, 33))
    with pytest.raises(UncommittedRows, match=": 3, 5 "):
        gaps.norms(SITE, [170, 1, 100, 65])
    with pytest.raises(UncommittedRows):
        gaps.read(SITE, np.arange(ROWS) == 40)


def test_committed_units_can_be_read_beside_uncommitted_ones(gaps: Store, made: Store) -> None:
    for rows in (slice(0, 32), slice(64, 96), slice(192, None), [202, 0, 70], slice(40, 40)):
        np.testing.assert_array_equal(gaps.read(SITE, rows), made.read(SITE, rows))


def test_reading_does_not_touch_chunks_that_are_not_asked_for(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", num_rows=ROWS)
    store.array(SITE).object_place(3).remove()
    store.read(SITE, slice(0, 24))
    with pytest.raises(CorruptChunk, match=r"chunk 3 of .*resid_post\.0"):
        store.read(SITE, [0, 25])


# ---- opening


def set_root(store: Store, **changes: Any) -> None:
    place = store.root / "zarr.json"
    root = read_record(place)
    root["attributes"]["granary"] |= changes
    place.write(encode_zarr(root))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version(gaps: Store, version: Any) -> None:
    set_root(gaps, format=version)
    with pytest.raises(NotAStore, match=rf"has format {version!r}; this version of Granary reads format 1"):
        open_store(gaps.path)


def test_not_a_store(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NotAStore, match="no store at"):
            open_store(place)
    (tmp_path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"a": 1}}))
    with pytest.raises(NotAStore, match="not a Granary store"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": ')
    with pytest.raises(StorageError, match="damaged"):
        open_store(tmp_path)


def test_a_root_record_with_a_field_missing(gaps: Store) -> None:
    place = gaps.root / "zarr.json"
    root = read_record(place)
    del root["attributes"]["granary"]["num_rows"]
    place.write(encode_zarr(root))
    with pytest.raises(NotAStore, match="num_rows"):
        open_store(gaps.path)


# ---- documents


def test_documents_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("storage.table.table", "storage.make.create"):
        monkeypatch.setattr(f"{module}.DOCUMENTS_PER_FILE", 8)
        monkeypatch.setattr(f"{module}.DOCUMENTS_PER_GROUP", 3)
    table = plan_table(num_rows=100, num_documents=29)
    store = create_store(tmp_path / "store", table, corpus_info(table, 32), save_no_tokenizer)
    assert len(list((store.path / "corpus" / "documents").iterdir())) == 4
    assert store.documents.equals(table.documents)
    for first in range(29):
        for last in range(first, 29):
            assert store.documents_between(first, last).equals(table.documents.slice(first, last - first + 1))


def test_documents_between_of_many_row_groups(tmp_path: Path) -> None:
    table = plan_table(num_rows=30_000, num_documents=25_001)
    store = create_store(tmp_path / "store", table, corpus_info(table, 1024), save_no_tokenizer)
    file = pq.ParquetFile(store.path / "corpus" / "documents" / "part-00000.parquet")
    assert file.num_row_groups == 3
    for first, last in [(0, 0), (9_999, 10_000), (10_000, 19_999), (5, 25_000), (20_000, 25_000)]:
        assert store.documents_between(first, last).equals(table.documents.slice(first, last - first + 1))


# ---- what a harvest writes beside the activations


def test_norms_are_those_of_the_stored_rows(harvested: Store) -> None:
    for site in harvested.sites:
        expected = np.linalg.norm(harvested.read(site).astype(np.float32), axis=1)
        np.testing.assert_allclose(harvested.norms(site), expected, rtol=1e-6)


def assert_moments(found: Moments, rows: np.ndarray) -> None:
    """Equal up to the float32 additions within 1,024 rows, whose error is relative to the sum of magnitudes."""
    assert found.count == len(rows)
    assert np.abs(found.sum - rows.sum(0)).max() <= 1e-6 * np.abs(rows).sum(0).max()
    np.testing.assert_allclose(found.sum_squares, (rows**2).sum(0), rtol=1e-6)


def label_rows(store: Store, label: str, value: str) -> np.ndarray:
    """Return whether each row is of a document with this value."""
    values = np.asarray([str(v) for v in store.documents.column(label).to_pylist()])
    return values[store.columns(0, store.num_rows)["document"]] == value


@pytest.mark.parametrize("units", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_moments_are_those_of_the_stored_rows(harvested: Store, units: list[int]) -> None:
    in_units = np.isin(np.arange(harvested.num_rows) // harvested.info.rows_per_unit, units)
    for site in harvested.sites:
        rows = stored_rows(harvested, site).astype(np.float64)
        found = merged_moments(harvested, site, units)
        expected = [
            (label, v)
            for label, vs in [("language", ["de", "en", "fr"]), ("year", ["1980", "1981"])]
            for v in vs
            if (in_units & label_rows(harvested, label, v)).any()
        ]
        assert len(expected) >= 3
        assert set(found) == {MomentKey(site), *(MomentKey(site, *key) for key in expected)}
        assert_moments(found[MomentKey(site)], rows[in_units])
        for key in expected:
            assert_moments(found[MomentKey(site, *key)], rows[in_units & label_rows(harvested, *key)])


def test_merged_moments_are_the_units_added_up(harvested: Store) -> None:
    site = harvested.sites[0]
    digest = harvested.harvests[0].digest
    parts = [read_unit_moments(harvested, digest, unit)[MomentKey(site)] for unit in range(harvested.info.num_units)]
    merged = merged_moments(harvested, site, range(harvested.info.num_units))[MomentKey(site)]
    assert merged.count == harvested.num_rows == sum(part.count for part in parts)
    np.testing.assert_allclose(merged.sum, np.sum([part.sum for part in parts], axis=0), rtol=1e-12)


def test_moments_of_uncommitted_units(gaps: Store) -> None:
    with pytest.raises(UncommittedRows, match=": 1 "):
        merged_moments(gaps, SITE, [0, 1, 2])


def test_mean_and_variance(harvested: Store) -> None:
    site = harvested.sites[0]
    rows = stored_rows(harvested, site).astype(np.float64)
    moments = merged_moments(harvested, site, range(harvested.info.num_units))[MomentKey(site)]
    np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.total_variance, rows.var(0).sum(), rtol=1e-5)
    np.testing.assert_allclose(moments.mean_square_norm, (rows**2).sum(1).mean(), rtol=1e-6)


def test_training_units_end_where_the_held_out_rows_begin(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", num_rows=ROWS, held_out_start=160)
    assert training_units(store) == range(5)


# ---- writing units


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, commits left out: they hold the time and the writer."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if "commits" not in p.parts}


def test_a_unit_harvested_twice_has_the_same_bytes_and_one_commit(tmp_path: Path, llama: Path, corpus: Path) -> None:
    sites = ["resid_post.1", "attn_out.0"]
    first = start_harvest(tmp_path / "store", llama, corpus, sites)
    assert all(result.committed for result in first.run())
    store = first.store
    digest = store.harvests[0].digest
    commits = [log_of(store, digest).commit_place(unit).path.read_bytes() for unit in range(store.info.num_units)]
    before = contents(store.path)

    again = start_harvest(tmp_path / "store", llama, corpus, sites)
    assert not again.jobs[0].units  # nothing is left to do
    results = again.run(range(store.info.num_units))  # but a worker that did not hear of it may still do it
    assert not any(result.committed for result in results)
    assert contents(store.path) == before
    assert [
        log_of(store, digest).commit_place(unit).path.read_bytes() for unit in range(store.info.num_units)
    ] == commits


def test_the_order_of_units_and_a_restart_do_not_change_the_bytes(tmp_path: Path, llama: Path, corpus: Path) -> None:
    straight = harvest(tmp_path / "straight", llama, corpus, ["resid_post.1"])
    start_harvest(tmp_path / "odd", llama, corpus, ["resid_post.1"]).run([2, 0])
    rest = start_harvest(tmp_path / "odd", llama, corpus, ["resid_post.1"])
    assert list(rest.jobs[0].units) == [unit for unit in range(straight.info.num_units) if unit not in (0, 2)]
    rest.run()
    assert contents(straight.path) == contents(rest.store.path)


def test_sites_added_later_leave_those_there_alone(tmp_path: Path, llama: Path, corpus: Path) -> None:
    store = harvest(tmp_path / "store", llama, corpus, ["resid_post.1"])
    before = contents(store.path)
    later = start_harvest(tmp_path / "store", llama, corpus, ["resid_post.1", "mlp_in.2"])
    assert [list(job.units) for job in later.jobs] == [[], list(range(store.info.num_units))]
    later.run()
    after = contents(store.path)
    assert {name: after[name] for name in before} == before
    assert sorted(later.store.sites) == ["mlp_in.2", "resid_post.1"]
    assert len(store.harvests) == 2
    store.read("mlp_in.2")


def test_a_commit_says_what_was_written(harvested: Store) -> None:
    digest = harvested.harvests[0].digest
    for unit in range(harvested.info.num_units):
        commit = log_of(harvested, digest).read(unit)
        assert (commit.row_start, commit.row_stop) == harvested.info.unit_rows(unit)
        for site in harvested.sites:
            array, norms = harvested.array(site), harvested.array(site, "norms")
            first = commit.row_start // array.chunk_rows
            chunks = range(first, -(-commit.row_stop // array.chunk_rows))
            assert commit.sites[site]["crc32c"] == [array.read_checksum(chunk) for chunk in chunks]
            assert commit.sites[site]["norms_crc32c"] == [norms.read_checksum(chunk) for chunk in chunks]


def test_create_file_is_create_only(tmp_path: Path) -> None:
    assert create_file(tmp_path / "commit.json", b"first")
    assert not create_file(tmp_path / "commit.json", b"second")
    assert (tmp_path / "commit.json").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["commit.json"]  # no temporary file is left


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context": 32}, "context: 64 in the store, 32 in the spec"),
        ({"seed": 5}, "seed: 0 in the store, 5 in the spec"),
        ({"labels": ("language",)}, "labels: "),
        ({"dtype": "float32"}, "harvest.dtype: 'bfloat16' in the store, 'float32' in the spec"),
        ({"batch_tokens": 100}, "harvest.batch_tokens: 4096 in the store, 100 in the spec"),
        ({"model_dtype": "bfloat16"}, "model.dtype: 'float32' in the store, 'bfloat16' in the spec"),
    ],
)
def test_a_spec_that_contradicts_the_store(
    harvested: Store, llama: Path, corpus: Path, change: dict[str, Any], named: str
) -> None:
    before = sorted(harvested.path.rglob("*"))
    with pytest.raises(StoreMismatch) as caught:
        start_harvest(harvested.path, llama, corpus, ["resid_post.1"], **change)
    assert named in str(caught.value)
    assert sorted(harvested.path.rglob("*")) == before


def test_batches_of_another_kind_are_another_harvest(
    harvested: Store, llama: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of Granary that puts contexts together otherwise does not go on with the store."""
    monkeypatch.setattr("workers.harvest.stage.COMPOSITION", "one context a line")
    with pytest.raises(StoreMismatch, match=r"harvest\.batches: 'packed, best fit' in the store, 'one context a line'"):
        start_harvest(harvested.path, llama, corpus, harvested.sites)


# ---- making a store


def raising(error: BaseException) -> Callable[[Path], None]:
    def save_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        raise error

    return save_tokenizer


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_creation_that_fails_leaves_nothing(tmp_path: Path, error: BaseException, seen: type[BaseException]) -> None:
    table = plan_table(100, 5)
    with pytest.raises(seen):
        create_store(tmp_path / "store", table, corpus_info(table, 32), raising(error))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    table = plan_table(100, 5)
    with pytest.raises(StorageError, match=r"store cannot be written: No space left on device"):
        create_store(
            tmp_path / "store", table, corpus_info(table, 32), raising(OSError(errno.ENOSPC, "No space left on device"))
        )


def test_a_creation_that_fails_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    table = plan_table(100, 5)
    with pytest.raises(RuntimeError):
        create_store(tmp_path, table, corpus_info(table, 32), raising(RuntimeError("a bug")))
    assert list(tmp_path.iterdir()) == []
    assert create_store(tmp_path, table, corpus_info(table, 32), save_no_tokenizer).num_rows == 100


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    table = plan_table(100, 5)
    with pytest.raises(StorageError, match=r"not an empty folder .*thesis\.txt"):
        create_store(tmp_path, table, corpus_info(table, 32), save_no_tokenizer)
    with pytest.raises(StorageError, match="is a file"):
        create_store(tmp_path / "thesis.txt", table, corpus_info(table, 32), save_no_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("save_tokenizer", [save_no_tokenizer, raising(OSError(errno.ENOSPC, "full"))])
def test_a_folder_named_corpus_with_someone_s_files_is_left_as_it_is(
    tmp_path: Path, save_tokenizer: Callable[[Path], None]
) -> None:
    """`store: /data` with `corpus.path: /data/corpus` is an easy spec to write."""
    mine = tmp_path / "corpus" / "part-0.parquet"
    mine.parent.mkdir()
    mine.write_text("mine")
    table = plan_table(100, 5)
    with pytest.raises(StorageError):
        create_store(tmp_path, table, corpus_info(table, 32), save_tokenizer)
    assert mine.read_text() == "mine"
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_a_store_is_not_overwritten(gaps: Store) -> None:
    before = contents(gaps.path)
    table = plan_table(100, 5)
    with pytest.raises(StorageError, match="there is a store at"):
        create_store(gaps.path, table, corpus_info(table, 32), save_no_tokenizer)
    assert contents(gaps.path) == before


def test_a_creation_that_is_killed_leaves_no_store_and_no_obstacle(tmp_path: Path) -> None:
    """SIGKILL while the corpus is written: nothing under the name, and the next attempt clears the leftovers."""
    code = (
        "import os, signal, sys; sys.path.insert(0, 'tests'); from pathlib import Path; from conftest import *; "
        "from storage.make.create import create_store; table = plan_table(100, 5); "
        "create_store(Path(sys.argv[1]), table, corpus_info(table, 32), lambda f: os.kill(os.getpid(), signal.SIGKILL))"
    )
    place, root = tmp_path / "store", Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", code, str(place)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not place.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had begun, under a private name
    table = plan_table(100, 5)
    assert create_store(place, table, corpus_info(table, 32), save_no_tokenizer).num_rows == 100
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_the_loser_of_two_creations_does_not_harm_the_winner_s_store(
    tmp_path: Path, error: BaseException | None
) -> None:
    """The same spec was started twice; one finishes while the other is about to, or is about to fail."""
    table = plan_table(100, 5)
    place = tmp_path / "store"

    def finished_meanwhile(folder: Path) -> None:
        create_store(place, table, corpus_info(table, 32), save_no_tokenizer)
        save_no_tokenizer(folder)
        if error is not None:
            raise error

    with contextlib.suppress(StorageError, KeyboardInterrupt):
        create_store(place, table, corpus_info(table, 32), finished_meanwhile)
    store = open_store(place)
    np.testing.assert_array_equal(store.columns(0, 100)["token"], table.columns["token"])
    assert store.documents.equals(table.documents)


def test_a_creation_that_finds_another_store_at_the_end_does_not_take_it_for_its_own(tmp_path: Path) -> None:
    mine, theirs = plan_table(100, 5, seed=1), plan_table(100, 5, seed=2)
    place = tmp_path / "store"

    def finished_meanwhile(folder: Path) -> None:
        create_store(place, theirs, corpus_info(theirs, 32), save_no_tokenizer)
        save_no_tokenizer(folder)

    with pytest.raises(StorageError):
        create_store(place, mine, corpus_info(mine, 32), finished_meanwhile)
    np.testing.assert_array_equal(open_store(place).columns(0, 100)["token"], theirs.columns["token"])


def test_the_corpus_digest_is_what_the_format_says(tmp_path: Path) -> None:
    """Computed from the files, chunk by chunk: several chunks a column, and a documents part."""
    rows = 2**18 + 10
    table = plan_table(rows, 30)
    store = create_store(tmp_path / "store", table, corpus_info(table, 1024), save_no_tokenizer)
    corpus = store.path / "corpus"
    found: dict[str, list[str]] = {}
    for array in corpus.glob("*/zarr.json"):
        about = json.loads(array.read_bytes())
        (length,), (chunk,) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
        size = {"int32": 4, "int64": 8}[about["data_type"]]
        assert chunk == 2**18
        found[array.parent.name] = [
            hashlib.sha256(
                (array.parent / "c" / str(n)).read_bytes()[: size * min(chunk, length - n * chunk)]
            ).hexdigest()
            for n in range(-(-length // chunk))
        ]
    file = pq.ParquetFile(corpus / "documents" / "part-00000.parquet")
    sha = hashlib.sha256()
    for group in range(file.num_row_groups):
        for name, values in file.read_row_group(group).to_pydict().items():
            sha.update(json.dumps([name, values], default=str).encode() if name != "source" else b"")
    found["documents"] = [sha.hexdigest()]
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    assert len(found["token"]) == 2
    assert store.info.corpus_digest == hashlib.sha256(text.encode()).hexdigest()


def test_contexts_are_read_whole(made: Store) -> None:
    """BOS stands before the rows of each, as plan_table made them."""
    columns = made.columns(0, made.num_rows, ["token", "context"])
    contexts = made.context_tokens(1, 3)
    assert [c.tolist() for c in contexts] == [
        [0, *columns["token"][columns["context"] == number].tolist()] for number in (1, 2, 3)
    ]


def test_moments_that_are_not_the_committed_ones_are_refused(tmp_path: Path) -> None:
    """Parquet itself has no checksum that is compared: a flipped bit would move every mean made from it."""
    store = write_store(tmp_path / "store")
    (harvest,) = store.harvests
    path = log_of(store, harvest).moments_place(0).path
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="do not match their commit"):
        merged_moments(store, next(iter(harvest.sites)), [0])
