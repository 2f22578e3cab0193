"""Which names a store has that nobody reads: what killed processes left, and what is not ours."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from storage.create import CLAIM
from storage.findings import Note, below
from storage.growth import GROWTHS, TABLE_NAME, tables_kept
from storage.harvests import CHECKSUMS, Harvest
from storage.places import Place
from storage.reader import StoreReader
from storage.unitsets import UNIT_NAME

SHOWN = 20
"""Unknown names that are told one by one."""

_NUMBER, _UNIT, _NAME = r"\d+", UNIT_NAME, r"[^/]+"
_CHUNK = rf"c/{_NUMBER}(?:/0)?"


def name_notes(store: StoreReader, harvests: Sequence[Harvest]) -> Iterator[Note]:
    """Walk through all names of the store; tell of those that no reader would ever open."""
    known = re.compile("|".join(_known(store, harvests)))
    temporary = unknown = 0
    tables: Counter[str] = Counter()
    first = ""
    for key in store.root.backend.walk(store.root.key):
        name = below(Place(store.root.backend, key), store.root)
        if known.fullmatch(name):
            continue
        base = name.rpartition("/")[2]
        if base.startswith(".") and base.endswith(".tmp"):
            temporary += 1
            first = first or name
        elif (top := name.partition("/")[0]) != store.info.folder and TABLE_NAME.fullmatch(top):
            tables[top] += 1
        elif name == CLAIM:
            yield Note(f"{name} was left by the making of the store and may be removed")
        else:
            unknown += 1
            if unknown <= SHOWN:
                yield Note(f"{name} is not part of the store and was not checked")
    if unknown > SHOWN:
        yield Note(f"and {unknown - SHOWN} more names that are not part of the store")
    kept = tables_kept(store.info)
    for folder, names in tables.items():
        why = (
            "the table from before the store grew, for readers that have it open"
            if folder in kept
            else "a table that no reader knows: somebody is growing the store, or was killed at it"
        )
        yield Note(f"{folder}/ ({names} names) is {why}; it was not checked, and goes when the store next grows")
    if temporary:
        yield Note(
            f"{temporary} temporary file(s) of writers that are at work or were killed, the first is {first}; "
            "`granary harvest` removes them when every unit is committed"
        )


def _known(store: StoreReader, harvests: Sequence[Harvest]) -> Iterator[str]:
    """Patterns of the names that belong to the store, whether or not they must be there."""
    yield r"zarr\.json|report\.html"
    arrays = "|".join(map(re.escape, [*store.info.row_columns, "context_token", "context_start"]))
    table = re.escape(store.info.folder)
    yield rf"{GROWTHS}/\d{{8}}\.json"
    yield rf"{table}/zarr\.json|{table}/(?:{arrays})/(?:zarr\.json|{_CHUNK})"
    yield from (re.escape(f"{store.info.folder}/{name}") for name in store.info.files)
    for harvest in harvests:
        model, sites = re.escape(harvest.model), "|".join(map(re.escape, harvest.sites))
        names = rf"zarr\.json|{model}/zarr\.json|{model}/(?:{sites})/(?:zarr\.json|{_CHUNK})"
        kinds = "|".join(CHECKSUMS)
        yield rf"(?:{kinds})/(?:{names})"
        yield rf"moments/{harvest.digest}/{_UNIT}\.parquet|failures/{harvest.digest}/{_UNIT}\.json"
        commits = rf"harvest\.json|committed\.json|drivers/{_NAME}\.json|\d{{6}}/{_UNIT}\.json"
        yield rf"commits/{harvest.digest}/(?:{commits})"
    yield rf"anchors/zarr\.json|anchors/{_NAME}/(?:zarr\.json|anchors\.json|{_NAME}/(?:zarr\.json|{_CHUNK}))"
    yield rf"runs/{_NAME}/(?:run|curve|dictionary|evaluation)\.json"
    yield rf"runs/{_NAME}/(?:checkpoint|dictionary|normalisation)\.safetensors"
