"""Any one byte of any object of a store flipped, taken out, or the end cut off: `verify` finds it and names the object.

GRANARY_CORRUPTIONS says how many cases; `make faults` runs at least 2,000. Seeded, object after object: every object
of the store, the smallest record included, is damaged equally often.
"""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_store
from s3 import S3Server

from storage.backends.place import open_place
from storage.store import Store
from storage.verify.findings import Fault
from storage.verify.verify import verify

CASES = int(os.environ.get("GRANARY_CORRUPTIONS", "330"))
FEW = 60
"""Cases of `make test`, on as many objects."""


def names_with_faults(store: Path) -> set[str]:
    root = open_place(store)
    return {finding.place.below(root) for finding in verify(root) if isinstance(finding, Fault)}


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it. They differ from `content` in any case."""
    at = rng.randrange(len(content))
    kind = rng.choice(["bit flipped", "byte replaced", "byte taken out", "cut"])
    if kind == "bit flipped":
        return kind, content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == "byte replaced":
        return kind, content[:at] + bytes([(content[at] + rng.randrange(1, 256)) % 256]) + content[at + 1 :]
    return kind, content[:at] + (content[at + 1 :] if kind == "byte taken out" else b"")


def kind_of(name: str) -> str:
    return name.rpartition("/")[2] if name.endswith("zarr.json") else name.partition("/")[0]


def test_a_sound_store_has_no_fault_and_nothing_unknown(whole: Store) -> None:
    assert list(verify(whole.root)) == []


@pytest.mark.parametrize("cases", [range(FEW), pytest.param(range(FEW, CASES), marks=pytest.mark.slow)])
def test_any_damaged_byte_is_found_and_its_object_named(whole: Store, tmp_path: Path, cases: range) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole.path, store)
    objects = sorted(path for path in store.rglob("*") if path.is_file())
    random.Random(0).shuffle(objects)
    tried: Counter[tuple[str, str]] = Counter()
    missed = []
    for case in cases:
        path = objects[case % len(objects)]
        name, content = str(path.relative_to(store)), path.read_bytes()
        kind, bad = damaged(content, random.Random(case))
        path.write_bytes(bad)
        if name not in names_with_faults(store):
            missed.append((case, kind, name))
        path.write_bytes(content)
        tried[kind_of(name), kind] += 1
    for what, kind in sorted(tried):
        print(f"{what:12} {kind:15} {tried[what, kind]:5} cases")
    print(f"{len(cases)} cases on {len(objects)} objects, {len(missed)} missed")
    assert missed == []
    assert names_with_faults(store) == set()


@pytest.mark.slow
@pytest.mark.parametrize("unit", [0, 1, 6])
def test_shards_and_their_indexes(unit: int) -> None:
    """On object stores a unit is one object: its chunks, and an index that other readers go by."""
    store = write_store(f"memory://shards-{unit}")
    assert list(verify(store.root)) == []
    assert set(store.root.backend.walk("")) >= {"zarr.json", "corpus/token/c/0"}
    place = store.array("resid_post.0").object_place(unit)
    content = place.read()
    rng = random.Random(unit)
    for at in [*rng.sample(range(len(content)), 40), *range(len(content) - 68, len(content))]:
        place.write(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        [fault] = [finding for finding in verify(store.root) if isinstance(finding, Fault)]
        assert fault.place == place
        in_index = at >= len(content) - len(store.array("resid_post.0").shard_index(1))
        assert ("index" in fault.found) == in_index
    for cut in (b"", content[:1], content[:-1], content[1:], content + b"0"):
        place.write(cut)
        [fault] = [finding for finding in verify(store.root) if isinstance(finding, Fault)]
        assert (fault.place, fault.found) == (place, f"{len(cut)} bytes")
    place.write(content)
    assert list(verify(store.root)) == []


def test_a_bucket(s3: S3Server) -> None:
    """The same on a real S3 server: what is sound is clean, and a damaged object of each kind is named."""
    store = write_store(s3.make_bucket() + "/store", num_rows=70)
    assert list(verify(store.root)) == []
    for key in sorted(store.root.backend.walk("")):
        place = store.root / key
        content = place.read()
        place.write(content[:-1])
        assert key in {f.place.below(store.root) for f in verify(store.root) if isinstance(f, Fault)}
        place.write(content)
