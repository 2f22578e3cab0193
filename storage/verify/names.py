"""Which names a store has that nobody reads: what killed processes left, and what is not ours."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from storage.backends.place import Place
from storage.format.layout import (
    ANCHOR_ARRAY,
    ANCHOR_RECORD,
    ANCHORS,
    ARRAY,
    BITMAP,
    CHUNK,
    CLAIM,
    COMMIT,
    DRIVER,
    FAILURE,
    GROUP,
    GROWTH,
    HARVEST,
    MOMENTS,
    REPORT,
    RUN,
    RUN_FILES,
    pattern,
)
from storage.harvest.harvest import CHECKSUMS, Harvest
from storage.make.grow import TABLE_NAME, tables_kept
from storage.read.reader import StoreReader
from storage.table.root import CONTEXT_COLUMNS
from storage.verify.findings import Note

SHOWN = 20
"""Unknown names that are told one by one."""


def name_notes(store: StoreReader, harvests: Sequence[Harvest]) -> Iterator[Note]:
    """Walk through all names of the store; tell of those that no reader would ever open."""
    known = re.compile("|".join(_known(store, harvests)))
    temporary = unknown = 0
    tables: Counter[str] = Counter()
    first = ""
    for key in store.root.backend.walk(store.root.key):
        name = Place(store.root.backend, key).below(store.root)
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
    table = store.info.folder
    yield from (re.escape(name) for name in (GROUP, REPORT, f"{table}/{GROUP}"))
    yield pattern(GROWTH)
    for column in (*store.info.row_columns, *CONTEXT_COLUMNS):
        yield from _array(f"{table}/{column}")
    yield from (re.escape(f"{table}/{name}") for name in store.info.files)
    for harvest in harvests:
        yield from (
            pattern(name, harvest=harvest.digest) for name in (HARVEST, BITMAP, DRIVER, COMMIT, MOMENTS, FAILURE)
        )
        for kind in CHECKSUMS:
            yield from (re.escape(f"{group}/{GROUP}") for group in (kind, f"{kind}/{harvest.model}"))
            for site in harvest.sites:
                yield from _array(ARRAY.format(kind=kind, model=harvest.model, site=site))
    yield re.escape(f"{ANCHORS}/{GROUP}")
    yield pattern(f"{ANCHORS}/{{anchors}}/{GROUP}")
    yield pattern(ANCHOR_RECORD)
    yield from (pattern(f"{ANCHOR_ARRAY}/{name}") for name in (GROUP, CHUNK))
    yield from (pattern(f"{RUN}/{file}") for file in RUN_FILES.values())


def _array(place: str) -> Iterator[str]:
    """Patterns of the names of an array: its metadata and its chunks."""
    yield re.escape(f"{place}/{GROUP}")
    yield re.escape(f"{place}/") + pattern(CHUNK)
