"""Places: names below a root, on whatever holds the bytes.

A `Place` is a key and the backend it is on. Three backends know the few operations that a store needs: local files
(`storage.files`), object stores through obstore (`storage.objects`: s3, gs, az), and any other fsspec file system
(`storage.remote`). All keep these promises:

- what is read under a name is whole: a name appears only with all its bytes, which are durable then;
- of several callers that `create` one name, each with a content of its own, exactly one is told that it did, even if
  the answer to its request was lost (but see `storage.remote`);
- a name that is not there is a FileNotFoundError; a backend that does not answer for long is a StorageError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from storage.errors import StorageError
from storage.patience import Waiting

Buffer = Any  # bytes, or a C-contiguous array (anything with the buffer protocol)
Staged = Any  # what a backend remembers between `stage` and `publish`

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")


class Backend(Protocol):
    """What holds the bytes. Keys are relative, with slashes; "" is the root. Safe to use from several threads."""

    @property
    def url(self) -> str:
        """The root, as a person writes it. Holds no credentials."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether names are files of this machine: then small files cost nothing and folders can be renamed."""
        ...

    @property
    def threads(self) -> int:
        """How many operations at once use it fully."""
        ...

    def read(self, key: str) -> bytes: ...

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers one after the other with the bytes from `start`; return the whole size of the name.

        What is beyond its end is left as it was: compare the size."""
        ...

    def open(self, key: str) -> BinaryIO:
        """Open for reading with seek, for Parquet."""
        ...

    def stage(self, key: str, buffers: Sequence[Buffer]) -> Staged:
        """Bring the bytes to the backend. They are sure to be durable and under their name after `publish`."""
        ...

    def publish(self, staged: Sequence[Staged]) -> None: ...

    def discard(self, staged: Sequence[Staged]) -> None:
        """Forget what was staged and will not be published."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Write the name only if it is not there. Return whether this call made it.

        An answer may be lost, so what is there is compared: content that is there already counts as made. Where it
        matters who won the content must be the caller's own and hold its writer id."""
        ...

    def check_writable(self) -> None:
        """Raise StorageError, within seconds, unless names can be created, only once, and removed here."""
        ...

    def exists(self, key: str) -> bool: ...

    def names(self, key: str) -> list[str]:
        """The names directly below, sorted; none if there are none."""
        ...

    def walk(self, key: str) -> Iterator[str]:
        """The keys of all that is below a name, at any depth, one after the other; their order is the backend's."""
        ...

    def remove(self, key: str) -> None:
        """Remove the name and everything below it, if it is there."""
        ...


@dataclass(frozen=True)
class Place:
    """A name below a backend's root; joined with `/` as paths are."""

    backend: Backend
    key: str = ""

    def __truediv__(self, name: str) -> "Place":
        return Place(self.backend, f"{self.key}/{name}" if self.key else name)

    def joinpath(self, *names: str) -> "Place":
        return Place(self.backend, "/".join([self.key, *names]) if self.key else "/".join(names))

    @property
    def name(self) -> str:
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def path(self) -> Path:
        """The path of a local place."""
        assert self.backend.is_local, self
        return Path(str(self))

    def __str__(self) -> str:
        return f"{self.backend.url.rstrip('/')}/{self.key}" if self.key else self.backend.url

    def read(self) -> bytes:
        return self.backend.read(self.key)

    def open(self) -> BinaryIO:
        return self.backend.open(self.key)

    def write(self, *buffers: Buffer) -> None:
        """Write the buffers one after the other, replacing what was there, durably."""
        self.backend.publish([self.backend.stage(self.key, buffers)])

    def create(self, content: bytes) -> bool:
        return self.backend.create(self.key, content)

    def exists(self) -> bool:
        return self.backend.exists(self.key)

    def names(self) -> list[str]:
        return self.backend.names(self.key)

    def remove(self) -> None:
        self.backend.remove(self.key)


PROBE = "granary-probe-"
"""The names that `check_writable` makes and removes; one that a killed process left is nobody's."""


def scatter(body: memoryview, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers one after the other with what a request brought; what it does not reach is left as it was."""
    at = 0
    for buffer in buffers:
        part = body[at : at + buffer.nbytes]
        buffer[: part.nbytes] = part
        at += buffer.nbytes


def check_url(url: str) -> None:
    """Raise StorageError for a URL that carries credentials or options, which would end up in logs and records."""
    if "://" not in url:
        return
    parts = urlsplit(url)
    is_container = parts.scheme in ("abfs", "abfss") and parts.password is None  # abfss://container@account/...
    named = "@" in parts.netloc and not is_container
    cut_key = ":" in parts.netloc and "@" in parts.path  # a secret key may hold slashes
    options = "=" in parts.query or parts.fragment  # a ? alone is a pattern's
    if named or cut_key or options:
        raise StorageError(
            f"the URL {parts.scheme}://... carries credentials or options: give them in the environment "
            "(AWS_ACCESS_KEY_ID, ...), where they reach no spec, log or store"
        )


def home_expanded(path: str | Path) -> Path:
    """Replace a leading `~` by the user's folder. Raises StorageError for a user that this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # pathlib's word for it
        user = Path(path).parts[0]
        raise StorageError(f"no folder of a user {user} on this machine: {path}") from None


def open_place(url: str | Path | Place, *, waiting: Waiting | None = None) -> Place:
    """The place a path or URL names. Nothing is read. Raises StorageError for a URL that cannot be used.

    `waiting` is told of pauses instead of stderr, and makes the place patient from its first request (see
    `storage.patience`): for processes that are started for a store which was found in order.
    """
    if isinstance(url, Place):
        return url
    text = str(url)
    parts = urlsplit(text)
    if len(parts.scheme) <= 1 or parts.scheme == "file":
        from storage.files import LocalFiles

        path = Path(parts.path) if parts.scheme == "file" else Path(text)
        return Place(LocalFiles(home_expanded(path).absolute()))
    check_url(text)
    if parts.scheme in OBJECT_STORES:
        from storage.objects import ObjectStore

        return Place(ObjectStore.at(text, waiting))
    from storage.remote import FsspecFiles

    return Place(FsspecFiles.at(text, waiting))
