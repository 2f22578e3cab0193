"""What is missing or damaged in a store is named, by unit, by array and chunk, or by file, and nothing is changed."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import start_harvest
from lab import SITE, SITES, Lab

from storage.errors import CorruptChunk
from storage.store import open_store

pytestmark = pytest.mark.usefixtures("no_ray")


def test_rows_that_are_not_harvested_are_named_by_unit(lab: Lab, llama: Path, corpus: Path) -> None:
    start_harvest(lab.store, llama, corpus, SITES).run([1])
    fetch = ("--site", SITE, "--out", lab.folder / "x.npy")
    assert lab.run("query", lab.store, "select row from rows where row between 1024 and 2047", *fetch)
    (lab.folder / "x.npy").unlink()
    err = lab.refused("query", lab.store, "select row from rows", *fetch)
    assert "3 of the 4 units asked for are not harvested for resid_post.1: 0, 2-3 (units are 1024 rows)" in err
    assert "run `granary harvest` first" in err
    err = lab.refused("query", lab.store, "select 0 as row", *fetch)
    assert "1 of the 1 units asked for are not harvested for resid_post.1: 0 " in err
    err = lab.refused("anchors", lab.spec({"anchors": {"name": "a", "by": "year", "min_rows": 10}}))
    assert "not harvested for resid_post.1: 0, 2-3 " in err
    assert "resid_post.1, mlp_in.0, mlp_out.0" in lab.run("status", lab.store)
    assert "1 of 4 units" in lab.run("status", lab.store)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(cut, "has 65440 bytes, not 65540"), (flip_a_bit, "does not match its crc32c"), (Path.unlink, "is missing")],
)
def test_a_damaged_chunk_is_named(stored: Lab, damage: Callable[[Path], None], expected: str) -> None:
    store = open_store(stored.store)
    array = store.array(SITE)
    damage(array.object_place(2).path)
    where = f"chunk 2 of activations/{store.harvests[0].model}/{SITE} ({array.object_place(2).path}) {expected}"
    fetch = ("--site", SITE, "--out", stored.folder / "x.npy")
    err = stored.refused("query", stored.store, "select row from rows", *fetch)
    again = f"`granary verify STORE --repair` makes unit 2 of harvest {store.harvests[0].digest} again"
    assert err == f"granary: {where}; {again}\n"
    with pytest.raises(CorruptChunk) as caught:
        list(store.stream([SITE], batch_rows=512, steps=8))
    assert where in str(caught.value)
    stored.run("query", stored.store, "select row from rows where row < 2048", *fetch)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
def test_a_damaged_column_is_named(stored: Lab, damage: Callable[[Path], None]) -> None:
    damage(open_store(stored.store).path / "corpus" / "token" / "c" / "0")
    err = stored.refused("query", stored.store, "select max(token) from rows")
    assert "chunk 0 of store/corpus/token (" in err


def write_garbage(path: Path) -> None:
    path.write_bytes(b"\x00 not what was here")


@pytest.mark.parametrize("damage", [cut, write_garbage, Path.unlink])
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("corpus/documents/part-00000.parquet", ("query", "select * from documents")),
        ("corpus/tokenizer/tokenizer.json", ("query", "select * from tokens")),
        ("corpus/token/zarr.json", ("query", "select * from rows")),
        ("activations/*/resid_post.1/zarr.json", ("status",)),
        ("activations/*/resid_post.1/zarr.json", ("report",)),
        ("moments/*/00000001.parquet", ("anchors",)),
    ],
)
def test_a_damaged_file_is_named(
    stored: Lab, damage: Callable[[Path], None], file: str, command: Sequence[str]
) -> None:
    (path,) = stored.store.glob(file)
    damage(path)
    spec = stored.spec({"anchors": {"name": "a", "by": "year", "min_rows": 10}})
    err = stored.refused(command[0], spec if command == ("anchors",) else stored.store, *command[1:])
    assert str(path) in err or str(path.parent) in err


@pytest.mark.parametrize("damage", [cut, write_garbage])
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("zarr.json", ("status",)),
        ("commits/*/harvest.json", ("status",)),
        ("commits/*/000000/00000001.json", ("query", "select * from units")),
    ],
)
def test_a_damaged_record_is_named(
    stored: Lab, damage: Callable[[Path], None], file: str, command: Sequence[str]
) -> None:
    (path,) = stored.store.glob(file)
    damage(path)
    assert f"the record {path} is damaged: " in stored.refused(command[0], stored.store, *command[1:])


def test_a_record_of_another_shape_is_named(stored: Lab) -> None:
    (path,) = stored.store.glob("commits/*/harvest.json")
    path.write_text("{}")
    assert str(path) in stored.refused("status", stored.store)
