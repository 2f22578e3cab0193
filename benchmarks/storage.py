"""Writing a unit and reading it back, against plain files and the other Zarr engines: python -m benchmarks.storage

One unit: 65,536 rows of width 1024 in bfloat16 (128 MiB). Each round measures every engine once, in turn, on new
files; the figures are medians over rounds, the ratios medians of per-round ratios, so that a machine that changes speed
changes both sides. Reads come from the page cache, so they show the engine and not the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage.backends.local import publish
from storage.backends.place import open_place
from storage.format.arrays import DTYPES, RowArray, StagedRows
from storage.harvest.harvest import chunk_rows_for
from workers.machine import machine

ROWS, WIDTH = 65536, 1024
CHUNK_ROWS = chunk_rows_for(ROWS, WIDTH, 2)

Engine = tuple[Callable[[Path], Any], Callable[[Path, Any], None], Callable[[Path], Any]]
"""Write (timed), what has to happen before reading (not timed; takes what write returned), read (timed)."""


def nothing(folder: Path, written: Any) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    values = np.random.default_rng(0).integers(0, 2**15, (ROWS, WIDTH), dtype=np.uint16).view(DTYPES["bfloat16"])
    engines = all_engines(values)
    speeds: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in engines}
    gigabytes = values.nbytes / 1e9
    for _ in range(arguments.rounds + 1):  # the first round warms caches and pools, and is dropped
        for name, (write, settle, read) in engines.items():
            folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
            try:
                os.sync()
                started = time.perf_counter()
                result_of_write = write(folder)
                written = time.perf_counter() - started
                settle(folder, result_of_write)
                os.sync()  # reads then do not compete with the write-back of what was just written
                started = time.perf_counter()
                read(folder)
                done = time.perf_counter() - started
            finally:
                shutil.rmtree(folder)
            speeds[name]["write"].append(gigabytes / written)
            speeds[name]["read"].append(gigabytes / done)
    medians: dict[str, dict[str, float]] = {}
    print(f"{'engine':34s} write GB/s  of tofile  of tofile+fsync   read GB/s  of fromfile")
    for name, found in speeds.items():
        line = {}
        for verb in ("write", "read"):
            pairs = list(zip(found[verb], speeds["plain file, tofile"][verb], strict=True))[1:]
            line[verb] = statistics.median(a for a, _ in pairs)
            line[f"{verb}_ratio"] = statistics.median(a / b for a, b in pairs)
            synced = list(zip(found[verb], speeds["plain file, tofile and fsync"][verb], strict=True))[1:]
            line[f"{verb}_ratio_to_synced"] = statistics.median(a / b for a, b in synced)
        medians[name] = line
        print(
            f"{name:34s} {line['write']:10.2f}  {line['write_ratio']:9.2f}  {line['write_ratio_to_synced']:15.2f}"
            f"  {line['read']:10.2f}  {line['read_ratio']:11.2f}"
        )
    print(json.dumps({"machine": machine(), "chunk_rows": CHUNK_ROWS, "engines": medians}))


def all_engines(values: Any) -> dict[str, Engine]:
    bits = values.view(np.uint16)

    def plain_write(folder: Path) -> None:
        bits.tofile(folder / "plain")

    def plain_write_synced(folder: Path) -> None:
        with (folder / "plain").open("wb") as handle:
            bits.tofile(handle)
            os.fsync(handle.fileno())

    def plain_read(folder: Path) -> Any:
        return np.fromfile(folder / "plain", dtype=np.uint16)

    def ours(folder: Path) -> RowArray:
        return RowArray(
            open_place(folder / "a" / "b" / "c"), values.shape, "bfloat16", CHUNK_ROWS, ("row", "d_model"), {}
        )

    def our_write(folder: Path) -> StagedRows:
        array = ours(folder)
        array.create()
        return array.stage(0, values)

    def our_write_durable(folder: Path) -> None:
        publish(our_write(folder).files)

    def our_read(folder: Path) -> Any:
        return RowArray.open(open_place(folder / "a" / "b" / "c")).read(0, ROWS)

    engines: dict[str, Engine] = {
        "plain file, tofile": (plain_write, nothing, plain_read),
        "plain file, tofile and fsync": (plain_write_synced, nothing, plain_read),
        "ours: atomic chunks, crc32c": (our_write, lambda folder, staged: publish(staged.files), our_read),
        "ours, and fsync": (our_write_durable, nothing, our_read),
    }
    try:
        engines |= {"zarr, default pipeline, crc32c": _zarr(bits, "zarr.core.codec_pipeline.BatchedCodecPipeline")}
        import zarrs  # noqa: F401

        engines |= {"zarr, zarrs pipeline, crc32c": _zarr(bits, "zarrs.ZarrsCodecPipeline")}
        engines |= {"TensorStore, crc32c": _tensorstore(bits)}
    except ImportError as error:
        print(f"not measured: {error}; pip install 'granary-activations[readers]'")
    return engines


def _zarr(bits: Any, pipeline: str) -> Engine:
    import zarr
    from zarr.codecs import Crc32cCodec

    def write(folder: Path) -> None:
        with zarr.config.set({"codec_pipeline.path": pipeline, "array.write_empty_chunks": True}):
            array = zarr.create_array(
                folder / "z", shape=bits.shape, chunks=(CHUNK_ROWS, WIDTH), dtype="uint16",
                compressors=[Crc32cCodec()], filters=None,
            )  # fmt: skip
            array[:] = bits

    def read(folder: Path) -> Any:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            return zarr.open_array(folder / "z", mode="r")[:]

    return write, nothing, read


def _tensorstore(bits: Any) -> Engine:
    import tensorstore

    def spec(folder: Path) -> dict[str, Any]:
        return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "t")}}

    def write(folder: Path) -> None:
        metadata = {
            "shape": list(bits.shape),
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [CHUNK_ROWS, WIDTH]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        tensorstore.open({**spec(folder), "metadata": metadata, "create": True}).result().write(bits).result()

    def read(folder: Path) -> Any:
        return tensorstore.open(spec(folder)).result().read().result()

    return write, nothing, read


if __name__ == "__main__":
    main()
