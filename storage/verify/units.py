"""Checks of a harvest's units: every chunk against its own crc32c and its commit, norms and moments against the rows.

One check is one object, so that a unit of any size is checked in the memory of a few requests, by many threads.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.backends.threads import in_threads
from storage.errors import CorruptChunk, NotAStore, StorageError
from storage.format.arrays import CRC_BYTES, Array, RowArray, checksum
from storage.format.site_rows import SiteRows
from storage.harvest.commits import Commit
from storage.harvest.harvest import CHECKSUMS, Harvest
from storage.harvest.log import log_of
from storage.read.reader import StoreReader
from storage.verify.findings import Check, Checked, Fault, Remake, Remedy, read_sound, read_whole

UNITS_AT_ONCE = 256
"""Units whose commits are read before the checks of the first begin: they bound what is held in memory."""
NORM_TOLERANCE = 1e-4
"""Relative; norms are sums of up to ten thousand float32 squares in whatever order."""


def unit_checks(store: StoreReader, harvest: Harvest, units: Sequence[int]) -> Iterator[Check]:
    """The checks of committed units, ascending."""

    def commit_of(unit: int) -> Commit | Fault:
        place = log_of(store, harvest).commit_place(unit)
        expected, remedy = f"the commit of unit {unit}", Remake(harvest.digest, unit, from_rows=False)
        record = read_sound(place, expected, remedy)
        if isinstance(record, Fault):
            return record
        if (record.get("unit"), record.get("harvest")) != (unit, harvest.digest):
            return Fault(place, expected, "it is of another unit or harvest", remedy)
        try:
            commit = Commit.from_record(record)
        except StorageError as lacking:
            return Fault(place, expected, str(lacking), remedy)
        if wrong := _contradictions(store, harvest, unit, commit):
            return Fault(place, expected, wrong, remedy)
        return commit

    for together in map(list, _groups(units)):
        commits = in_threads(commit_of, together, store.root.backend.threads)
        for unit, commit in zip(together, commits, strict=True):
            if isinstance(commit, Fault):
                yield _known(commit)
            yield from _checks_of(store, harvest, unit, None if isinstance(commit, Fault) else commit)


def _groups(units: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(units), UNITS_AT_ONCE):
        yield units[start : start + UNITS_AT_ONCE]


def _known(fault: Fault) -> Check:
    return lambda: Checked((fault,))


def _checks_of(store: StoreReader, harvest: Harvest, unit: int, commit: Commit | None) -> Iterator[Check]:
    """The checks of one unit; without a sound commit, those that need none."""
    start, stop = store.info.unit_rows(unit)
    for site in harvest.sites:
        arrays = harvest.arrays(store.root, store.num_rows, site)
        for kind, array in arrays.items():
            checksums = commit.sites[site][CHECKSUMS[kind]] if commit else None
            remedy = Remake(harvest.digest, unit, from_rows=kind == "norms")
            object_rows = array.chunk_rows * array.chunks_per_object
            for number in range(start // object_rows, -(-stop // object_rows)):
                first = number * array.chunks_per_object - start // array.chunk_rows
                of_object = checksums[first : first + array.chunks_per_object] if checksums else None
                yield _object_check(array, number, of_object, remedy)
        derived = Remake(harvest.digest, unit, from_rows=True)
        yield _norms_check(
            SiteRows(arrays["activations"], arrays.get("scales")), arrays["norms"], unit, start, stop, derived
        )
    yield _moments_check(store, harvest, unit, commit.moments_sha256 if commit else None)


def _contradictions(store: StoreReader, harvest: Harvest, unit: int, commit: Commit) -> str | None:
    """What a sound commit says that cannot be, if anything."""
    start, stop = store.info.unit_rows(unit)
    if (commit.row_start, commit.row_stop) != (start, stop):
        return f"it is of rows {commit.row_start} to {commit.row_stop}, and the unit is {start} to {stop}"
    if set(commit.sites) != set(harvest.sites):
        return f"it has the sites {', '.join(commit.sites)}, and the harvest {', '.join(harvest.sites)}"
    for site in harvest.sites:
        for kind, array in harvest.arrays(store.root, store.num_rows, site).items():
            chunks = -(-(stop - start) // array.chunk_rows)
            if len(commit.sites[site].get(CHECKSUMS[kind], ())) != chunks:
                return f"it has not one {CHECKSUMS[kind]} for each of the {chunks} chunks of {site}"
    return None


def _object_check(array: RowArray, number: int, committed: Sequence[int] | None, remedy: Remedy) -> Check:
    return lambda: check_object(array, number, committed, remedy)


def check_object(array: RowArray, number: int, committed: Sequence[int] | None, remedy: Remedy) -> Checked:
    """Check a chunk's file, or a shard and its index. `committed`: the crc32c of its chunks, where they are known."""
    place, size = array.object_place(number), array.object_bytes(number)
    first = number * array.chunks_per_object
    chunks = range(first, min(first + array.chunks_per_object, array.num_chunks))
    expected = f"{size} bytes, the crc32c of every chunk as stored" + (" and as committed" if committed else "")

    def fault(found: str) -> Checked:
        return Checked((Fault(place, expected, found, remedy),), size)

    wrong: list[str] = []
    try:
        for run in array.runs(chunks.start, chunks.stop):
            buffer = _buffer(len(run) * array.chunk_bytes)
            found = place.backend.read_into(place.key, (run.start - first) * array.chunk_bytes, [buffer.data])
            if found != size:
                return fault(f"{found} bytes")
            for chunk, content in zip(run, buffer.reshape(len(run), -1), strict=True):
                crc = checksum(content[:-CRC_BYTES])
                stored = int.from_bytes(content[-CRC_BYTES:].tobytes(), "little")
                said = stored if committed is None else committed[chunk - first]
                if not crc == stored == said:
                    wrong.append(
                        f"chunk {chunk} has the crc32c {crc:08x}, stored is {stored:08x}, committed {said:08x}"
                    )
        if array.shard_rows is not None:
            index = array.shard_index(len(chunks))
            tail = _buffer(len(index))
            place.backend.read_into(place.key, size - len(index), [tail.data])
            if tail.tobytes() != index:
                wrong.append("the index at its end is another")
    except (FileNotFoundError, NotADirectoryError):
        return fault("nothing")
    except OSError as error:
        return fault(f"it cannot be read: {error.strerror or error}")
    return fault("; ".join(wrong)) if wrong else Checked(num_bytes=size)


_own = threading.local()


def _buffer(size: int) -> Any:
    """`size` bytes that belong to this thread until it asks again: fresh pages would cost as much as the reading."""
    kept: Array | None = getattr(_own, "buffer", None)
    if kept is None or len(kept) < size:
        kept = _own.buffer = np.empty(size, dtype=np.uint8)
    return kept[:size]


def _norms_check(activations: SiteRows, norms: RowArray, unit: int, start: int, stop: int, remedy: Remedy) -> Check:
    """Compute the norms of one chunk of the unit anew: all of them would cost more than reading does."""
    chunks = range(start // activations.chunk_rows, -(-stop // activations.chunk_rows))
    chunk = chunks[unit % len(chunks)]
    first, last = chunk * activations.chunk_rows, min((chunk + 1) * activations.chunk_rows, stop)

    def check() -> Checked:
        try:
            rows = activations.read(first, last).astype(np.float32)
            stored = norms.read(first, last)
        except (CorruptChunk, NotAStore, OSError):
            return Checked()  # told by the check of that object
        computed = np.sqrt(np.einsum("rd,rd->r", rows, rows))
        differing = ~np.isclose(stored, computed, rtol=NORM_TOLERANCE, atol=1e-30)
        if not differing.any():
            return Checked(num_bytes=rows.nbytes)
        row = int(np.argmax(differing))
        place = norms.object_place(start // norms.chunk_rows)
        expected = f"the norms of the stored rows, {computed[row]:.7g} for row {first + row}"
        return Checked((Fault(place, expected, f"{stored[row]:.7g}", remedy),), rows.nbytes)

    return check


def _moments_check(store: StoreReader, harvest: Harvest, unit: int, committed: str | None) -> Check:
    place = log_of(store, harvest).moments_place(unit)
    remedy = Remake(harvest.digest, unit, from_rows=True)
    start, stop = store.info.unit_rows(unit)
    expected = f"the moments of unit {unit}" + (f", sha256 {committed}" if committed else "")

    def check() -> Checked:
        content = read_whole(place, expected, remedy)
        if isinstance(content, Fault):
            return Checked((content,))
        found = hashlib.sha256(content).hexdigest()
        if committed is not None and found != committed:
            return Checked((Fault(place, expected, f"sha256 {found}", remedy),), len(content))
        counts = _counts(content)
        if counts != dict.fromkeys(harvest.sites, stop - start):
            said = counts if isinstance(counts, str) else f"{counts} rows by site, not {stop - start} each"
            return Checked((Fault(place, expected, said, remedy),), len(content))
        return Checked(num_bytes=len(content))

    return check


def _counts(moments: bytes) -> dict[str, int] | str:
    """Site -> rows that its moments are of, or why that cannot be read."""
    try:
        table = pq.ParquetFile(pa.BufferReader(moments)).read(columns=["site", "label", "count"])
    except (pa.ArrowException, OSError) as error:
        return f"it cannot be read: {error}"
    return {line["site"]: line["count"] for line in table.to_pylist() if line["label"] is None}
