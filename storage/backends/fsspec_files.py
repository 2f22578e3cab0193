"""Any other file system that fsspec knows, by its URL.

Slower than `objects`, and only as atomic as the file system's own puts; for what obstore does not reach. Many file
systems of fsspec create a file by looking for it and then writing it, as its base class does: `create` looks again
afterwards, which leaves a gap that docs/object-stores.md describes.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from storage.backends.backend import PROBE, Buffer, scatter
from storage.backends.range_reader import open_ranges
from storage.backends.retry import Denied, Passing, Patience, Verb, Waiting
from storage.errors import StorageError, Unreachable

T = TypeVar("T")

OURS = (TypeError, AttributeError, AssertionError, KeyError)
"""Errors that mean a mistake in a program; everything else is the world's."""
_CREATING = threading.Lock()
"""Some file systems (memory://) look and then write."""
MOST_PAUSE_S = 10.0
"""The longest wait before `create` looks again; well below the limit at which a worker is taken for hung."""


@dataclass(frozen=True)
class FsspecFiles:
    """The backend of a folder on an fsspec file system."""

    url: str
    files: Any = field(compare=False, repr=False)
    root: str = field(compare=False, repr=False)
    _patience: Patience = field(default_factory=Patience, compare=False, repr=False)

    is_local = False
    threads = 8

    @classmethod
    def at(cls, url: str, waiting: Waiting | None = None) -> "FsspecFiles":
        try:
            # Listings that are remembered would hide what other processes wrote.
            files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StorageError(f"{url} cannot be used: {error}") from None
        return cls(url.rstrip("/"), files, root.rstrip("/"), Patience(waiting))

    def __reduce__(self) -> tuple[Any, ...]:
        return FsspecFiles.at, (self.url,)

    def read(self, key: str) -> bytes:
        return cast(bytes, self._call(key, lambda path: self.files.cat_file(path)))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        wanted = sum(buffer.nbytes for buffer in buffers)

        def request(path: str) -> int:
            size = int(self.files.size(path))
            if start >= size:
                return size
            body = memoryview(self.files.cat_file(path, start=start, end=min(start + wanted, size)))
            scatter(body, buffers)
            return size

        return self._call(key, request)

    def open(self, key: str) -> BinaryIO:
        return open_ranges(self, key)

    def stage(self, key: str, buffers: Sequence[Buffer]) -> str:
        whole = b"".join(memoryview(buffer).cast("B") for buffer in buffers)

        self._call(key, lambda path: self._put(path, whole), "write")
        return key

    def publish(self, staged: Sequence[str]) -> None:
        """Nothing is left to do after `stage`."""

    def discard(self, staged: Sequence[str]) -> None:
        """Nothing to do: the next attempt writes the same."""

    def create(self, key: str, content: bytes) -> bool:
        def request(path: str) -> bool:
            try:
                with _CREATING:
                    started = time.monotonic()
                    self._put(path, content, mode="create")
                    took = time.monotonic() - started
                # Whoever looked before we wrote, and saw nothing, writes over ours meanwhile: the last has made it.
                time.sleep(min(2 * took, MOST_PAUSE_S))
            except OSError:  # "exists" has several names here; what is there decides
                if not self.files.exists(path):
                    raise
            return bool(self.files.cat_file(path) == content)

        return self._call(key, request, "write")

    def exists(self, key: str) -> bool:
        return bool(self._call(key, lambda path: self.files.exists(path)))

    def names(self, key: str) -> list[str]:
        try:
            listed = self._call(key, lambda path: self.files.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in listed})

    def walk(self, key: str) -> Iterator[str]:
        root = self.files._strip_protocol(self.root)
        for path in self._call(key, lambda path: self.files.find(path)):
            yield str(path)[len(root) :].lstrip("/")

    def remove(self, key: str) -> None:
        def request(path: str) -> None:
            try:
                self.files.rm(path, recursive=True)
            except FileNotFoundError:
                return

        self._call(key, request, "write")

    def check_writable(self) -> None:
        """Raise StorageError, within seconds, unless names can be created, only once, and removed here."""
        probe = f"{PROBE}{secrets.token_hex(8)}"
        made = [self.create(probe, content) for content in (b"first", b"second")]
        self.remove(probe)
        if made != [True, False]:
            raise StorageError(
                f"{self.url} cannot hold a store: this file system replaces files that were to be created only once, "
                "so two workers could commit one unit; use another"
            )

    def _put(self, path: str, content: bytes, **how: Any) -> None:
        try:
            self.files.pipe_file(path, content, **how)
        except FileNotFoundError:  # where folders have to be made, the first file of one
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(path, content, **how)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def _call(self, key: str, request: Callable[[str], T], verb: Verb = "read") -> T:
        def attempt() -> T:
            try:
                return request(self._path(key))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(*error.args) from None
            except NotImplementedError as error:
                raise Unreachable(f"{self.url} cannot be used: {error}") from None
            except OURS:
                raise
            except Exception as error:  # the file systems raise what their client libraries raise
                kind = Denied if isinstance(error, PermissionError) else Passing
                raise kind(f"{self.url}/{key} cannot be reached: {error}") from error

        return self._patience.call(attempt, verb)
