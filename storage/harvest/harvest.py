"""Harvests: which bytes belong together, and what determines them.

A harvest is named by the digest of everything that determines its bytes, never of paths, worker counts or times.
Its record is written create-only before anything else of it.
What happens between any two steps is in docs/decisions/0007-commits-and-supervision.md.
"""

import os
import secrets
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from storage.backends.local import remove_temporaries
from storage.backends.place import Place
from storage.errors import StorageError, StoreMismatch
from storage.format.arrays import DTYPES, RowArray, write_group
from storage.format.layout import StoreLayout
from storage.format.records import Record, encode, read_record
from storage.harvest.identity import HarvestIdentity

CHECKSUMS = {"activations": "crc32c", "norms": "norms_crc32c", "scales": "scales_crc32c"}
"""Kind of array, which is the name of its group -> the key of its chunks' checksums in a commit."""


@dataclass(frozen=True)
class SiteLayout:
    """How the arrays of a site are laid out."""

    d: int
    """Width of a row, d_model."""
    dtype: str
    """Stored data type."""
    chunk_rows: int

    @classmethod
    def of(cls, d: int, dtype: str, rows_per_unit: int) -> "SiteLayout":
        """The layout of a new site: chunks of at most 4 MiB."""
        return cls(d, dtype, chunk_rows_for(rows_per_unit, d, DTYPES[dtype].itemsize))

    @classmethod
    def from_record(cls, record: Record) -> "SiteLayout":
        """Raises StorageError that says what it lacks."""
        if lacking := [name for name in cls.__dataclass_fields__ if name not in record]:
            raise StorageError(f"the layout of a site lacks {', '.join(lacking)}")
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    @property
    def kinds(self) -> list[str]:
        """The kinds of arrays that the site has."""
        return ["activations", "norms", *(["scales"] if self.dtype == "int8" else [])]

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes in all arrays of the site."""
        return self.d * DTYPES[self.dtype].itemsize + 4 * len(self.kinds[1:])


@dataclass(frozen=True)
class Harvest:
    """One set of sites of one model over all rows of the store."""

    digest: str
    model: str
    """The name under activations/ and norms/."""
    sites: dict[str, SiteLayout]
    identity: HarvestIdentity
    """What determines the bytes; `digest` is its digest."""
    made_with: Record
    """Library versions and device at the start: for the reader's information, not part of the identity."""

    @classmethod
    def of(cls, identity: HarvestIdentity, model: str, sites: dict[str, SiteLayout], made_with: Record) -> "Harvest":
        return cls(identity.digest, model, sites, identity, made_with)

    @classmethod
    def from_record(cls, record: Record, *others: str) -> "Harvest":
        """Raises StorageError that says what it lacks, of the harvest's own fields or of `others`."""
        if lacking := [name for name in (*others, *cls.__dataclass_fields__) if name not in record]:
            raise StorageError(f"it lacks {', '.join(lacking)}")
        sites = {site: SiteLayout.from_record(layout) for site, layout in record["sites"].items()}
        return cls(record["digest"], record["model"], sites, HarvestIdentity(record["identity"]), record["made_with"])

    def to_record(self) -> Record:
        return {**asdict(self), "identity": self.identity.record}

    def arrays(self, store: Place, num_rows: int, site: str) -> dict[str, RowArray]:
        """The arrays of a site by kind: activations, norms, and for int8 the scales of its rows."""
        layout, places = self.sites[site], StoreLayout(store)
        rows_per_unit = self.identity.rows_per_unit
        about = {"harvest": self.digest, "model": self.model, "site": site, "rows_per_unit": rows_per_unit}
        attributes = {"granary": about}
        activations = RowArray(
            path=places.array("activations", self.model, site),
            shape=(num_rows, layout.d),
            dtype=layout.dtype,
            chunk_rows=layout.chunk_rows,
            dimension_names=("row", "d_model"),
            attributes=attributes,
            shard_rows=None if store.backend.is_local else rows_per_unit,
        )
        of_rows = {
            kind: RowArray(
                path=places.array(kind, self.model, site),
                shape=(num_rows,),
                dtype="float32",
                chunk_rows=rows_per_unit,
                dimension_names=("row",),
                attributes=attributes,
            )
            for kind in layout.kinds[1:]
        }
        return {"activations": activations, **of_rows}


def chunk_rows_for(rows_per_unit: int, width: int, itemsize: int, target_bytes: int = 4 * 2**20) -> int:
    """Rows of a chunk: the largest power-of-two part of a unit that stays within `target_bytes` (4 MiB)."""
    rows = rows_per_unit
    while rows * width * itemsize > target_bytes and rows % 2 == 0:
        rows //= 2
    return rows


def read_harvests(store: Place) -> list[Harvest]:
    """Every harvest of a store, oldest first."""
    found = []
    for name in StoreLayout(store).harvests.names():
        with suppress(FileNotFoundError):
            found.append(read_harvest(store, name))
    return [harvest for _, harvest in sorted(found, key=lambda of: (of[0], of[1].digest))]


def read_harvest(store: Place, name: str) -> tuple[float, Harvest]:
    """When a harvest was declared, and the harvest. Raises FileNotFoundError, or StorageError for a damaged record."""
    path = StoreLayout(store).harvest(name)
    record = read_record(path)
    try:
        harvest = Harvest.from_record(record, "created")
        return record["created"], harvest
    except StorageError as error:
        raise StorageError(f"the record {path} is damaged: {error}") from None


def match_harvests(
    store: Place, identity: HarvestIdentity, model: str, sites: Mapping[str, str], by_machine: Collection[str] = ()
) -> tuple[list[Harvest], list[str]]:
    """Find which of `sites` (with the types to store them as) the store has, or is getting: return their harvests, and
    the sites no harvest holds.

    `identity` is a harvest's without its sites; `by_machine` are the fields of its computation that were chosen for
    this machine, of which the stored ones stand. Raises StoreMismatch, showing both values, when a site of the same
    model is stored under another identity, or as another type.
    """
    matching: list[Harvest] = []
    missing = list(sites)
    for harvest in read_harvests(store):
        shared = [s for s in sites if s in harvest.sites]
        if harvest.model != model or not shared:
            continue
        otherwise = harvest.identity.differences(identity, by_machine)
        types = {site: (harvest.sites[site].dtype, sites[site]) for site in shared}
        if other_types := dict.fromkeys((a, b) for a, b in types.values() if a != b):
            otherwise += [f"harvest.dtype: {a!r} in the store, {b!r} in the spec" for a, b in other_types]
        if otherwise:
            second = next((f"{site}@{wanted}" for site, (had, wanted) in types.items() if had != wanted), None)
            raise StoreMismatch(
                f"{', '.join(shared)} of {model} {'is' if len(shared) == 1 else 'are'} stored already, harvested "
                f"otherwise: {'; '.join(otherwise)}. Give the spec the stored values, or harvest into another store"
                + (f"; a site is stored a second time, as another type, under a name like {second}" if second else "")
            )
        matching.append(harvest)
        missing = [s for s in missing if s not in shared]
    return matching, missing


def declare_harvest(store: Place, num_rows: int, harvest: Harvest) -> None:
    """Write the harvest's record, then the metadata of its arrays. Every step is create-only, so it may be repeated."""
    layout = StoreLayout(store)
    layout.harvest(harvest.digest).create(encode({**harvest.to_record(), "created": time.time()}))
    for kind in dict.fromkeys(kind for site in harvest.sites.values() for kind in site.kinds):
        write_group(layout.group(kind), {})
        write_group(layout.group(kind, harvest.model), model_attributes(harvest))
    for site in harvest.sites:
        for array in harvest.arrays(store, num_rows, site).values():
            array.create()


def model_attributes(harvest: Harvest) -> Record:
    """The attributes of a model's groups, as the model's first harvest writes them."""
    return {"granary": {**harvest.identity.of_model, "made_with": harvest.made_with}}


def sweep(store: Place, harvest: Harvest) -> None:
    """Remove what killed writers left behind, once every unit is committed. A writer that still lives then fails to
    publish a unit that is committed already, and loses nothing. Object stores have no temporary names."""
    if not store.backend.is_local:
        return
    layout = StoreLayout(store)
    for site, of_site in harvest.sites.items():
        for kind in of_site.kinds:
            remove_temporaries(layout.array(kind, harvest.model, site).path)
    remove_temporaries(layout.all_moments(harvest.digest).path)
    remove_temporaries(layout.commits(harvest.digest).path)


def writer_id() -> str:
    """A name for this process that no other process has had: host, pid and a random part."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
