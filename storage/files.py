"""Durable files on a local file system.

Invariant: a file under its final name is whole. Bytes go to a temporary name in the same folder, are flushed to the
device, and only then take their name, so neither SIGKILL nor a power cut leaves a cut file behind. Temporary names
start with a dot and hold the writer's process id; nobody reads them.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Buffer = Any  # bytes, or a C-contiguous array (anything with the buffer protocol)


def write_file(path: Path, buffers: Sequence[Buffer]) -> None:
    """Write the buffers one after the other as the file `path`, replacing what was there, durably."""
    with _temporary(path) as temporary:
        _write_synced(temporary, buffers)
        temporary.replace(path)


def create_file(path: Path, content: bytes) -> bool:
    """Write `path` only if it does not exist. Return whether this call made it; of several callers exactly one does."""
    with _temporary(path) as temporary:
        _write_synced(temporary, [content])
        try:
            os.link(temporary, path)  # fails if the name is taken, in one step
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename alone survives a crash of the process, not of the machine)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, buffers: Sequence[Buffer]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
