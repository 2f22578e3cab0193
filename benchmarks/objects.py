"""Shards and small objects on an S3 server, through obstore and through s3fs: python -m benchmarks.objects

The server is ministack, a process of this machine, so the figures are of the clients and their CPU time, not of a
network; only the ratios mean anything. Each round measures every client once, in turn, on new objects.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.backends.backend import Backend
from storage.backends.fsspec_files import FsspecFiles
from storage.backends.objects import PART_BYTES, ObjectStore
from storage.backends.place import Place
from storage.backends.threads import in_threads
from storage.format.arrays import DTYPES, RowArray
from storage.harvest.harvest import chunk_rows_for
from workers.machine import machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from s3 import running_server  # type: ignore[import-not-found]

MIB = 2**20
ROWS, WIDTH, SHARDS = 32768, 1024, 2
"""A shard is 64 MiB of bfloat16."""
SMALL_OBJECTS = 64
"""Objects of 1 MiB."""


@dataclass(frozen=True)
class S3fsInParts(FsspecFiles):
    """s3fs told to send parts as large as ours; of itself it sends up to 100 MiB at once: ministack is slow then."""

    def _put(self, path: str, content: bytes, **how: Any) -> None:
        super()._put(path, content, **how, **({"chunksize": PART_BYTES} if len(content) > PART_BYTES else {}))


Task = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        os.environ.update(server.environment())
        bucket = server.make_bucket()
        clients: dict[str, Callable[[str], Backend]] = {"obstore": ObjectStore.at, "s3fs": S3fsInParts.at}
        speeds: dict[str, dict[str, list[float]]] = {name: {} for name in clients}
        for round_ in range(arguments.rounds + 1):  # the first warms connections up, and is dropped
            for name, at in clients.items():
                place = Place(at(f"{bucket}/{name}")) / str(round_)
                for what, speed in measured(place).items():
                    speeds[name].setdefault(what, []).append(speed)
                place.remove()
    show(speeds)


def measured(place: Place) -> dict[str, float]:
    """MiB/s of each task, and seconds of CPU time of this process for each GiB of shards written and read."""
    values = (
        np.random.default_rng(0).integers(0, 2**15, (SHARDS * ROWS, WIDTH), dtype=np.uint16).view(DTYPES["bfloat16"])
    )
    chunk_rows = chunk_rows_for(ROWS, WIDTH, 2)
    array = RowArray(place / "array", values.shape, "bfloat16", chunk_rows, ("row", "d_model"), {}, ROWS)
    array.create()
    small = np.random.default_rng(1).integers(0, 256, MIB, dtype=np.uint8)
    numbers = range(SMALL_OBJECTS)
    threads = place.backend.threads
    size, shards = values.nbytes / MIB, range(SHARDS)
    tasks: dict[str, tuple[float, Task]] = {
        "write 64 MiB shards": (size, lambda: [array.write(n * ROWS, values[n * ROWS :][:ROWS]) for n in shards]),
        "read 64 MiB shards": (size, lambda: [array.read(n * ROWS, (n + 1) * ROWS) for n in shards]),
        "read 1,024 rows in 64 places": (64 * 2, lambda: in_threads(lambda n: read_some(array, n), range(64), 4)),
        "write 1 MiB objects": (
            SMALL_OBJECTS, lambda: in_threads(lambda n: (place / "s" / str(n)).write(small), numbers, threads)
        ),
        "read 1 MiB objects": (
            SMALL_OBJECTS, lambda: in_threads(lambda n: (place / "s" / str(n)).read(), numbers, threads)
        ),
    }  # fmt: skip
    found, cpu = {}, 0.0
    for what, (mebibytes, task) in tasks.items():
        started, used = time.perf_counter(), time.process_time()
        task()
        found[what] = mebibytes / (time.perf_counter() - started)
        cpu += (time.process_time() - used) if "shards" in what else 0.0
    found["CPU seconds per GiB of shards"] = cpu / (2 * size / 1024)
    return found


def read_some(array: RowArray, number: int) -> None:
    start = (number * 7919 * 1024) % (array.shape[0] - 1024)
    array.read(start, start + 1024)


def show(speeds: dict[str, dict[str, list[float]]]) -> None:
    result: dict[str, Any] = {"machine": machine(), "tasks": {}}
    print(f"{'':32s} {'obstore':>10s} {'s3fs':>10s} {'ratio':>7s}")
    for what in speeds["obstore"]:
        pairs = list(zip(speeds["obstore"][what], speeds["s3fs"][what], strict=True))[1:]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        result["tasks"][what] = {"obstore": ours, "s3fs": theirs, "ratio": ratio}
        print(f"{what:32s} {ours:10.2f} {theirs:10.2f} {ratio:7.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
