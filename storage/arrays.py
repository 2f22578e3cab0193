"""Row arrays: Zarr v3 arrays whose first dimension is the row, read and written chunk by chunk.

A chunk file is the little-endian rows of one chunk followed by their crc32c, which is what the Zarr codecs `bytes`
and `crc32c` define, so that zarr, zarrs, TensorStore and xarray open the same files. Writing them here, rather than
through one of those, is what makes a chunk atomic and durable, names the chunk that is damaged, never takes a missing
chunk for zeros, and writes bfloat16 under its own name (docs/decisions/0001-chunk-io.md has the measurements).

Not here: which rows may be read at all (`storage.store`), and who may write which rows (`storage.units`).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import numpy.typing as npt

from storage.errors import CorruptChunk, NotAStore
from storage.files import Staged, create_file, discard, in_threads, publish, stage

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
"""Zarr data type name -> numpy dtype."""

CRC_BYTES = 4


@dataclass(frozen=True)
class StagedRows:
    """Rows that are written but not published: the crc32c of each chunk, and the files."""

    checksums: list[int]
    files: list[Staged]


@dataclass(frozen=True)
class RowArray:
    """One array of the store. `shape` is (rows,) or (rows, width); a chunk is `chunk_rows` rows, whole width."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    dimension_names: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def name(self) -> str:
        """The last parts of the path, as messages name the array."""
        return "/".join(self.path.parts[-3:])

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.numpy_dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def num_chunks(self) -> int:
        return -(-self.shape[0] // self.chunk_rows)

    def chunk_path(self, chunk: int) -> Path:
        """The file of a chunk: Zarr's default key encoding, `c/<row chunk>` or `c/<row chunk>/0`."""
        return self.path.joinpath("c", str(chunk), *("0" for _ in self.shape[1:]))

    def create(self) -> None:
        """Write the array's metadata, unless the same is there. Raises NotAStore if another array is."""
        if not create_file(self.path / "zarr.json", self._metadata()):
            found = RowArray.open(self.path)
            if found != self:
                raise NotAStore(f"array {self.name} exists already and differs: expected {self}, found {found}")

    @classmethod
    def open(cls, path: Path) -> "RowArray":
        """Read the metadata at `path`. Raises NotAStore when it is absent or not an array of format 1."""
        try:
            metadata = json.loads((path / "zarr.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise NotAStore(f"no Zarr array at {path}") from None
        except ValueError as error:
            raise NotAStore(f"{path / 'zarr.json'} is not JSON: {error}") from None
        try:
            array = cls(
                path=path,
                shape=tuple(metadata["shape"]),
                dtype=metadata["data_type"],
                chunk_rows=metadata["chunk_grid"]["configuration"]["chunk_shape"][0],
                dimension_names=tuple(metadata["dimension_names"]),
                attributes=metadata["attributes"],
            )
            expected = json.loads(array._metadata()) if array.dtype in tuple(DTYPES) else {"data_type": tuple(DTYPES)}
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise NotAStore(f"{path / 'zarr.json'} is not the metadata of a format 1 array: {error!r}") from None
        if metadata != expected:
            wrong = sorted(k for k in metadata.keys() | expected.keys() if metadata.get(k) != expected.get(k))
            raise NotAStore(f"{path / 'zarr.json'} is not the metadata of a format 1 array: see {', '.join(wrong)}")
        return array

    def stage(self, start: int, values: Array) -> "StagedRows":
        """Write rows [start, start + len(values)) under temporary names; `publish` makes them durable and visible.

        `start` is the first row of a chunk, and the values end at a chunk's end or at the array's last row: no chunk
        is ever written in two parts. On an error nothing is left.
        """
        stop = start + len(values)
        assert start % self.chunk_rows == 0
        assert stop % self.chunk_rows == 0 or stop == self.shape[0], (start, stop, self)
        assert values.dtype == self.numpy_dtype, (values.dtype, self.dtype)
        assert values.shape[1:] == self.shape[1:]
        staged: list[Staged] = []

        def stage_chunk(first: int) -> int:
            rows = values[first - start : first - start + self.chunk_rows]
            if len(rows) < self.chunk_rows:  # the array's last chunk is stored whole, as Zarr asks
                padded = np.zeros((self.chunk_rows, *self.shape[1:]), dtype=self.numpy_dtype)
                padded[: len(rows)] = rows
                rows = padded
            rows = np.ascontiguousarray(rows)
            crc = checksum(rows)
            path = self.chunk_path(first // self.chunk_rows)
            staged.append(stage(path, [rows.reshape(-1).view(np.uint8), crc.to_bytes(CRC_BYTES, "little")]))
            return crc

        try:
            checksums = in_threads(stage_chunk, range(start, stop, self.chunk_rows))
        except BaseException:
            discard(staged)
            raise
        return StagedRows(checksums, staged)

    def write(self, start: int, values: Array) -> list[int]:
        """Stage and publish; return the crc32c of each chunk."""
        staged = self.stage(start, values)
        publish(staged.files)
        return staged.checksums

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as a new array [stop - start, *width] in the stored dtype.

        Raises CorruptChunk, naming array and chunk, for a chunk that is missing, cut or fails its checksum.
        """
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        out = np.empty((stop - start, *self.shape[1:]), dtype=self.numpy_dtype)
        if start == stop:
            return out

        def read_chunk(chunk: int) -> None:
            first, last = chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows
            if start <= first and last <= stop:
                self._read_chunk_into(chunk, out[first - start : last - start])
            else:
                whole = np.empty((self.chunk_rows, *self.shape[1:]), dtype=self.numpy_dtype)
                self._read_chunk_into(chunk, whole)
                a, b = max(first, start), min(last, stop)
                out[a - start : b - start] = whole[a - first : b - first]

        in_threads(read_chunk, range(start // self.chunk_rows, -(-stop // self.chunk_rows)))
        return out

    def read_checksum(self, chunk: int) -> int:
        """Read one chunk, check it, and return its crc32c."""
        return self._read_chunk_into(chunk, np.empty((self.chunk_rows, *self.shape[1:]), dtype=self.numpy_dtype))

    def _read_chunk_into(self, chunk: int, out: Array) -> int:
        path = self.chunk_path(chunk)
        where = f"chunk {chunk} of {self.name} ({path})"
        again = self._again(chunk)
        body, stored = out.reshape(-1).view(np.uint8).data, bytearray(CRC_BYTES)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CorruptChunk(f"{where} is missing; {again}") from None
        try:
            size, expected = os.fstat(descriptor).st_size, body.nbytes + CRC_BYTES
            if size != expected:
                raise CorruptChunk(f"{where} has {size} bytes, not {expected}; {again}")
            got = 0
            while got < body.nbytes:  # one read call moves at most 2 GiB
                moved = os.preadv(descriptor, [body[got:]], got)
                if moved == 0:
                    raise CorruptChunk(f"{where} was cut while it was read; {again}")
                got += moved
            os.preadv(descriptor, [stored], body.nbytes)
        finally:
            os.close(descriptor)
        crc = checksum(out)
        if crc != int.from_bytes(stored, "little"):
            raise CorruptChunk(f"{where} does not match its crc32c; {again}")
        return crc

    def _again(self, chunk: int) -> str:
        """What to do about a damaged chunk."""
        about = self.attributes.get("granary", {})
        if "harvest" not in about:
            return "restore it from a copy, or make the store again"
        unit = chunk * self.chunk_rows // about["rows_per_unit"]
        return f"to make it again remove commits/{about['harvest']}/{unit:08d}.json and run `granary harvest`"

    def _metadata(self) -> bytes:
        chunk_shape = [self.chunk_rows, *self.shape[1:]]
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if self.dtype.startswith("int") else 0.0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "dimension_names": list(self.dimension_names),
            "attributes": self.attributes,
        }
        return json.dumps(metadata, indent=2).encode()


def write_group(path: Path, attributes: dict[str, Any]) -> bool:
    """Write the metadata of a Zarr group, create-only. Return whether this call made it."""
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return create_file(path / "zarr.json", json.dumps(metadata, indent=2).encode())


def checksum(values: Array) -> int:
    """The crc32c of an array's bytes (C order)."""
    view = values.reshape(-1).view(np.uint8)
    view.flags.writeable = False  # google_crc32c takes read-only buffers only; this is a view, the array stays as it is
    return int(google_crc32c.value(view))
