"""The promises of `storage.backends.backend`, kept by every backend: local files, S3 by obstore and by s3fs, memory."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from s3 import FaultyS3, S3Server

from storage.backends.fsspec_files import FsspecFiles
from storage.backends.objects import PART_BYTES, ObjectStore
from storage.backends.place import Place, check_url, open_place
from storage.errors import StorageError

MIB = 2**20
OBSTORE, S3FS = "s3", "s3fs"


def s3_place(kind: str, url: str) -> Place:
    if kind == OBSTORE:
        return Place(ObjectStore.at(url))
    s3fs.S3FileSystem.clear_instance_cache()  # they know the addresses of earlier tests
    return Place(FsspecFiles.at(url))


@pytest.fixture(params=["local", OBSTORE, S3FS, "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        yield open_place(tmp_path / "store")
    elif request.param == "memory":
        yield open_place(f"memory://{tmp_path}")
    else:
        yield s3_place(request.param, f"{request.getfixturevalue('bucket')}/a/prefix")


def test_what_is_written_is_read(place: Place) -> None:
    assert not (place / "a").exists()
    (place / "a" / "b").write(b"one, ", np.arange(3, dtype=np.uint8), memoryview(b""))
    assert (place / "a" / "b").read() == b"one, \x00\x01\x02"
    (place / "a" / "b").write(b"two")
    assert (place / "a" / "b").read() == b"two"
    (place / "empty").write()
    assert (place / "empty").read() == b""
    assert (place / "a" / "b").exists()
    assert not (place / "a" / "c").exists()


def test_what_is_not_there(place: Place) -> None:
    missing = place / "c" / "7"
    buffer = bytearray(4)
    for attempt in (missing.read, missing.open, lambda: place.backend.read_into("c/7", 0, [memoryview(buffer)])):
        with pytest.raises(FileNotFoundError):
            attempt()
    assert missing.names() == []
    missing.remove()


def test_ranges_are_scattered_into_buffers(place: Place) -> None:
    content = bytes(range(100))
    (place / "rows").write(content)
    for start, lengths in [(0, [100]), (0, [1, 0, 99]), (10, [5, 7, 1]), (99, [1]), (50, [50])]:
        buffers = [bytearray(length) for length in lengths]
        assert place.backend.read_into("rows", start, [memoryview(b) for b in buffers]) == 100
        assert b"".join(buffers) == content[start : start + sum(lengths)]


def test_a_range_that_goes_beyond_the_end_tells_the_size(place: Place) -> None:
    (place / "rows").write(bytes(range(1, 11)))
    for start, lengths in [(8, [4]), (5, [3, 4]), (10, [1]), (300, [8, 8])]:
        buffers = [bytearray(b"\xff" * length) for length in lengths]
        assert place.backend.read_into("rows", start, [memoryview(b) for b in buffers]) == 10
        there = bytes(range(1, 11))[start:]
        filled = b"".join(buffers)
        assert filled == there + b"\xff" * (sum(lengths) - len(there))


def test_an_array_is_filled_in_place(place: Place) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    (place / "values").write(values)
    out = np.zeros_like(values)
    place.backend.read_into("values", 0, [out[:300].view(np.uint8).data, out[300:].view(np.uint8).data])
    np.testing.assert_array_equal(out, values)


def test_names_are_those_directly_below(place: Place) -> None:
    assert place.names() == []
    for name in ("b/2", "b/1/x", "b/1/y", "b/10", "bb/1", "a"):
        (place / name).write(b".")
    assert place.names() == ["a", "b", "bb"]
    assert (place / "b").names() == ["1", "10", "2"]
    assert (place / "b" / "1").names() == ["x", "y"]


def test_names_are_those_of_now(place: Place) -> None:
    """Not those of a listing that was kept: other processes write too."""
    (place / "b" / "1").write(b".")
    assert (place / "b").names() == ["1"]
    other = open_place(str(place)) if not isinstance(place.backend, FsspecFiles) else Place(FsspecFiles.at(str(place)))
    (other / "b" / "2").write(b".")
    assert (place / "b").names() == ["1", "2"]
    (other / "b" / "1").remove()
    assert (place / "b").names() == ["2"]
    assert not (place / "b" / "1").exists()


def test_more_names_than_a_page_of_a_listing(bucket: str) -> None:
    place = open_place(bucket)
    with_page = 1001
    threads = [
        threading.Thread(
            target=lambda part=part: [(place / f"n/{i:04d}").write(b"") for i in range(part, with_page, 8)]
        )
        for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (place / "n").names() == [f"{i:04d}" for i in range(with_page)]
    (place / "n").remove()
    assert place.names() == []


def test_remove_takes_what_is_below_and_nothing_else(place: Place) -> None:
    for name in ("c/1", "c/2/x", "cc/1", "d"):
        (place / name).write(b".")
    (place / "c").remove()
    assert place.names() == ["cc", "d"]
    (place / "d").remove()
    (place / "d").remove()
    assert place.names() == ["cc"]


def test_one_of_many_creators_wins(place: Place) -> None:
    for round_ in range(5):
        name = place / "commits" / f"{round_}.json"
        start, won = threading.Barrier(16), []

        def create(writer: int, name: Place = name, start: threading.Barrier = start, won: list[int] = won) -> None:
            start.wait()
            if name.create(f"writer {writer}".encode()):
                won.append(writer)

        threads = [threading.Thread(target=create, args=[writer]) for writer in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert name.read() == f"writer {won[0]}".encode()
        assert not name.create(b"late")


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 21 * MIB])
def test_objects_of_several_parts(place: Place, nbytes: int) -> None:
    content = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    cuts = [0, 5, 3 * MIB, 3 * MIB + 7, nbytes]
    (place / "shard").write(*(content[a:b] for a, b in pairwise(cuts)))
    assert np.array_equal(np.frombuffer((place / "shard").read(), np.uint8), content)
    tail = np.zeros(1000, np.uint8)
    assert place.backend.read_into("shard", nbytes - 1000, [tail.data]) == nbytes
    assert np.array_equal(tail, content[-1000:])


def test_parquet_is_read_by_ranges(place: Place) -> None:
    table = pa.table({"n": np.arange(300_000), "text": [f"text {i}" for i in range(300_000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10_000, compression="none")
    (place / "part.parquet").write(sink.getvalue())
    with (place / "part.parquet").open() as opened:
        file = pq.ParquetFile(opened)
        assert file.read_row_group(17).column("n").to_pylist() == list(range(170_000, 180_000))
    with (place / "part.parquet").open() as opened:
        assert pq.ParquetFile(opened).read().equals(table)


def test_a_store_can_be_put_here(place: Place) -> None:
    place.backend.check_writable()
    assert place.names() == []


def test_places_join_and_show_themselves(place: Place) -> None:
    assert str(place / "a" / "b.c") == f"{place}/a/b.c"
    assert (place / "a" / "b.c").name == "b.c"
    assert place.joinpath("a", "b") == place / "a" / "b"


class Looking(MemoryFileSystem):  # type: ignore[misc]
    """Creates as fsspec's base class does: it looks, and then writes."""

    store: ClassVar[dict[str, Any]] = {}
    cachable = False

    def __init__(self, both_looked: threading.Barrier, lag_s: float):
        super().__init__()
        self.both_looked, self.lag_s = both_looked, lag_s

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create":
            time.sleep(0.1)
            if self.exists(path):
                raise FileExistsError
            self.both_looked.wait(10)
            time.sleep(self.lag_s)
        super().pipe_file(path, value)


@pytest.mark.parametrize("lag_s", [0.0, 0.02, 0.08])
def test_of_two_that_looked_before_either_wrote_one_is_told_it_made_the_file(
    lag_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.backends.fsspec_files._CREATING", nullcontext())  # which two processes do not share
    barrier, root, made = threading.Barrier(2), f"/race-{lag_s}", []

    def create(writer: bytes, lag_s: float) -> None:
        if FsspecFiles("looking://race", Looking(barrier, lag_s), root).create("name", writer):
            made.append(writer)

    threads = [threading.Thread(target=create, args=args) for args in ((b"first", 0.0), (b"last", lag_s))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [Looking(barrier, 0).cat_file(f"{root}/name")]


# ---- lost answers


def test_a_link_whose_answer_is_lost_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NFS, whose client repeats the request and is told that the name is there."""
    link = os.link

    def twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr(os, "link", twice)
    place = open_place(tmp_path)
    assert (place / "a").create(b"mine")
    assert not (place / "a").create(b"theirs")
    assert (place / "a").read() == b"mine"
    assert place.names() == ["a"]


LOST = {"rate": 1.0, "kinds": ["swallow"]}


@pytest.mark.parametrize("kind", [OBSTORE, S3FS])
def test_a_create_whose_answer_is_lost_was_made(
    kind: str, faulty_s3: Callable[..., FaultyS3], s3: S3Server, bucket: str
) -> None:
    """The client below us repeats the request, and finds its own object, or we do."""
    proxy = faulty_s3()
    place = s3_place(kind, bucket)
    place.backend.check_writable()
    for name in ("a", "b", "c"):
        before = proxy.counts().get("swallow", 0)
        proxy.rules(**LOST)

        def end(before: int = before) -> None:
            deadline = time.monotonic() + 60
            while proxy.counts().get("swallow", 0) == before and time.monotonic() < deadline:
                time.sleep(0.02)
            proxy.rules(rate=0.0)

        ending = threading.Thread(target=end)
        ending.start()
        assert (place / name).create(b"mine")
        ending.join()
        assert not (place / name).create(b"theirs")
        assert (place / name).read() == b"mine"
    assert proxy.counts()["swallow"] >= 3


def test_an_upload_in_parts_whose_last_answer_is_lost(faulty_s3: Callable[..., FaultyS3], bucket: str) -> None:
    """The server has closed the upload then, and says there is no such one: it is not a missing bucket."""
    proxy = faulty_s3()
    place = open_place(bucket)
    place.backend.check_writable()
    content = os.urandom(3 * PART_BYTES)
    for seed in range(4):
        proxy.rules(rate=0.4, kinds=["swallow"], seed=seed)
        (place / f"{seed}").write(content)
        proxy.rules(rate=0.0)
        assert (place / f"{seed}").read() == content


@pytest.mark.parametrize("kind", ["slowdown", "error", "reset", "cut", "stall", "swallow"])
def test_every_operation_survives_every_fault(
    kind: str, faulty_s3: Callable[..., FaultyS3], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_STALL_S", "0.2")
    proxy = faulty_s3(stall_s=0.6)
    place = open_place(bucket)
    place.backend.check_writable()
    proxy.rules(rate=0.3, kinds=[kind], seed=1)
    content = os.urandom(PART_BYTES + MIB)
    n = -1
    while (n := n + 1) < 3 or proxy.counts()[kind] <= 3:  # which requests are spoiled hangs on their order
        assert n < 40
        (place / f"x/{n}").write(content)
        assert (place / f"commits/{n}").create(b"mine")
        assert not (place / f"commits/{n}").create(b"theirs")
        assert (place / f"x/{n}").read() == content
        buffer = bytearray(100)
        assert place.backend.read_into(f"x/{n}", 50, [memoryview(buffer)]) == len(content)
        assert buffer == content[50:150]
        assert (place / "x").names() == sorted(str(i) for i in range(n + 1))
        with (place / f"x/{n}").open() as opened:
            opened.seek(-10, os.SEEK_END)
            assert opened.read() == content[-10:]
    (place / "x").remove()
    assert place.names() == ["commits"]


# ---- URLs

REFUSED = [
    "s3://AKIAKEY:s3cr3t@bucket/acts",
    "s3://AKIAKEY:s3c/r3t@bucket/acts",
    "s3://s3cr3t@bucket/acts",
    "s3://bucket/acts?secret=s3cr3t",
    "https://host/acts?X-Amz-Signature=s3cr3t",
    "memory://a#s3cr3t",
    "abfss://container:s3cr3t@account.dfs.core.windows.net/acts",
]


@pytest.mark.parametrize("url", REFUSED)
def test_urls_with_credentials_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(StorageError, match="carries credentials or options") as caught:
        open_place(url)
    assert "s3c" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_urls_without_credentials_are_not(tmp_path: Path) -> None:
    for url in ("s3://bucket/a-b/c", "abfss://container@account.dfs.core.windows.net/acts", "C:/a?b", "/a@b#c"):
        check_url(url)
    assert open_place(tmp_path / "a@b?c#d").path == tmp_path / "a@b?c#d"


def test_a_file_system_that_nobody_knows() -> None:
    with pytest.raises(StorageError, match="nosuch://a/b cannot be used"):
        open_place("nosuch://a/b")
