"""Row arrays: Zarr v3 arrays whose first dimension is the row, read and written chunk by chunk.

A chunk file is the little-endian rows of one chunk followed by their crc32c, which is what the Zarr codecs `bytes`
and `crc32c` define, so that zarr, zarrs, TensorStore and xarray open the same files. Writing them here, rather than
through one of those, is what makes a chunk atomic and durable, names the chunk that is damaged, never takes a missing
chunk for zeros, and writes bfloat16 under its own name (docs/decisions/0001-chunk-io.md has the measurements).

On local disks every chunk is a file. On object stores, where a request costs more than a megabyte, the chunks of a
unit are one object: Zarr's sharding codec, the chunks in order and an index after them, so that any run of chunks is
one request.

Not here: which rows may be read at all (`storage.store`), and who may write which rows (`storage.harvest.write_unit`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import numpy.typing as npt

from storage.backends.backend import Staged
from storage.backends.place import Place
from storage.backends.threads import in_threads
from storage.errors import CorruptChunk, NotAStore
from storage.format.layout import GROUP
from storage.format.records import decode, encode_zarr, read_record

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
"""Zarr data type name -> numpy dtype."""

CRC_BYTES = 4
REQUEST_BYTES = 16 * 2**20
"""Most bytes of a shard that are asked for at once."""
NO_CHUNK = 2**64 - 1
"""Offset and size of a chunk that a shard does not have, in its index."""
_BYTES_AND_CRC: tuple[dict[str, Any], ...] = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
)


@dataclass(frozen=True)
class StagedRows:
    """Rows that are written but not published: the crc32c of each chunk, and the files."""

    checksums: list[int]
    files: list[Staged]


@dataclass(frozen=True)
class RowArray:
    """One array of the store. `shape` is (rows,) or (rows, width); a chunk is `chunk_rows` rows, whole width."""

    path: Place
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    dimension_names: tuple[str, ...]
    attributes: dict[str, Any]
    shard_rows: int | None = None
    """Rows of an object, a multiple of `chunk_rows`; None where every chunk is a file of its own."""
    expected: Mapping[int, int] = field(default_factory=dict, compare=False, repr=False)
    """The crc32c that some chunks must have, by number; the others need only agree with their own."""

    @property
    def name(self) -> str:
        """The last parts of the path, as messages name the array."""
        return "/".join(str(self.path).split("/")[-3:])

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.numpy_dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def num_chunks(self) -> int:
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a stored chunk, its checksum included."""
        return self.chunk_rows * self.row_bytes + CRC_BYTES

    @property
    def chunks_per_object(self) -> int:
        return (self.shard_rows or self.chunk_rows) // self.chunk_rows

    def object_place(self, number: int) -> Place:
        """Where a chunk or shard is: Zarr's default key encoding, `c/<number>` or `c/<number>/0`."""
        return self.path.joinpath("c", str(number), *("0" for _ in self.shape[1:]))

    def create(self) -> None:
        """Write the array's metadata, unless the same is there. Raises NotAStore if another array is.

        That of the same array with fewer rows is replaced, as the store has grown; that with more is left as it is."""
        if not (self.path / GROUP).create(self.metadata()):
            found = RowArray.open(self.path)
            if replace(found, shape=self.shape) != self or found.shape[1:] != self.shape[1:]:
                raise NotAStore(f"array {self.name} exists already and differs: expected {self}, found {found}")
            if found.shape[0] < self.shape[0]:
                (self.path / GROUP).write(self.metadata())

    @classmethod
    def open(cls, path: Place) -> "RowArray":
        """Read the metadata at `path`. Raises NotAStore when it is absent or not an array of format 1."""
        try:
            metadata = read_record(path / GROUP)
        except (FileNotFoundError, NotADirectoryError):
            raise NotAStore(
                f"no Zarr array at {path}: its metadata is missing; if a run was killed as it began, the same "
                "`granary harvest` writes it"
            ) from None
        try:
            grid_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
            codec = metadata["codecs"][0]
            sharded = codec["name"] == "sharding_indexed"
            array = cls(
                path=path,
                shape=tuple(metadata["shape"]),
                dtype=metadata["data_type"],
                chunk_rows=codec["configuration"]["chunk_shape"][0] if sharded else grid_rows,
                dimension_names=tuple(metadata["dimension_names"]),
                attributes=metadata["attributes"],
                shard_rows=grid_rows if sharded else None,
            )
            expected = decode(array.metadata()) if array.dtype in tuple(DTYPES) else {"data_type": tuple(DTYPES)}
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise NotAStore(f"{path / 'zarr.json'} is not the metadata of a format 1 array: {error!r}") from None
        if metadata != expected:
            wrong = sorted(k for k in metadata.keys() | expected.keys() if metadata.get(k) != expected.get(k))
            raise NotAStore(f"{path / 'zarr.json'} is not the metadata of a format 1 array: see {', '.join(wrong)}")
        return array

    def stage(self, start: int, values: Array) -> "StagedRows":
        """Write rows [start, start + len(values)) without promise; `publish` makes them durable and visible.

        `start` is the first row of a chunk (or shard), and the values end at a chunk's (or shard's) end or at the
        array's last row: no object is ever written in two parts. On an error nothing is left on a local disk.
        """
        stop, object_rows = start + len(values), self.shard_rows or self.chunk_rows
        assert start % object_rows == 0
        assert stop % object_rows == 0 or stop == self.shape[0], (start, stop, self)
        assert values.dtype == self.numpy_dtype, (values.dtype, self.dtype)
        assert values.shape[1:] == self.shape[1:]
        backend = self.path.backend
        staged: list[Staged] = []

        def stage_object(first: int) -> list[int]:
            rows = values[first - start : first - start + object_rows]
            chunks = [self._whole_chunk(rows[at : at + self.chunk_rows]) for at in range(0, len(rows), self.chunk_rows)]
            checksums = [checksum(chunk) for chunk in chunks]
            buffers: list[Any] = []
            for chunk, crc in zip(chunks, checksums, strict=True):
                buffers += [chunk.reshape(-1).view(np.uint8), crc.to_bytes(CRC_BYTES, "little")]
            if self.shard_rows is not None:
                buffers.append(self.shard_index(len(chunks)))
            staged.append(backend.stage(self.object_place(first // object_rows).key, buffers))
            return checksums

        try:
            checksums = in_threads(stage_object, range(start, stop, object_rows), backend.threads)
        except BaseException:
            backend.discard(staged)
            raise
        return StagedRows([crc for of_object in checksums for crc in of_object], staged)

    def checksums_of(self, values: Array) -> list[int]:
        """The crc32c that each chunk of `values`, which begin at a chunk, has when it is stored."""
        starts = range(0, len(values), self.chunk_rows)
        return [checksum(self._whole_chunk(values[at : at + self.chunk_rows])) for at in starts]

    def write(self, start: int, values: Array) -> list[int]:
        """Stage and publish; return the crc32c of each chunk."""
        staged = self.stage(start, values)
        self.path.backend.publish(staged.files)
        return staged.checksums

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as a new array [stop - start, *width] in the stored dtype.

        Raises CorruptChunk, naming array and chunk, for a chunk that is missing, cut or fails its checksum.
        """
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        out = np.empty((stop - start, *self.shape[1:]), dtype=self.numpy_dtype)
        if start == stop:
            return out

        def read_run(chunks: range) -> None:
            parts = []
            for chunk in chunks:
                first, last = chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows
                inside = start <= first and last <= stop
                parts.append(out[first - start : last - start] if inside else self._empty_chunk())
            self._read_chunks_into(chunks, parts)
            for chunk, part in zip(chunks, parts, strict=True):
                first, last = chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows
                if first < start or stop < last:
                    a, b = max(first, start), min(last, stop)
                    out[a - start : b - start] = part[a - first : b - first]

        first, after = start // self.chunk_rows, -(-stop // self.chunk_rows)
        in_threads(read_run, self.runs(first, after), self.path.backend.threads)
        return out

    def read_checksum(self, chunk: int) -> int:
        """Read one chunk, check it, and return its crc32c."""
        return self._read_chunks_into(range(chunk, chunk + 1), [self._empty_chunk()])[0]

    def shard_index(self, chunks: int) -> bytes:
        """The end of a shard that holds its first `chunks` chunks: offset and size of each, and their crc32c."""
        entries = np.full((self.chunks_per_object, 2), NO_CHUNK, dtype="<u8")
        entries[:chunks, 0] = np.arange(chunks) * self.chunk_bytes
        entries[:chunks, 1] = self.chunk_bytes
        return entries.tobytes() + checksum(entries).to_bytes(CRC_BYTES, "little")

    def object_bytes(self, number: int) -> int:
        """The size of a chunk's file, or of a shard."""
        if self.shard_rows is None:
            return self.chunk_bytes
        chunks = min(self.chunks_per_object, self.num_chunks - number * self.chunks_per_object)
        return chunks * self.chunk_bytes + len(self.shard_index(chunks))

    def runs(self, first: int, after: int) -> list[range]:
        """Chunks first ... after - 1 in runs that are one request each: within an object and `REQUEST_BYTES`."""
        most = max(1, REQUEST_BYTES // self.chunk_bytes)
        runs = []
        while first < after:
            end_of_object = (first // self.chunks_per_object + 1) * self.chunks_per_object
            last = min(after, first + most, end_of_object)
            runs.append(range(first, last))
            first = last
        return runs

    def _empty_chunk(self) -> Array:
        return np.empty((self.chunk_rows, *self.shape[1:]), dtype=self.numpy_dtype)

    def _whole_chunk(self, rows: Array) -> Array:
        """A chunk's rows in C order; the array's last chunk is stored whole, as Zarr asks."""
        if len(rows) == self.chunk_rows:
            return np.ascontiguousarray(rows)
        padded = np.zeros((self.chunk_rows, *self.shape[1:]), dtype=self.numpy_dtype)
        padded[: len(rows)] = rows
        return padded

    def _read_chunks_into(self, chunks: range, parts: Sequence[Array]) -> list[int]:
        """Read chunks of one object in one request, check them, and return their crc32c."""
        number, within = divmod(chunks[0], self.chunks_per_object)
        place = self.object_place(number)
        again = self._again(chunks[0])
        stored = [bytearray(CRC_BYTES) for _ in chunks]
        buffers: list[memoryview] = []
        for part, crc in zip(parts, stored, strict=True):
            buffers += [part.reshape(-1).view(np.uint8).data, memoryview(crc)]
        try:
            size = place.backend.read_into(place.key, within * self.chunk_bytes, buffers)
        except FileNotFoundError:
            raise CorruptChunk(f"chunk {chunks[0]} of {self.name} ({place}) is missing; {again}") from None
        if size != (expected := self.object_bytes(number)):
            raise CorruptChunk(f"chunk {chunks[0]} of {self.name} ({place}) has {size} bytes, not {expected}; {again}")
        checksums = []
        for chunk, part, crc in zip(chunks, parts, stored, strict=True):
            checksums.append(checksum(part))
            if checksums[-1] != int.from_bytes(crc, "little"):
                raise CorruptChunk(f"chunk {chunk} of {self.name} ({place}) does not match its crc32c; {again}")
            if checksums[-1] != self.expected.get(chunk, checksums[-1]):
                raise CorruptChunk(f"chunk {chunk} of {self.name} ({place}) is not the one that was committed; {again}")
        return checksums

    def _again(self, chunk: int) -> str:
        """What to do about a damaged chunk."""
        about = self.attributes.get("granary", {})
        if "harvest" not in about:
            return "restore it from a copy, or make the store again"
        unit = chunk * self.chunk_rows // about["rows_per_unit"]
        return f"`granary verify STORE --repair` makes unit {unit} of harvest {about['harvest']} again"

    def metadata(self) -> bytes:
        """The array's zarr.json."""
        chunk_shape = [self.chunk_rows, *self.shape[1:]]
        grid_shape = [self.shard_rows or self.chunk_rows, *self.shape[1:]]
        codecs: list[dict[str, Any]] = list(_BYTES_AND_CRC)
        if self.shard_rows is not None:
            sharding = {
                "chunk_shape": chunk_shape,
                "codecs": list(_BYTES_AND_CRC),
                "index_codecs": list(_BYTES_AND_CRC),
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if self.dtype.startswith("int") else 0.0,
            "codecs": codecs,
            "dimension_names": list(self.dimension_names),
            "attributes": self.attributes,
        }
        return encode_zarr(metadata)


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a Zarr group."""
    return encode_zarr({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write_group(path: Place, attributes: dict[str, Any]) -> bool:
    """Write the metadata of a Zarr group, create-only. Return whether this call made it."""
    return (path / GROUP).create(group_metadata(attributes))


def checksum(values: Array) -> int:
    """The crc32c of an array's bytes (C order)."""
    view = values.reshape(-1).view(np.uint8)
    view.flags.writeable = False  # google_crc32c takes read-only buffers only; this is a view, the array stays as it is
    return int(google_crc32c.value(view))
