"""Durable files on a local file system.

Invariant: a file under its final name is whole and on the device. Bytes go to a temporary name in the same folder, are
flushed to the device, and only then take their name, so neither SIGKILL nor a power cut leaves a cut file behind. For
many files the two halves are separate: `stage` writes, `publish` flushes and renames all of them at once.

Temporary names start with a dot and end in .tmp; nobody reads them, and `remove_temporaries` clears what a killed
process left.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

Buffer = Any  # bytes, or a C-contiguous array (anything with the buffer protocol)
Staged = tuple[Path, Path]
"""A temporary file and the name it is to take."""

T = TypeVar("T")
R = TypeVar("R")


def write_file(path: Path, buffers: Sequence[Buffer]) -> None:
    """Write the buffers one after the other as the file `path`, replacing what was there, durably."""
    publish([stage(path, buffers)])


def create_file(path: Path, content: bytes) -> bool:
    """Write `path` only if it does not exist. Return whether this call made it; of several callers exactly one does."""
    temporary, _ = stage(path, [content])
    try:
        _flush(temporary)
        os.link(temporary, path)  # fails if the name is taken, in one step
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    in_threads(_flush, sorted(_folders([path])))
    return True


def stage(path: Path, buffers: Sequence[Buffer]) -> Staged:
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


def publish(staged: Sequence[Staged]) -> None:
    """Flush staged files to the device, give them their names, and make the names durable."""

    def settle(item: Staged) -> None:
        _flush(item[0])
        item[0].replace(item[1])

    try:
        in_threads(settle, staged)
    except BaseException:
        discard(staged)
        raise
    in_threads(_flush, sorted(_folders(final for _, final in staged)))


def discard(staged: Iterable[Staged]) -> None:
    """Remove what was staged and will not be published."""
    for temporary, _ in staged:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files under a folder. Only for when no writer is at work there any more."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map in the I/O threads; every call has ended when this returns or raises the first error."""
    if len(items) == 1:
        return [function(items[0])]
    futures = [_pool().submit(function, item) for item in items]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


@cache
def _pool() -> ThreadPoolExecutor:
    # System calls and checksums release the GIL; more threads than this gained nothing (docs/decisions/0001).
    return ThreadPoolExecutor(4, thread_name_prefix="granary-io")


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
