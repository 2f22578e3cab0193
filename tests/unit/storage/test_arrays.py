"""Row arrays: other Zarr readers and writers agree with ours to the last bit, and damage is named, never read."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore, StorePath

from storage.backends.place import open_place
from storage.errors import CorruptChunk, NotAStore, StorageError
from storage.format.arrays import DTYPES, RowArray
from storage.format.records import encode_zarr, read_record

ROWS, WIDTH, CHUNK_ROWS = 29, 5, 8
DEFAULT_PIPELINE = "zarr.core.codec_pipeline.BatchedCodecPipeline"
ZARRS_PIPELINE = "zarrs.ZarrsCodecPipeline"


def random_values(dtype: str, shape: tuple[int, ...] = (ROWS, WIDTH), seed: int = 0) -> np.ndarray:
    """Values from all over the type, as bits (for bfloat16: no NaN, whose equality says nothing)."""
    rng = np.random.default_rng(seed)
    if dtype.startswith("int"):
        limits = np.iinfo(DTYPES[dtype])
        return rng.integers(limits.min, limits.max, shape, dtype=DTYPES[dtype])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape)).astype(DTYPES[dtype])


def row_array(path: Path, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, WIDTH)) -> RowArray:
    names = ("row", "d_model")[: len(shape)]
    return RowArray(
        open_place(path / "activations" / "model" / "resid_post.0"),
        shape,
        dtype,
        CHUNK_ROWS,
        names,
        {"granary": {"a": 1}},
    )


def filled(array: RowArray) -> tuple[RowArray, np.ndarray]:
    """Create an array and fill it with random values."""
    values = random_values(array.dtype, array.shape)
    array.create()
    array.write(0, values)
    return array, values


def written(path: Path, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, WIDTH)) -> tuple[RowArray, np.ndarray]:
    return filled(row_array(path, dtype, shape))


def zarr_array(array: RowArray, pipeline: str, place: Any = None) -> Any:
    """The array as zarr opens it; bfloat16, which zarr 3.1 has no type for, as the uint16 of its bits.
    `place`: a store of zarr's; the folder of the array, if not given."""
    metadata = json.loads((array.path / "zarr.json").read())
    if metadata["data_type"] == "bfloat16":
        metadata |= {"data_type": "uint16", "fill_value": 0}
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        place = StorePath(place or LocalStore(array.path.path, read_only=True))
        opened = zarr.Array(zarr.AsyncArray(ArrayV3Metadata.from_dict(metadata), place))
    assert type(opened.async_array.codec_pipeline).__name__ == pipeline.rpartition(".")[2]
    return opened


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"<u{values.dtype.itemsize}")


def test_zarr_opens_an_array_by_its_path(tmp_path: Path) -> None:
    array, values = written(tmp_path)
    opened = zarr.open_array(array.path.path, mode="r")
    assert opened.metadata.dimension_names == ("row", "d_model")
    assert dict(opened.attrs) == {"granary": {"a": 1, "checksum": opened.attrs["granary"]["checksum"]}}
    np.testing.assert_array_equal(opened[:], values)


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS,)])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("pipeline", [DEFAULT_PIPELINE, ZARRS_PIPELINE])
def test_zarr_reads_what_we_write(tmp_path: Path, pipeline: str, dtype: str, shape: tuple[int, ...]) -> None:
    array, values = written(tmp_path, dtype, shape)
    opened = zarr_array(array, pipeline)
    assert opened.shape == shape
    np.testing.assert_array_equal(bits(opened[:]), bits(values))
    np.testing.assert_array_equal(bits(opened[5:27]), bits(values[5:27]))


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS,)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_tensorstore_reads_what_we_write(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array, values = written(tmp_path, dtype, shape)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array.path}/"}}
    opened = tensorstore.open(spec, read=True).result()
    assert opened.dtype.name == dtype
    assert opened.domain.labels == ("row", "d_model")[: len(shape)]
    np.testing.assert_array_equal(bits(opened.read().result()), bits(values))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64"])
def test_we_read_what_tensorstore_writes(tmp_path: Path, dtype: str) -> None:
    array, values = row_array(tmp_path, dtype), random_values(dtype)
    array.create()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array.path}/"}}
    tensorstore.open(spec, write=True).result().write(values).result()
    np.testing.assert_array_equal(bits(RowArray.open(array.path).read(0, ROWS)), bits(values))


@pytest.mark.parametrize("pipeline", [DEFAULT_PIPELINE, ZARRS_PIPELINE])
def test_we_read_what_zarr_writes(tmp_path: Path, pipeline: str) -> None:
    array, values = row_array(tmp_path), random_values("float32")
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        theirs = zarr.create_array(
            array.path.path,
            shape=(ROWS, WIDTH),
            dtype="float32",
            chunks=(CHUNK_ROWS, WIDTH),
            serializer=zarr.codecs.BytesCodec(endian="little"),
            compressors=zarr.codecs.Crc32cCodec(),
            dimension_names=("row", "d_model"),
        )
        theirs[:] = values
    np.testing.assert_array_equal(array.read(0, ROWS), values)
    assert all(array.read_checksum(chunk) for chunk in range(array.num_chunks))


def test_our_chunk_files_are_those_of_zarr(tmp_path: Path) -> None:
    array, values = written(tmp_path / "ours")
    theirs = zarr.create_array(
        tmp_path / "theirs",
        shape=(ROWS, WIDTH),
        dtype="float32",
        chunks=(CHUNK_ROWS, WIDTH),
        compressors=zarr.codecs.Crc32cCodec(),
    )
    theirs[:] = values
    for chunk in range(array.num_chunks):
        assert (
            array.object_place(chunk).path.read_bytes() == (tmp_path / "theirs" / "c" / str(chunk) / "0").read_bytes()
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_range_equals_numpy_indexing(tmp_path: Path, dtype: str) -> None:
    array, values = written(tmp_path, dtype)
    for start in range(ROWS + 1):
        for stop in range(start, ROWS + 1):
            np.testing.assert_array_equal(bits(array.read(start, stop)), bits(values[start:stop]))


def test_chunks_may_be_written_apart_and_in_any_order(tmp_path: Path) -> None:
    array, values = row_array(tmp_path), random_values("float32")
    array.create()
    for start, stop in [(24, 29), (8, 24), (0, 8)]:
        array.write(start, values[start:stop])
    np.testing.assert_array_equal(array.read(0, ROWS), values)


def test_the_last_chunk_is_stored_whole_and_filled_with_zeros(tmp_path: Path) -> None:
    array, values = written(tmp_path)
    body = array.object_place(3).path.read_bytes()[:-4]
    assert len(body) == CHUNK_ROWS * WIDTH * 4
    last = np.frombuffer(body, dtype="<f4").reshape(CHUNK_ROWS, WIDTH)
    np.testing.assert_array_equal(last[: ROWS - 24], values[24:])
    assert not last[ROWS - 24 :].any()


def test_an_all_zero_chunk_is_stored(tmp_path: Path) -> None:
    array = row_array(tmp_path)
    array.create()
    array.write(0, np.zeros((ROWS, WIDTH), dtype=np.float32))
    assert all(array.object_place(chunk).path.stat().st_size == CHUNK_ROWS * WIDTH * 4 + 4 for chunk in range(4))
    assert not array.read(0, ROWS).any()


def test_write_returns_the_checksums_in_the_files(tmp_path: Path) -> None:
    array, values = row_array(tmp_path), random_values("float32")
    array.create()
    checksums = array.write(0, values)
    assert checksums == [int.from_bytes(array.object_place(c).path.read_bytes()[-4:], "little") for c in range(4)]
    assert checksums == [array.read_checksum(c) for c in range(4)]


def assert_refused(array: RowArray, chunk: int) -> None:
    """Reading the chunk, all of it or some, raises an error that names it; rows of other chunks can be read."""
    named = rf"chunk {chunk} of activations/model/resid_post\.0"
    first = chunk * CHUNK_ROWS
    with pytest.raises(CorruptChunk, match=named):
        array.read(0, ROWS)
    with pytest.raises(CorruptChunk, match=named):
        array.read(first + 1, first + 2)
    with pytest.raises(CorruptChunk, match=named):
        array.read_checksum(chunk)
    if chunk:
        array.read(0, first)


@pytest.mark.parametrize("chunk", range(4))
def test_missing_chunk(tmp_path: Path, chunk: int) -> None:
    array, _ = written(tmp_path)
    array.object_place(chunk).path.unlink()
    assert_refused(array, chunk)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b[:-4], lambda b: b[:10], lambda b: b"", lambda b: b + b"\0"]
)
def test_chunk_of_another_size(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    array, _ = written(tmp_path)
    path = array.object_place(1).path
    path.write_bytes(change(path.read_bytes()))
    assert_refused(array, 1)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    array, _ = written(tmp_path)
    path = array.object_place(2).path
    sound = path.read_bytes()
    rng = random.Random(0)
    in_body = [rng.randrange(8 * (len(sound) - 4)) for _ in range(20)]
    in_checksum = [8 * (len(sound) - 4) + bit for bit in (0, 9, 18, 31)]
    for bit in in_body + in_checksum:
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert_refused(array, 2)
    path.write_bytes(sound)
    array.read(0, ROWS)


def test_chunks_that_changed_places_are_found_by_the_checksums_of_the_commit(tmp_path: Path) -> None:
    """A chunk does not say which one it is: that is what the checksums in the commit are for."""
    array, _ = written(tmp_path)
    before = [array.read_checksum(chunk) for chunk in (0, 1)]
    first, second = array.object_place(0).path.read_bytes(), array.object_place(1).path.read_bytes()
    array.object_place(0).path.write_bytes(second)
    array.object_place(1).path.write_bytes(first)
    assert [array.read_checksum(chunk) for chunk in (0, 1)] == before[::-1] != before


def test_open_gives_what_was_created_and_create_may_be_repeated(tmp_path: Path) -> None:
    array = row_array(tmp_path, "bfloat16")
    array.create()
    array.create()
    assert RowArray.open(array.path) == array


def test_create_refuses_another_array(tmp_path: Path) -> None:
    row_array(tmp_path, "bfloat16").create()
    with pytest.raises(NotAStore, match="exists already and differs"):
        row_array(tmp_path, "float32").create()


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"fill_value": 1.0},
        {"node_type": "group"},
        {"data_type": "complex64"},
        {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4}}},
        {"shape": None},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 2]}}},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
    ],
)
def test_open_refuses_metadata_that_is_not_ours(tmp_path: Path, change: dict[str, Any]) -> None:
    array = row_array(tmp_path)
    array.create()
    place = array.path / "zarr.json"
    place.write(encode_zarr({**read_record(place), **change}))
    with pytest.raises(NotAStore, match="not the metadata of a format 1 array"):
        RowArray.open(array.path)


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_open_refuses_what_is_no_array(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(NotAStore if content is None else StorageError):
        RowArray.open(open_place(tmp_path))
