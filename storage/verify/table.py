"""Checks of the table of rows: its arrays, documents and tokenizer, against the root record.

Nothing of a table can be made again from the store: the advice is a copy, or a new store from the same corpus.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from storage.backends.place import Place
from storage.errors import CorruptChunk, Unreachable
from storage.format.arrays import RowArray, group_metadata
from storage.format.layout import GROUP, StoreLayout
from storage.format.records import encode
from storage.make.create import TableFiles, corpus_digest, documents_digest, sha256_of
from storage.make.grow import growth_record, sizes_of
from storage.read.reader import StoreReader
from storage.table.root import CorpusInfo
from storage.verify.findings import ByHand, Check, Checked, Fault, Finding, Note, Rewrite, check_record, read_sound
from storage.verify.units import check_object

LOST = ByHand(
    "restore it from a copy; if there is none, harvest into another store: the same corpus and settings give the "
    "same rows"
)

Run = Callable[[Iterable[Check]], Iterator[Fault]]
Digests = dict[str, dict[int, str]]
"""Array or `documents` -> digest of each of its chunks or files, as far as they are sound."""


def corpus_findings(store: StoreReader, run: Run, *, data: bool) -> Iterator[Finding]:
    """Check the metadata of the table and, if `data`, every byte of it and its digest."""
    info, folder = store.info, store.table
    sizes = sizes_of(info)
    files = TableFiles(folder, sizes)
    yield from run(_growth_checks(store))
    arrays = {name: files.array(name) for name in sizes.arrays()}
    yield from run(_metadata_checks(folder, arrays.values()))
    if StoreLayout(store.root).growth(info.generation + 1).exists():
        yield Note("a growth of the store was begun and not finished: `granary harvest SPEC --grow` finishes it")
    if not data:
        return
    digests: Digests = {name: {} for name in (*arrays, "documents")}
    faults = 0
    for fault in run(_data_checks(store, arrays, digests)):
        faults += 1
        yield fault
    if not faults:
        ordered = {name: [of[part] for part in sorted(of)] for name, of in digests.items()}
        if (found := corpus_digest(ordered)) != info.corpus_digest:
            yield Fault(StoreLayout(store.root).root_record, f"the corpus digest {info.corpus_digest}", found, LOST)


def _growth_checks(store: StoreReader) -> Iterator[Check]:
    """The records of growths. That of the present table is the root record once more."""
    for generation in range(2, store.info.generation + 1):
        place = StoreLayout(store.root).growth(generation)
        again = Rewrite(encode(growth_record(store.info, generation)))
        yield partial(_check_growth, place, again, store.info if generation == store.info.generation else None)


def _check_growth(place: Place, again: Rewrite, present: CorpusInfo | None) -> Checked:
    found = read_sound(place, "the record of a growth", again)
    if isinstance(found, Fault):
        return Checked((found,))
    if present is not None and found["root"] != present.to_record():
        return Checked((Fault(place, "the root record", "a record that is sound in itself, of another table", again),))
    return Checked()


def _metadata_checks(folder: Place, arrays: Iterable[RowArray]) -> Iterator[Check]:
    yield partial(check_record, folder / GROUP, group_metadata({}), "a group's metadata")
    for array in arrays:
        yield partial(check_record, array.path / GROUP, array.metadata(), "an array's metadata")


def _data_checks(store: StoreReader, arrays: dict[str, RowArray], digests: Digests) -> Iterator[Check]:
    for name, array in arrays.items():
        for chunk in range(array.num_chunks):
            yield partial(_check_chunk, array, chunk, digests[name])
    for name, sha256 in store.info.files.items():
        kind, _, file = name.partition("/")
        of_documents = digests["documents"] if kind == "documents" else None
        yield partial(_check_file, store.table / kind / file, sha256, of_documents)


def _check_chunk(array: RowArray, chunk: int, digests: dict[int, str]) -> Checked:
    checked = check_object(array, chunk, None, LOST)
    if not checked.faults:
        start = chunk * array.chunk_rows
        try:
            values = array.read(start, min(start + array.chunk_rows, array.shape[0]))
        except CorruptChunk as error:  # sound a moment ago
            return Checked((Fault(array.object_place(chunk), "the same bytes twice", str(error), LOST),))
        digests[chunk] = hashlib.sha256(values.data).hexdigest()
    return checked


def _check_file(place: Place, sha256: str, documents: dict[int, str] | None) -> Checked:
    """A file of another format; `documents` takes the digest of a documents file's content."""
    expected = f"sha256 {sha256}"
    try:
        if (found := sha256_of(place)) != sha256:
            return Checked((Fault(place, expected, f"sha256 {found}", LOST),))
        if documents is not None:
            part = int(place.name.partition("-")[2].partition(".")[0])
            documents[part] = documents_digest(pq.ParquetFile(pa.BufferReader(place.read())).read())
    except FileNotFoundError:
        return Checked((Fault(place, expected, "nothing", LOST),))
    except Unreachable:
        raise
    except (OSError, pa.ArrowException) as error:
        return Checked((Fault(place, expected, f"it cannot be read: {error}", LOST),))
    return Checked()
