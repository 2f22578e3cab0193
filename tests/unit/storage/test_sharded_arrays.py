"""Arrays whose chunks are kept several to an object, on S3: other Zarr readers and writers agree with ours to the last
bit, any run of rows is read, and damage is named, never read."""

import json
import struct
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import test_arrays
import zarr
from obstore.store import from_url
from s3 import S3Server
from test_arrays import DEFAULT_PIPELINE, ZARRS_PIPELINE, bits, filled, random_values
from zarr.storage import ObjectStore

from storage.backends.place import Place, open_place
from storage.errors import CorruptChunk
from storage.format.arrays import DTYPES, REQUEST_BYTES, RowArray

pytestmark = pytest.mark.filterwarnings("ignore:Successfully reconstructed a store")  # zarrs makes its own client

WIDTH, CHUNK_ROWS, SHARD_ROWS = 5, 4, 16
ROWS = 2 * SHARD_ROWS + 7
"""Two whole objects, and one of a whole chunk and a cut one."""


def row_array(url: str, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, WIDTH)) -> RowArray:
    path = open_place(url) / "activations" / "model" / "resid_post.0"
    names = ("row", "d_model")[: len(shape)]
    return RowArray(path, shape, dtype, CHUNK_ROWS, names, {"granary": {"a": 1}}, SHARD_ROWS)


def written(url: str, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, WIDTH)) -> tuple[RowArray, np.ndarray]:
    return filled(row_array(url, dtype, shape))


def zarr_array(array: RowArray, pipeline: str) -> Any:
    return test_arrays.zarr_array(array, pipeline, ObjectStore(from_url(str(array.path)), read_only=True))


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS,)])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("pipeline", [DEFAULT_PIPELINE, ZARRS_PIPELINE])
def test_zarr_reads_what_we_write(bucket: str, pipeline: str, dtype: str, shape: tuple[int, ...]) -> None:
    array, values = written(bucket, dtype, shape)
    opened = zarr_array(array, pipeline)
    assert opened.shape == shape
    np.testing.assert_array_equal(bits(opened[:]), bits(values))
    np.testing.assert_array_equal(bits(opened[5:27]), bits(values[5:27]))
    np.testing.assert_array_equal(bits(opened[33:]), bits(values[33:]))


def s3_kvstore(array: RowArray, server: S3Server) -> dict[str, Any]:
    bucket, _, path = str(array.path).removeprefix("s3://").partition("/")
    return {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{path}/",
        "endpoint": server.url,
        "aws_region": "us-east-1",
        "aws_credentials": {"type": "environment"},
    }


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS,)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_tensorstore_reads_what_we_write(bucket: str, s3: S3Server, dtype: str, shape: tuple[int, ...]) -> None:
    array, values = written(bucket, dtype, shape)
    opened = tensorstore.open({"driver": "zarr3", "kvstore": s3_kvstore(array, s3)}, read=True).result()
    assert opened.dtype.name == dtype
    assert opened.domain.labels == ("row", "d_model")[: len(shape)]
    np.testing.assert_array_equal(bits(opened.read().result()), bits(values))
    np.testing.assert_array_equal(bits(opened[17:37].read().result()), bits(values[17:37]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64"])
def test_we_read_what_tensorstore_writes(bucket: str, s3: S3Server, dtype: str) -> None:
    array, values = row_array(bucket, dtype), random_values(dtype, (ROWS, WIDTH))
    array.create()
    tensorstore.open({"driver": "zarr3", "kvstore": s3_kvstore(array, s3)}, write=True).result().write(values).result()
    np.testing.assert_array_equal(bits(RowArray.open(array.path).read(0, ROWS)), bits(values))


@pytest.mark.parametrize("pipeline", [DEFAULT_PIPELINE, ZARRS_PIPELINE])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_our_objects_are_those_of_zarr(bucket: str, pipeline: str, dtype: str) -> None:
    """Also where a shard is not full."""
    ours, values = written(f"{bucket}/ours", dtype)
    theirs = row_array(f"{bucket}/theirs", dtype)
    with zarr.config.set({"codec_pipeline.path": pipeline, "array.write_empty_chunks": True}):
        array = zarr.create_array(
            ObjectStore(from_url(str(theirs.path))),
            shape=(ROWS, WIDTH),
            dtype=dtype,
            chunks=(CHUNK_ROWS, WIDTH),
            shards=(SHARD_ROWS, WIDTH),
            filters=None,
            compressors=zarr.codecs.Crc32cCodec(),
            dimension_names=("row", "d_model"),
            attributes={"granary": {"a": 1}},
        )
        array[:] = values
    metadata = json.loads((theirs.path / "zarr.json").read())
    assert json.loads((ours.path / "zarr.json").read())["codecs"] == metadata["codecs"]
    for number in range(3):
        assert ours.object_place(number).read() == theirs.object_place(number).read()
    np.testing.assert_array_equal(theirs.read(0, ROWS), values)


def test_the_bytes_of_an_object_are_those_of_the_format(bucket: str) -> None:
    """Put together by hand as FORMAT.md says."""
    array, values = written(bucket)

    def crc(content: bytes) -> bytes:
        return struct.pack("<I", google_crc32c.value(content))

    for number, chunks in enumerate([4, 4, 2]):
        rows = values[number * SHARD_ROWS :][:SHARD_ROWS]
        rows = np.concatenate([rows, np.zeros((chunks * CHUNK_ROWS - len(rows), WIDTH), np.float32)])
        content, index = b"", b""
        for chunk in range(SHARD_ROWS // CHUNK_ROWS):
            raw = rows[chunk * CHUNK_ROWS :][:CHUNK_ROWS].tobytes()
            index += struct.pack("<QQ", len(content), len(raw) + 4) if raw else b"\xff" * 16
            content += raw + crc(raw) if raw else b""
        assert array.object_place(number).read() == content + index + crc(index)
        assert array.object_bytes(number) == len(content + index) + 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_range_equals_numpy_indexing(dtype: str) -> None:
    array, values = written(f"memory://ranges-{dtype}", dtype)
    for start in range(ROWS + 1):
        for stop in range(start, ROWS + 1):
            np.testing.assert_array_equal(bits(array.read(start, stop)), bits(values[start:stop]))


def test_ranges_on_s3(bucket: str) -> None:
    array, values = written(bucket)
    for start, stop in [(0, 1), (3, 5), (15, 17), (16, 32), (31, 33), (32, ROWS), (38, ROWS), (0, ROWS), (7, 7)]:
        np.testing.assert_array_equal(array.read(start, stop), values[start:stop])


def test_objects_may_be_written_apart_and_in_any_order(bucket: str) -> None:
    array, values = row_array(bucket), random_values("float32", (ROWS, WIDTH))
    array.create()
    for start in (32, 0, 16):
        array.write(start, values[start : start + SHARD_ROWS])
    np.testing.assert_array_equal(array.read(0, ROWS), values)


def test_a_run_of_chunks_is_one_request(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    array, values = written(bucket)
    asked: list[tuple[str, int, int]] = []
    backend: Any = array.path.backend
    read_into = backend.read_into

    def counted(key: str, start: int, buffers: Any) -> int:
        asked.append((key.rpartition("/c/")[2], start, sum(b.nbytes for b in buffers)))
        return int(read_into(key, start, buffers))

    monkeypatch.setitem(backend.__dict__, "read_into", counted)
    chunk = CHUNK_ROWS * WIDTH * 4 + 4
    np.testing.assert_array_equal(array.read(5, 34), values[5:34])
    assert sorted(asked) == [("0/0", chunk, 3 * chunk), ("1/0", 0, 4 * chunk), ("2/0", 0, chunk)]
    assert 4 * chunk < REQUEST_BYTES


DAMAGES = {
    "missing": lambda content: None,
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "first byte": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "crc": lambda content: content[:83] + bytes([content[83] ^ 128]) + content[84:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_object_is_named(bucket: str, damage: str) -> None:
    array, values = written(bucket)
    place: Place = array.object_place(1)
    content = DAMAGES[damage](place.read())
    if content is None:
        place.remove()
    else:
        place.write(content)
    with pytest.raises(CorruptChunk, match=f"chunk 4 of activations/model/resid_post.0 .*{place.key}"):
        array.read(16, 20)
    with pytest.raises(CorruptChunk):
        array.read(0, ROWS)
    np.testing.assert_array_equal(array.read(0, 16), values[:16])
    np.testing.assert_array_equal(array.read(32, ROWS), values[32:])


def test_every_flipped_byte_of_the_rows_is_found() -> None:
    array, values = written("memory://flipped")
    place = array.object_place(1)
    content = place.read()
    chunk = CHUNK_ROWS * WIDTH * 4 + 4
    for at in range(4 * chunk):
        place.write(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(CorruptChunk, match=f"chunk {4 + at // chunk} of "):
            array.read(16, 32)
    place.write(content)
    np.testing.assert_array_equal(array.read(16, 32), values[16:32])
