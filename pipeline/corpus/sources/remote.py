"""Files of a corpus at fsspec URLs: finding them, telling their versions, reading them through interruptions.

A file's version is what its server says of its content without sending it: an ETag, a checksum, a version id, else the
time of its last change. A file that is opened later must still be of the version that was found: one table is never
made of two.

Failures that may pass are waited for (`pipeline.corpus.sources.retry`), in the middle of a file too: it is opened
again, and read on from where it was.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fsspec

from pipeline.corpus.sources.retry import Patience, Unread, status_of
from pipeline.errors import InputError

T = TypeVar("T")

VERSION_KEYS = (
    *("blob_id", "md5Hash", "md5", "ETag", "etag", "e_tag", "Content-MD5", "Digest", "content_md5", "checksum", "sha"),
    *("crc32c", "generation", "VersionId", "version_id", "version"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "modify", "modified", "updated"),
)
"""What file systems call it, the surest first: those of the hub, Google, S3, HTTP, Azure, and of SFTP, FTP, WebDAV,
HDFS, GitHub. (Google's etag changes with what is noted beside the content.)"""
LOCAL_PROTOCOLS = {"file", "local", "memory"}
"""Their content is at hand, and says more than a time."""
NOT_THERE = 404
BUFFER_BYTES = 2**16
READ_AT_ONCE = 2**22

Found = tuple[str, int, str]
"""The URL of a file, its bytes, and its version; empty where there is none."""


def find_remote(pattern: str, endings: Sequence[str]) -> list[Found]:
    """The files that a URL, a folder's URL or a pattern names; of a folder those with one of `endings`."""
    return patiently(pattern, lambda: _find(pattern, endings))


def patiently(what: str, request: Callable[[], T]) -> T:
    """The answer to a request, made again while it fails in a way that may pass. Raises Unread when that is long."""
    patience = Patience(what)
    while True:
        try:
            return request()
        except Exception as error:  # every file system has kinds of its own; what does not pass is raised again
            if not patience.waits_for(error):
                raise


def _find(pattern: str, endings: Sequence[str]) -> list[Found]:
    system, path = fsspec.core.url_to_fs(pattern)
    is_pattern = any(c in path for c in "*?[")
    found = system.glob(path, detail=True) if is_pattern else _named(system, path, tuple(endings))
    files = []
    for name, about in found.items():
        if about["type"] != "file":
            continue
        if about["size"] is None:  # a listing in HTML has only names
            about = system.info(name)
        if about["size"] is None:
            raise InputError(
                f"corpus.path: the server of {name} does not say how many bytes it has; download it, and give the "
                "file's path"
            )
        files.append((system.unstrip_protocol(name), int(about["size"]), version_of(system, about)))
    return files


def failure_at(url: str) -> BaseException | None:
    """What a server says to a request for a file; None where it has it."""
    try:
        system, path = fsspec.core.url_to_fs(url)
        system.info(path)
    except FileNotFoundError as error:  # fsspec's word for every answer that is no success
        return error.__cause__ or error
    except Exception as error:  # noqa: BLE001 every file system has kinds of its own
        return error
    return None


def _named(system: Any, path: str, endings: tuple[str, ...]) -> dict[str, Any]:
    """A file, or those of a folder with one of `endings`; nothing where neither is."""
    try:
        about = system.info(path)
    except FileNotFoundError as error:
        # fsspec says "not found" for every answer of an HTTP server that is no success, and gives that as the cause.
        cause = error.__cause__
        if cause is not None and status_of(cause) != NOT_THERE:
            raise cause from cause.__cause__  # what TLS says is there
        return {}
    is_page = about.get("mimetype") == "text/html" and not path.endswith(endings)
    if about["type"] == "file" and not is_page:
        return {path: about}
    return {name: about for name, about in system.find(path, detail=True).items() if name.lower().endswith(endings)}


def version_of(system: Any, about: Mapping[str, Any]) -> str:
    """The version of a file, from what its file system knows of it, as 'etag 5d41402a'; empty where that is nothing."""
    protocols = {system.protocol} if isinstance(system.protocol, str) else {*system.protocol}
    if protocols & LOCAL_PROTOCOLS:
        return ""
    key = next((key for key in VERSION_KEYS if about.get(key)), None)
    return "" if key is None else f"{key.lower()} {_text_of(about[key])}"


def is_version(version: str, about: Mapping[str, Any]) -> bool:
    """Return whether a file is of a version, as far as what is known of it now tells: a listing may tell more than a
    look."""
    kind, _, text = version.partition(" ")
    return all(_text_of(value) == text for key, value in about.items() if key.lower() == kind and value)


def _text_of(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes | bytearray) else str(value)
    return text.removeprefix("W/").strip('"')


class RemoteFile(io.RawIOBase):
    """A file at a URL, whose reads go on after interruptions."""

    def __init__(self, url: str, num_bytes: int, version: str, **how: Any):
        """`version`: the one it must have, if not empty. `how`: options of the file system's `open`."""
        super().__init__()
        self._url, self._num_bytes, self._version, self._how = url, num_bytes, version, how
        self._patience = Patience(url)
        self._handle: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                data = self._read(len(buffer))
            except Exception as error:  # as in `patiently`
                self._drop()
                if type(error).__name__ == "FileExpired":  # s3fs asks for the ETag that it has seen
                    raise _changed(self._url) from error
                if isinstance(error, ValueError) and "range requests" in str(error) and "block_size" not in self._how:
                    self._how = {"block_size": 0}  # fsspec's word for reading from the beginning to the end
                    continue
                if not self._patience.waits_for(
                    error, f"{self._position:,} of its {self._num_bytes:,} bytes were read"
                ):
                    raise
            else:
                self._patience.progressed()
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)

    def readall(self) -> bytes:
        block = bytearray(READ_AT_ONCE)
        parts = []
        while got := self.readinto(block):
            parts.append(bytes(block[:got]))
        return b"".join(parts)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._handle is None:
            self._handle = self._opened()
        if self._handle.tell() != self._position:
            self._move()
        data = bytes(self._handle.read(size))
        if not data and self._position < self._num_bytes:
            raise ConnectionError("the server ended the file before its end")
        return data

    def _opened(self) -> Any:
        system, path = fsspec.core.url_to_fs(self._url)
        if self._version and not is_version(self._version, system.info(path)):
            raise _changed(self._url)
        return system.open(path, "rb", **self._how)

    def _move(self) -> None:
        try:
            self._handle.seek(self._position)
        except ValueError:  # a server without ranges can only be read from the beginning
            while (missing := self._position - self._handle.tell()) > 0:
                if not self._handle.read(min(missing, READ_AT_ONCE)):
                    return
            if missing < 0:
                raise

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


def open_remote(url: str, num_bytes: int, version: str, **how: Any) -> io.BufferedReader:
    """Open a file at a URL for reading. Raises Unread, also later, when it is another or cannot be read."""
    return io.BufferedReader(RemoteFile(url, num_bytes, version, **how), BUFFER_BYTES)


def _changed(url: str) -> Unread:
    return Unread(
        f"corpus.path: {url} has changed since the corpus was looked at; run the same command again, with files that "
        "stay as they are"
    )
