"""Harvests on an S3 server of which a share of the requests fails. Seeded.

The oracle is the harvest whose requests were left alone: the same objects, and one commit a unit.
Used by test_s3_faults.py (a short sample), tests/integration/test_s3.py and, for all of it, by the campaign.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from processes import KINDS, QUICK, Run, write_spec
from s3 import S3Server, running_proxy

from storage.backends.place import Place, open_place
from storage.store import open_store

STALL_S = 0.5
"""Silence after which the client gives a request up; the proxy holds it for three times as long."""


@dataclass(frozen=True)
class Disturbed:
    """A harvest that was disturbed: where it is, and how many requests were left alone and spoiled, by kind."""

    url: str
    counts: dict[str, int]

    @property
    def spoiled(self) -> int:
        return sum(number for kind, number in self.counts.items() if kind != "forwarded")


def harvest(folder: Path, corpus: Path, url: str, server: S3Server, *, rows: int = 120_000) -> str:
    """Harvest into a new store at `url`, undisturbed; return its URL."""
    spec = write_spec(folder, corpus, store=url, corpus={"rows": rows}, cluster=QUICK)
    Run.start("harvest", spec, environment=server.environment()).wait()
    return url


def harvest_through_faults(
    folder: Path, corpus: Path, url: str, server: S3Server, *, rate: float, seed: int, rows: int = 120_000
) -> Disturbed:
    """Harvest into a new store at `url` while a share `rate` of all requests is spoiled, in every way there is."""
    spec = write_spec(folder, corpus, store=url, corpus={"rows": rows}, cluster=QUICK)
    with running_proxy(server, "--rate", rate, "--seed", seed, "--stall-s", 3 * STALL_S) as proxy:
        run = Run.start("harvest", spec, environment=proxy.environment(GRANARY_STALL_S=str(STALL_S)))
        try:
            run.wait()
        finally:
            run.end()
        return Disturbed(url, proxy.counts())


def objects_of(place: Place) -> dict[str, bytes]:
    """Every object below a place, with its content."""
    found = {}
    for name in place.names():
        below = objects_of(place / name)
        found |= (
            {f"{name}/{key}": content for key, content in below.items()} if below else {name: (place / name).read()}
        )
    return found


def digests(objects: dict[str, bytes]) -> dict[str, str]:
    """Those of the objects that hold rows."""
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in objects.items()
        if name.startswith(KINDS) and not name.endswith("zarr.json")
    }


def check_same_objects(url: str, undisturbed: str) -> None:
    """Raise AssertionError unless a store has the rows of the undisturbed one, each unit is committed once, nothing is
    left over, and every chunk is sound. The server's address and keys must be in the environment."""
    found, expected = objects_of(open_place(url)), objects_of(open_place(undisturbed))
    mine, theirs = digests(found), digests(expected)
    assert mine == theirs, sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))[:10]
    (made,) = open_store(url).harvests
    units = [
        json.loads(content)["unit"] for name, content in found.items() if name.startswith(f"commits/{made.digest}/0")
    ]
    assert sorted(units) == list(range(open_store(url).info.num_units))
    assert "creating.json" not in found
    store = open_store(url)
    for site in store.sites:  # each raises for a chunk that is missing or damaged
        assert len(store.read(site)) == len(store.norms(site)) == store.num_rows
