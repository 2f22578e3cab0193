"""A file whose bytes are fetched range by range, for readers that want to seek (Parquet)."""

import io
from typing import BinaryIO, cast

from storage.backends.backend import Backend

BUFFER_BYTES = 2**20
"""A Parquet footer, or a column chunk of a row group, is one request; reading on is one for each megabyte."""


class RangeReader(io.RawIOBase):
    """One name of a backend, each read a request of the backend with its retries. Raises FileNotFoundError."""

    def __init__(self, backend: Backend, key: str):
        self._backend, self._key, self._at = backend, key, 0
        self._size = backend.read_into(key, 0, [memoryview(bytearray(1))])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if wanted.nbytes:
            self._backend.read_into(self._key, self._at, [wanted])
            self._at += wanted.nbytes
        return wanted.nbytes


def open_ranges(backend: Backend, key: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(RangeReader(backend, key), BUFFER_BYTES))
