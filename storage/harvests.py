"""Harvests and their commits: which bytes belong together, and which units of them may be read.

A harvest is named by the digest of everything that determines its bytes, never of paths, worker counts or times.
Its record is written create-only before its first unit; a unit's commit is written create-only after its last byte is
durable. What happens between any two steps is in docs/decisions/0002-units-and-commits.md.
"""

import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.arrays import RowArray
from storage.errors import StorageError, StoreMismatch
from storage.files import create_file, remove_temporaries
from storage.records import Record, differences, digest, encode, read_record

COMMIT_DIGITS = 8
"""Digits of a unit in its commit's file name, so that names sort as numbers."""


@dataclass(frozen=True)
class Harvest:
    """One set of sites of one model over all rows of the store."""

    digest: str
    model: str
    """The name under activations/ and norms/."""
    sites: dict[str, Record]
    """Site -> {"d": width, "dtype": stored data type, "chunk_rows": rows of a chunk}."""
    identity: Record
    """What determines the bytes; `digest` is its digest."""
    made_with: Record
    """Library versions and device at the start: for the reader's information, not part of the identity."""

    @classmethod
    def of(cls, identity: Record, model: str, sites: dict[str, Record], made_with: Record) -> "Harvest":
        return cls(digest(identity)[:16], model, sites, identity, made_with)

    def arrays(self, store: Path, num_rows: int, site: str) -> tuple[RowArray, RowArray]:
        """The activation array and the norm array of a site."""
        layout = self.sites[site]
        rows_per_unit = self.identity["rows_per_unit"]
        about = {"harvest": self.digest, "model": self.model, "site": site, "rows_per_unit": rows_per_unit}
        attributes = {"granary": about}
        activations = RowArray(
            path=store / "activations" / self.model / site,
            shape=(num_rows, layout["d"]),
            dtype=layout["dtype"],
            chunk_rows=layout["chunk_rows"],
            dimension_names=("row", "d_model"),
            attributes=attributes,
        )
        norms = RowArray(
            path=store / "norms" / self.model / site,
            shape=(num_rows,),
            dtype="float32",
            chunk_rows=layout["chunk_rows"],
            dimension_names=("row",),
            attributes=attributes,
        )
        return activations, norms


def chunk_rows_for(rows_per_unit: int, width: int, itemsize: int, target_bytes: int = 4 * 2**20) -> int:
    """Rows of a chunk: the largest power-of-two part of a unit that stays within `target_bytes` (4 MiB)."""
    rows = rows_per_unit
    while rows * width * itemsize > target_bytes and rows % 2 == 0:
        rows //= 2
    return rows


def read_harvests(store: Path) -> list[Harvest]:
    """Every harvest of a store, oldest first."""
    fields = Harvest.__dataclass_fields__
    records = []
    for path in (store / "commits").glob("*/harvest.json"):
        record = read_record(path)
        if lacking := [name for name in ("created", *fields) if name not in record]:
            raise StorageError(f"the record {path} is damaged: it lacks {', '.join(lacking)}")
        records.append(record)
    records.sort(key=lambda record: (record["created"], record["digest"]))
    return [Harvest(**{name: record[name] for name in fields}) for record in records]


def match_harvests(store: Path, identity: Record, model: str, sites: Sequence[str]) -> tuple[list[Harvest], list[str]]:
    """Find which of `sites` the store has, or is getting: return their harvests, and the sites no harvest holds.

    `identity` is a harvest's without its sites. Raises StoreMismatch, showing both values, when a site of the same
    model is stored under another identity.
    """
    matching: list[Harvest] = []
    missing = list(sites)
    for harvest in read_harvests(store):
        shared = [s for s in sites if s in harvest.sites]
        if harvest.model != model or not shared:
            continue
        stored = {k: v for k, v in harvest.identity.items() if k != "sites"}
        if stored != identity:
            raise StoreMismatch(
                f"{', '.join(shared)} of {model} {'is' if len(shared) == 1 else 'are'} stored already, harvested "
                f"otherwise: {'; '.join(differences(stored, identity))}. "
                "Give the spec the stored values, or harvest into another store"
            )
        matching.append(harvest)
        missing = [s for s in missing if s not in shared]
    return matching, missing


def declare_harvest(store: Path, num_rows: int, harvest: Harvest) -> None:
    """Write the metadata of the harvest's arrays, then its record. Every step is create-only, so it may be repeated."""
    for kind in ("activations", "norms"):
        group_attributes = {k: v for k, v in harvest.identity.items() if k in ("model", "tokenizer_digest")}
        _create_group(store / kind, {})
        _create_group(store / kind / harvest.model, {"granary": {**group_attributes, "made_with": harvest.made_with}})
    for site in harvest.sites:
        for array in harvest.arrays(store, num_rows, site):
            array.create()
    record = {name: getattr(harvest, name) for name in Harvest.__dataclass_fields__}
    create_file(store / "commits" / harvest.digest / "harvest.json", encode({**record, "created": time.time()}))


def _create_group(path: Path, attributes: dict[str, Any]) -> None:
    create_file(path / "zarr.json", encode({"zarr_format": 3, "node_type": "group", "attributes": attributes}))


def sweep(store: Path, harvest: Harvest) -> None:
    """Remove what killed writers left behind, once every unit is committed. A writer that still lives then fails to
    publish a unit that is committed already, and loses nothing."""
    for kind in ("activations", "norms"):
        for site in harvest.sites:
            remove_temporaries(store / kind / harvest.model / site)
    remove_temporaries(store / "moments" / harvest.digest)
    remove_temporaries(store / "commits" / harvest.digest)


def commit_path(store: Path, harvest: str, unit: int) -> Path:
    return store / "commits" / harvest / f"{unit:0{COMMIT_DIGITS}d}.json"


def moments_path(store: Path, harvest: str, unit: int) -> Path:
    return store / "moments" / harvest / f"{unit:0{COMMIT_DIGITS}d}.parquet"


def committed_units(store: Path, harvest: str) -> frozenset[int]:
    """The units whose commit is there."""
    folder = store / "commits" / harvest
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return frozenset()
    return frozenset(int(n[:COMMIT_DIGITS]) for n in names if len(n) == COMMIT_DIGITS + 5 and n[0].isdigit())


def read_commit(store: Path, harvest: str, unit: int) -> Record:
    """Read a unit's commit. Raises StorageError when there is none or it is damaged."""
    try:
        record = read_record(commit_path(store, harvest, unit))
    except FileNotFoundError:
        raise StorageError(f"unit {unit} of harvest {harvest} has no commit") from None
    if record.get("unit") != unit or record.get("harvest") != harvest:
        raise StorageError(f"the commit {commit_path(store, harvest, unit)} is of another unit or harvest")
    return record


def writer_id() -> str:
    """A name for this process that no other process has had: host, pid and a random part."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
