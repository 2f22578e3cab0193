"""Durable files on a local file system, and the backend of places that are made of them.

Invariant: a file under its final name is whole and on the device. Bytes go to a temporary name in the same folder, are
flushed to the device, and only then take their name, so neither SIGKILL nor a power cut leaves a cut file behind. For
many files the two halves are separate: `stage` writes, `publish` flushes and renames all of them at once.

Temporary names start with a dot and end in .tmp; nobody reads them, and `remove_temporaries` clears what a killed
process left.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from storage.backends.backend import Buffer
from storage.backends.threads import in_threads
from storage.errors import StorageError

StagedFile = tuple[Path, Path]
"""A temporary file and the name it is to take."""


def write_file(path: Path, buffers: Sequence[Buffer]) -> None:
    """Write the buffers one after the other as the file `path`, replacing what was there, durably."""
    publish([stage(path, buffers)])


def create_file(path: Path, content: bytes) -> bool:
    """Write `path` only if it does not exist. Return whether this call made it; of several callers with contents of
    their own exactly one does."""
    temporary, _ = stage(path, [content])
    try:
        _flush(temporary)
        os.link(temporary, path)  # fails if the name is taken, in one step
    except FileExistsError:  # perhaps by us: over NFS the answer to a first request may be lost
        if not _holds(path, content):
            return False
    finally:
        temporary.unlink(missing_ok=True)
    in_threads(_flush, sorted(_folders([path])))
    return True


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:  # removed since
        return False


def stage(path: Path, buffers: Sequence[Buffer]) -> StagedFile:
    """Write the buffers under a temporary name beside `path`. Not durable yet; on an error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while view:
                view = view[os.write(descriptor, view) :]
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return temporary, path


def publish(staged: Sequence[StagedFile]) -> None:
    """Flush staged files to the device, give them their names, and make the names durable."""

    def settle(item: StagedFile) -> None:
        _flush(item[0])
        item[0].replace(item[1])

    try:
        in_threads(settle, staged)
    except BaseException:
        discard(staged)
        raise
    in_threads(_flush, sorted(_folders(final for _, final in staged)))


def discard(staged: Iterable[StagedFile]) -> None:
    """Remove what was staged and will not be published."""
    for temporary, _ in staged:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files under a folder. Only for when no writer is at work there any more."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class LocalFiles:
    """The backend of a folder of this machine, or of a file system that all workers mount."""

    root: Path

    is_local = True
    threads = 4
    """System calls and checksums release the GIL; more threads than this gained nothing (docs/decisions/0001)."""

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        descriptor = os.open(self._path(key), os.O_RDONLY)
        try:
            size, at = os.fstat(descriptor).st_size, start
            for buffer in buffers:
                filled = 0
                while filled < buffer.nbytes:  # one read call moves at most 2 GiB
                    moved = os.preadv(descriptor, [buffer[filled:]], at)
                    if moved == 0:
                        return min(size, at)  # also if it was cut since its size was asked for
                    filled += moved
                    at += moved
            return size
        finally:
            os.close(descriptor)

    def open(self, key: str) -> BinaryIO:
        return self._path(key).open("rb")

    def stage(self, key: str, buffers: Sequence[Buffer]) -> StagedFile:
        return stage(self._path(key), buffers)

    def publish(self, staged: Sequence[StagedFile]) -> None:
        publish(staged)

    def discard(self, staged: Sequence[StagedFile]) -> None:
        discard(staged)

    def create(self, key: str, content: bytes) -> bool:
        return create_file(self._path(key), content)

    def check_writable(self) -> None:
        """Raise StorageError unless files can be made here, or in the nearest folder above that exists. Leaves nothing:
        the file has no name where the file system can do that."""
        nearest = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not nearest.is_dir():
            raise StorageError(f"{nearest} is a file; a store is a folder, in a folder: name another place")
        try:
            tempfile.TemporaryFile(dir=nearest).close()
        except OSError as error:
            raise StorageError(
                f"the store at {self.root} cannot be written: {error.strerror}, when a file was to be made in "
                f"{nearest}; make that writable, or put the store elsewhere"
            ) from None

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def names(self, key: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._path(key)) if not name.startswith("."))  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, key: str) -> Iterator[str]:
        try:
            with os.scandir(self._path(key)) as entries:
                for entry in entries:
                    below = f"{key}/{entry.name}" if key else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        yield from self.walk(below)
                    else:
                        yield below
        except FileNotFoundError:
            return  # removed since its name was listed

    def remove(self, key: str) -> None:
        path = self._path(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / key


def _folders(files: Iterable[Path]) -> set[Path]:
    """The folders whose entries name the files: each folder made for a file is itself a name in its parent, and a chunk
    may be the first of its folder, of `c`, and of its array."""
    return {folder for file in files for folder in list(file.parents)[:3]}


def _flush(path: Path) -> None:
    """fsync a file or folder; a rename alone survives a crash of the process, not of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
